"""Score new rows with the champion: `deepspeed jobs/predict.py --work-dir W --task T --data F --out P [--increment
K]`.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError
from pipeline.watch.rank import watched


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the job."""
    parser = argparse.ArgumentParser(description="Answer new rows of a learned task.")
    parser.add_argument("--work-dir", required=True, help="the stream's work_dir")
    parser.add_argument("--task", required=True, help="a learned task, or 'auto': the router chooses for every row")
    parser.add_argument("--text-column", help="the file's name for the text (default: the contract's)")
    parser.add_argument("--data", required=True, help="rows to answer: .parquet, .jsonl or .csv")
    parser.add_argument("--out", required=True, help="where the answers go: .parquet, .jsonl or .csv")
    parser.add_argument("--increment", type=int, help="serve as after this increment (default: now)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a path or placement")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; exit code 0, or 2 with one sentence."""
    options = parse(arguments)
    try:
        from pipeline.predict import predict, write_table
        from pipeline.routing import file_format_of
        from pipeline.serving import open_served

        file_format_of(options.out)
        served = open_served(options.work_dir, options.increment, options.set)
        table = predict(served, options.task, options.data, options.text_column)
        served.job.world.on_main(lambda: write_table(table, options.out))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"predict: {error}", file=sys.stderr)
        return 2
    if served.job.world.is_main:
        reasons = Counter(table["reason"].to_pylist())
        answered = reasons.pop(None, 0)
        left = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items())) or "none"
        print(f"{table.num_rows} rows in, {answered} answered, not answered: {left}; written to {options.out}")
        for column in ("task", "decision"):
            if column in table.column_names:
                counts = Counter(value for value in table[column].to_pylist() if value is not None)
                print(f"{column}: " + ", ".join(f"{number} {value}" for value, number in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(watched(main))

"""Recompute a row of R from the bank: `deepspeed jobs/evaluate.py --work-dir W [--increment K] [--task T]...`.

`python jobs/evaluate.py --work-dir W --task T --review A B` compares the review cost of two increments on a task from
what they published, without a model.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError
from pipeline.watch.rank import watched


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the job."""
    parser = argparse.ArgumentParser(description="Recompute a row of the accuracy matrix from published experts.")
    parser.add_argument("--work-dir", required=True, help="the stream's work_dir")
    parser.add_argument("--increment", type=int, help="the increment whose row it is (default: the newest)")
    parser.add_argument("--task", action="append", help="only this task; may be given again")
    parser.add_argument("--review", nargs=2, type=int, metavar=("A", "B"), help="compare two increments' review cost")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a path or placement")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; exit code 0, or 2 with one sentence."""
    options = parse(arguments)
    try:
        if options.review:
            return compare(options)
        from pipeline.recompute import recompute
        from pipeline.serving import open_served

        served = open_served(options.work_dir, options.increment, options.set)
        rows = recompute(served, options.task)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"evaluate: {error}", file=sys.stderr)
        return 2
    if served.job.world.is_main:
        print(f"increment {served.chain[0].increment}: test scores from the bank, and as recorded")
        for row in rows:
            recorded = "-" if row.recorded is None else f"{100 * row.recorded:.2f}"
            print(f"  {row.task:32s} {100 * row.score:6.2f}   {recorded:>6s}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """`--review A B`."""
    from pipeline.review import compare_reviews, render

    if not options.task:
        raise UserError("--review compares two increments on one task or more; name each with --task")
    for task in options.task:
        print(render(compare_reviews(options.work_dir, *options.review, task), *options.review))
    return 0


if __name__ == "__main__":
    sys.exit(watched(main))

"""The project's own measurements, written as JSON, a table and a picture.

python jobs/benchmark.py speed --backbone demo/backbone --data FOLDER --out speed.json --tasks yelp agnews
python jobs/benchmark.py scale --out scale.json
python jobs/benchmark.py quality --suite mtl5 --data FOLDER --backbone demo/backbone --out docs/results

FOLDER has one folder a task with {train,validation,test}.parquet (columns text and label). docs/SPEED.md,
docs/SCALE.md and docs/RESULTS.md say what is measured and how. Exit 0, 2 after a message on what to mend, 75 where
`quality` was stopped: the same command goes on.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.options import add_quality
from pipeline.benchmarks.scale.options import ScaleOptions
from pipeline.benchmarks.speed.options import CASES, SpeedOptions


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The benchmarks and their options; defaults are those of `SpeedOptions` and `ScaleOptions`."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = made.add_subparsers(dest="benchmark", required=True)
    add_scale(benchmarks.add_parser("scale", help="cost of an increment after a thousand others"))
    add_quality(benchmarks.add_parser("quality", help="methods against each other on benchmark streams"))
    speed = benchmarks.add_parser("speed", help="time against peers")
    speed.set_defaults(run=speed_benchmark)
    default = {field.name: field.default for field in fields(SpeedOptions)}
    add = speed.add_argument
    add("--backbone", required=True, metavar="B", help="folder of a dense backbone")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task")
    add("--out", required=True, metavar="F", type=Path, help="JSON report; a PNG of the same name stands beside it")
    add("--cases", nargs="+", default=CASES, metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    add("--tasks", nargs="+", default=(), metavar="TASK", help="tasks to train on; `step` and `startup` take the first")
    add("--label-task", metavar="TASK", help="task to score (default: the one with most labels)")
    add("--dtype", default=default["dtype"], choices=["bfloat16", "float32"], help="of backbone and LoRA")
    add("--deepspeed", default=default["deepspeed"], metavar="F", help="DeepSpeed file (default: ZeRO-2)")
    for name, text in (
        ("repeats", "timed rounds of every case"),
        ("warmup", "rounds, and steps of a trainer run, that are not counted"),
        ("steps", "counted steps of a trainer run"),
        ("batch_size", "rows of an optimizer step"),
        ("max_tokens", "of a row; longer texts are cut"),
        ("rank", "of the LoRA experts"),
        ("rows", "rows answered a round"),
        ("answer_tokens", "most tokens of a generated answer"),
        ("validation_rows", "synthetic rows that are validated"),
    ):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help=f"{text} (%(default)s)")
    return made


def add_scale(scale: argparse.ArgumentParser) -> None:
    """The options of `scale`."""
    scale.set_defaults(run=scale_benchmark)
    add, default = scale.add_argument, {field.name: field.default for field in fields(ScaleOptions)}
    add("--out", required=True, metavar="F", type=Path, help="JSON report; a PNG of the same name stands beside it")
    add("--work-dir", metavar="W", help="where the increments go, and stay (default: a temporary folder)")
    add("--no-mlflow", dest="mlflow", action="store_false", help="do not record the increments in MLflow")
    for name in ("increments", "earlier_tasks", "rows", "batch_size", "width", "layers", "rank"):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help="(%(default)s)")


def scale_benchmark(given: argparse.Namespace) -> int:
    """`scale`: measure, write, print."""
    options = ScaleOptions.of(vars(given))
    from pipeline.benchmarks.scale.report import as_table
    from pipeline.benchmarks.scale.run import run_scale

    print(as_table(run_scale(options, given.out)))
    print(f"\nwritten: {given.out} and {given.out.with_suffix('.png')}")
    return 0


def speed_benchmark(given: argparse.Namespace) -> int:
    """`speed`: measure, write, print."""
    options = SpeedOptions.of(vars(given))
    from pipeline.benchmarks.speed.report import as_table
    from pipeline.benchmarks.speed.run import run_speed  # the imports cost seconds: arguments come first

    print(as_table(run_speed(options, given.out)))
    print(f"\nwritten: {given.out} and {given.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

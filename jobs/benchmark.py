"""The project's own measurements, written as JSON, a table and a picture.

python jobs/benchmark.py speed --backbone demo/backbone --data FOLDER --out speed.json --tasks yelp agnews
python jobs/benchmark.py router --backbone demo/backbone --data FOLDER --out router.json --tasks dbpedia amazon

FOLDER has one folder a task with {train,validation,test}.parquet (columns text and label). docs/SPEED.md says what is
measured and how. Exit 0, or 2 after a message on what to mend.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from data_contracts.errors import UserError
from pipeline.benchmarks.router_options import add_router_arguments
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
    """The benchmarks and their options; defaults are those of `SpeedOptions`."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = made.add_subparsers(dest="benchmark", required=True)
    router = benchmarks.add_parser("router", help="how often the task router finds a text's task")
    router.set_defaults(run=router_benchmark)
    add_router_arguments(router)
    speed = benchmarks.add_parser("speed", help="time against peers")
    speed.set_defaults(run=speed_benchmark)
    default = {field.name: field.default for field in fields(SpeedOptions)}
    add = speed.add_argument
    add("--backbone", required=True, metavar="B", help="folder of a dense backbone")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task")
    add("--out", required=True, metavar="F", type=Path, help="JSON report; a PNG of the same name stands beside it")
    add("--cases", nargs="+", default=CASES, metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    add("--tasks", nargs="+", default=(), metavar="TASK", help="tasks to train on; `step` takes the first")
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


def speed_benchmark(given: argparse.Namespace) -> int:
    """`speed`: measure, write, print."""
    options = SpeedOptions.of(vars(given))
    from pipeline.benchmarks.speed.report import as_table
    from pipeline.benchmarks.speed.run import run_speed  # the imports cost seconds: arguments come first

    print(as_table(run_speed(options, given.out)))
    print(f"\nwritten: {given.out} and {given.out.with_suffix('.png')}")
    return 0


def router_benchmark(given: argparse.Namespace) -> int:
    """`router`: measure, write, print."""
    from pipeline.benchmarks.router import as_table, run_router

    print(as_table(run_router(given)))
    print(f"\nwritten: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

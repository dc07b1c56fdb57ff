"""The project's own measurements, written as JSON, a table and a picture.

python jobs/benchmark.py speed --backbone demo/backbone --data FOLDER --out speed.json --tasks yelp agnews
python jobs/benchmark.py scale --out scale.json
python jobs/benchmark.py router --backbone demo/backbone --data FOLDER --out router.json --tasks dbpedia amazon
python jobs/benchmark.py quality --suite mtl5 --data FOLDER --backbone demo/backbone --out docs/results

FOLDER has one folder a task with {train,validation,test}.parquet (columns text and label; for `quality` those that
docs/RESULTS.md names). docs/SPEED.md, docs/SCALE.md and docs/RESULTS.md say what is measured and how. Exit 0, 2 after a
message on what to mend; of `quality` also 1 where a cell failed, 75 where it was stopped: the same command goes on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from data_contracts.errors import UserError
from pipeline.benchmarks.quality import options as quality
from pipeline.benchmarks.router import options as router
from pipeline.benchmarks.scale import options as scale
from pipeline.benchmarks.speed import options as speed


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The benchmarks; each one's options are declared beside its options class."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = made.add_subparsers(dest="benchmark", required=True)
    for name, text, add_options, run in (
        ("speed", "time against peers", speed.add_options, speed_benchmark),
        ("scale", "cost of an increment after a thousand others", scale.add_options, scale_benchmark),
        ("router", "how often the task router finds a text's task", router.add_options, router_benchmark),
        ("quality", "methods against each other on benchmark streams", quality.add_options, quality_benchmark),
    ):
        benchmark = benchmarks.add_parser(name, help=text)
        benchmark.set_defaults(run=run)
        add_options(benchmark)
    return made


def speed_benchmark(given: argparse.Namespace) -> int:
    """`speed`: measure, write, print."""
    options = speed.SpeedOptions.of(vars(given))
    from pipeline.benchmarks.speed.report import as_table
    from pipeline.benchmarks.speed.run import run_speed  # the imports cost seconds: arguments come first

    print(as_table(run_speed(options, given.out)))
    print(f"\nwritten: {given.out} and {given.out.with_suffix('.png')}")
    return 0


def scale_benchmark(given: argparse.Namespace) -> int:
    """`scale`: measure, write, print."""
    options = scale.ScaleOptions.of(vars(given))
    from pipeline.benchmarks.scale.report import as_table
    from pipeline.benchmarks.scale.run import run_scale

    print(as_table(run_scale(options, given.out)))
    print(f"\nwritten: {given.out} and {given.out.with_suffix('.png')}")
    return 0


def router_benchmark(given: argparse.Namespace) -> int:
    """`router`: measure, write, print."""
    options = router.RouterOptions.of(vars(given))
    from pipeline.benchmarks.router.report import as_table
    from pipeline.benchmarks.router.run import run_router

    print(as_table(run_router(options, given.out)))
    print(f"\nwritten: {given.out}")
    return 0


def quality_benchmark(given: argparse.Namespace) -> int:
    """`quality`: run or continue, write, print."""
    options = quality.QualityOptions.of(vars(given))
    from pipeline.benchmarks.quality.command import run_command

    return run_command(options)


if __name__ == "__main__":
    sys.exit(main())

"""`jobs/benchmark.py quality`: run, choose or report, and print."""

from collections.abc import Callable

from pipeline.benchmarks.quality.launch import Stopped
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.report import as_table
from pipeline.benchmarks.quality.run import run_quality
from pipeline.training.stop import EXIT_STOPPED


def run_command(options: QualityOptions, say: Callable[[str], None] = print) -> int:
    """Do what the options ask for; returns the exit code."""
    try:
        records = run_quality(options, say)
    except (KeyboardInterrupt, Stopped):
        say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    say(as_table(records))
    return 0

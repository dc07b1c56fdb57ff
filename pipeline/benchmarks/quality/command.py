"""`jobs/benchmark.py quality`: run, choose or report, and print."""

from collections.abc import Callable
from pathlib import Path

from pipeline.benchmarks.quality import choose
from pipeline.benchmarks.quality.cells import rate_for, settings_of
from pipeline.benchmarks.quality.launch import Stopped
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.plots import draw_all
from pipeline.benchmarks.quality.report import as_markdown
from pipeline.benchmarks.quality.run import CellsFailed, Record, cells_of, run_quality
from pipeline.files import write_atomic
from pipeline.training.stop import EXIT_STOPPED


def run_command(options: QualityOptions, say: Callable[[str], None] = print) -> int:
    """Do what the options ask for; returns the exit code: 1 where a cell failed, 75 where it was stopped.

    The report holds every finished cell of this budget.
    """
    code = 0
    try:
        if options.choose:
            say("\n" + choose.as_table(choose.choose(options, say)))
            return 0
        if not options.report_only:
            run_quality(options, say)
    except CellsFailed as failed:
        code = 1
        say(str(failed))
    except (KeyboardInterrupt, Stopped):
        say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    text, files = write_report(options)
    say("\n" + text)
    say("written: " + ", ".join(map(str, files)))
    return code


def write_report(options: QualityOptions) -> tuple[str, list[Path]]:
    """<out>/<suite>.md and its pictures from the finished cells; the text and the files."""
    records = finished(options)
    text = as_markdown(options.suite, records, options.budget())
    path = Path(options.out) / f"{options.suite}.md"
    write_atomic(path, text.encode())
    return text, [path, *draw_all(records, path.with_suffix(""))]


def finished(options: QualityOptions) -> list[Record]:
    """Every finished cell of this budget and these seeds, of any method and order, as the settings stand now."""
    settings = settings_of()
    every = QualityOptions.of({**vars(options), "methods": (), "orders": ()})
    found = [record for cell in cells_of(every, settings, rate_for) if (record := cell.load()) is not None]
    place = {setting.name: number for number, setting in enumerate(settings)}
    return sorted(found, key=lambda record: place[record["setting"]])

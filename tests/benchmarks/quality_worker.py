"""`jobs/benchmark.py quality ...` with its launches inside this one process, which imports once.

Usage: quality_worker.py TRACE ARGUMENT...; the arguments of every launch are added to the file TRACE, a line each.
"""

import importlib
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from pipeline.benchmarks.quality import launch


def inside(cell, folder, arguments, say) -> None:
    """In place of `launch.launch`."""
    with open(sys.argv[1], "a", encoding="utf-8") as trace:
        trace.write(json.dumps([cell.setting.name, *map(str, arguments)]) + "\n")
    with open(folder / launch.LOG, "a", encoding="utf-8") as log, redirect_stdout(log):
        if arguments[0] == "--module":
            code = importlib.import_module(arguments[1]).main(arguments[2:])
        else:
            code = importlib.import_module(f"jobs.{Path(arguments[0]).stem}").main(arguments[1:])
    assert code == 0, (folder / launch.LOG).read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(launch.ROOT))
    launch.launch = inside
    sys.exit(importlib.import_module("jobs.benchmark").main(sys.argv[2:]))

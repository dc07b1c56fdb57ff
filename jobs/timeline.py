"""Where a run's time went: `python jobs/timeline.py WORK_DIR [--increment N] [--out timeline.png]`.

Prints seconds and shares of every rank and whom the others waited for, and draws all ranks in one picture. Spans of
hosts that do not share the work_dir are copied here first and named with --more.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError
from pipeline.files import write_atomic, writing
from pipeline.spans.picture import draw
from pipeline.spans.read import chrome_trace, folders_of, read_spans
from pipeline.spans.slowest import rank_times, report


def main(arguments: list[str] | None = None) -> int:
    """Print the report and write the picture; 0, or 2 after a message on what to mend."""
    parser = argparse.ArgumentParser(description="Where a run's time went, rank by rank.")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--increment", type=int, metavar="N", help="only this one")
    parser.add_argument("--more", type=Path, nargs="+", default=[], metavar="DIR", help="spans copied from other hosts")
    parser.add_argument("--out", type=Path, default=Path("timeline.png"), help="the picture (%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="F", help="a trace for chrome://tracing or ui.perfetto.dev")
    options = parser.parse_args(arguments)
    try:
        lines = read_spans(folders_of(options.work_dir, options.more), options.increment)
        print(report(rank_times(lines)))
        if any(line.get("device", "cpu") != "cpu" for line in lines):
            print("devices worked beside their hosts: collectives show the host's time, and waiting lies in `backward`")
        if dropped := sum(line.get("lines", 0) for line in lines if line["name"] == "dropped"):
            print(f"{dropped} lines were dropped while the disk did not take them")
        which = "all increments" if options.increment is None else f"increment {options.increment}"
        with writing(options.out):
            draw(lines, options.out, f"{options.work_dir.name}, {which}")
            if options.trace:
                write_atomic(options.trace, json.dumps(chrome_trace(lines)).encode())
        print(f"timeline     {options.out}")
    except UserError as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

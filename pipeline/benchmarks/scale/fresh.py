"""A second stream that begins with no task, in a process of its own, an increment at a time when it is asked for one.

Its first increments are measured by turns with the last ones of the long stream: what else the machine does falls on
both alike.

    python -m pipeline.benchmarks.scale.fresh FOLDER      (started by `FreshStream`; a line in, a sample out)
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.benchmarks.children import ROOT, child_environment
from pipeline.benchmarks.scale.options import ScaleOptions
from pipeline.benchmarks.scale.synthetic import Sample

_OPTIONS, _LOG = "options.json", "log.txt"
_END_SECONDS = 60.0


class FreshStream:
    """The asking side. Use as a context: the process is gone at its end."""

    def __init__(self, options: ScaleOptions, folder: Path) -> None:
        folder.mkdir(parents=True)
        _, last = options.windows["first"]
        own = asdict(replace(options, increments=max(3, last), work_dir=None))
        (folder / _OPTIONS).write_text(json.dumps(own), encoding="utf-8")
        self._log = folder / _LOG
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.benchmarks.scale.fresh", str(folder)],
                cwd=ROOT,
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def next(self) -> Sample:
        """The next increment is learned; what it took and left. Raises RuntimeError where the process failed."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said is told below
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the second stream ended with {self._process.wait(_END_SECONDS)}:\n{said[-4000:]}")
        return json.loads(line)

    def __enter__(self) -> "FreshStream":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._process.communicate(timeout=_END_SECONDS)  # its standard input ends
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()


def main(folder: Path) -> None:
    """Answer every line of the standard input with an increment's sample, as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    from pipeline.benchmarks.scale.run import increments  # after this, which its libraries' loggers print to

    options = ScaleOptions(**json.loads((folder / _OPTIONS).read_text(encoding="utf-8")))
    samples = increments(options, folder)
    for _ in sys.stdin:
        answers.write(json.dumps(next(samples)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

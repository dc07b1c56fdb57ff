"""Run one cell with the real command, in a work folder of its own from which a broken run goes on.

    <work-dir>/<suite>-<cell>/   data/ contracts/ stream.yaml   what the command reads
                                 work/                          its work_dir
                                 log.txt  launches.json         what it said, and how long each launch took

Only the last row of R is scored on all test rows. So the command is launched twice: up to the last task but one with
`rows.test` set to the smaller number, and then for the rest without it. A third launch (few_rows.py) scores the
smaller number of each task before it was learned and after the last.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_contracts.errors import UserError
from pipeline.benchmarks.children import ROOT, child_environment, launcher
from pipeline.benchmarks.quality.cells import Cell
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.suites import SUITES
from pipeline.files import write_atomic
from pipeline.training.stop import EXIT_STOPPED

WORK, LOG, LAUNCHES = "work", "log.txt", "launches.json"
FEW_ROWS_MODULE = "pipeline.benchmarks.quality.few_rows"
AHEAD, AGAIN = "ahead", "again"  # its folders in the work_dir
_POLL = 1.0  # seconds between two looks at a launch


class Stopped(Exception):
    """The benchmark was asked to stop; the running cell has saved its state."""


def work_folder(cell: Cell) -> Path:
    """Where the cell runs; the same place for the same cell."""
    root = cell.options.work_dir or Path(tempfile.gettempdir()) / f"perennial-quality-{os.getuid()}"
    return Path(root).resolve() / f"{cell.suite}-{cell.name}"


def write_inputs(cell: Cell, folder: Path) -> Path:
    """Write rows, contracts and the stream; returns the stream file. Writing them again changes nothing."""
    (folder / "contracts").mkdir(parents=True, exist_ok=True)
    paths = []
    for name, contract in cell.contracts().items():
        cell.samples[name].write(folder / "data")
        paths.append(folder / "contracts" / f"{contract['task']}.yaml")
        paths[-1].write_text(yaml.safe_dump(contract, sort_keys=False, allow_unicode=True), encoding="utf-8")
    options = cell.options
    stream = {
        "stream": cell.suite,
        "work_dir": str(folder / WORK),
        "data_roots": [str(folder / "data")],
        "backbone": {"path": str(Path(options.backbone).resolve()), "dtype": options.dtype},
        "tasks": [str(path) for path in paths],
        "method": cell.setting.method,
        "training": {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "micro_batch_size": options.batch_size // options.ranks,
            "learning_rate": cell.learning_rate,
        },
        "gate": {"max_regression": None},  # R is to show what is forgotten
        "deepspeed": str(Path(options.deepspeed).resolve()),
        "seed": cell.seed,
    }
    if cell.setting.router:
        stream["router"] = {}
    if (precision := SUITES[cell.suite].review) is not None:
        stream["evaluation"] = {"review": {"target_precision": precision}}
    (folder / "stream.yaml").write_text(yaml.safe_dump(stream, sort_keys=False), encoding="utf-8")
    return folder / "stream.yaml"


def run_cell(cell: Cell, folder: Path, say: Callable[[str], None]) -> None:
    """Learn the cell's stream, or what is left of it. Raises RuntimeError with the end of the log where it fails."""
    stream = write_inputs(cell, folder)
    job = [str(ROOT / "jobs" / "continual.py"), "--stream", str(stream)]
    names = [contract["task"] for contract in cell.contracts().values()]
    few = min(cell.options.test_rows_stream, cell.options.test_rows)
    if num_increments(folder) < len(names) - 1:
        launch(cell, folder, [*job, "--until", names[-2], "--set", f"rows.test={few}"], say)
    if num_increments(folder) < len(names):
        launch(cell, folder, job, say)
    if num_increments(folder) != len(names):
        found = f"{num_increments(folder)} of {len(names)} increments"
        raise RuntimeError(f"{cell.name} ended with {found}:\n{tail(folder)}")
    if len(names) > 1:
        launch(cell, folder, ["--module", FEW_ROWS_MODULE, str(folder / WORK), str(few)], say)


def launch(cell: Cell, folder: Path, arguments: list[str], say: Callable[[str], None]) -> None:
    """One launch of a script, or of a `--module`; tells of every increment as it comes."""
    ranks = cell.options.ranks
    if ranks > 1:
        command = launcher(ranks)
    else:
        command = [sys.executable]
        arguments = ["-m" if argument == "--module" else argument for argument in arguments]
    began = time.monotonic()
    with open(folder / LOG, "ab") as log:
        child = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment(cell.options),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _watch(child, folder, say)
        except BaseException:
            _stop(child)
            raise
        finally:
            _note(folder, time.monotonic() - began)
    if code == EXIT_STOPPED:
        raise Stopped(cell.name)
    if code == 2:
        raise UserError(f"{cell.name}: {tail(folder, lines=1)}")
    if code:
        raise RuntimeError(f"{cell.name} ended with {code}:\n{tail(folder)}")


def environment(options: QualityOptions) -> dict[str, str]:
    """The child's: this code, and threads."""
    return child_environment(OMP_NUM_THREADS=options.threads or max(1, (os.cpu_count() or 1) // options.ranks))


def num_increments(folder: Path) -> int:
    """Published increments of a cell."""
    return len(list((folder / WORK).glob("increments/*/manifest.json")))


def total_seconds(folder: Path) -> float:
    """Wall time of all launches of a cell, broken ones included."""
    path = folder / LAUNCHES
    return sum(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0.0


def tail(folder: Path, lines: int = 40) -> str:
    """The end of a cell's log."""
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace").rstrip()
    return "\n".join(text.splitlines()[-lines:])


def remove(folder: Path) -> None:
    """A finished cell's files."""
    shutil.rmtree(folder, ignore_errors=True)


def _watch(child: "subprocess.Popen[Any]", folder: Path, say: Callable[[str], None]) -> int:
    """Wait for a child; its exit code."""
    known = num_increments(folder)
    while True:
        try:
            code = child.wait(_POLL)
        except subprocess.TimeoutExpired:
            code = None
        if (now := num_increments(folder)) > known:
            newest = max(path.name for path in (folder / WORK / "increments").iterdir())
            say(f"  increment {newest}")
            known = now
        if code is not None:
            return code


def _stop(child: "subprocess.Popen[Any]") -> None:
    """Ask a child to save its state and end; end it where it does not."""
    for number, seconds in ((signal.SIGTERM, 300), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _note(folder: Path, seconds: float) -> None:
    path = folder / LAUNCHES
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    write_atomic(path, json.dumps([*before, round(seconds, 1)]).encode())

"""A launch of `jobs/continual.py` forked from this process, which has imported everything, struck on the way."""

import contextlib
import importlib
import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from tests.distributed.worlds import free_port
from tests.faults.watch import Fault, Watch, strike

LIMIT = 150  # seconds a launch may take
JOB = str(forked.ROOT / "jobs" / "continual.py")
IMPORTED = (
    *forked.IMPORTED,
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
    *("pipeline.evaluation.plots", "transformers.models.llama.modeling_llama"),
    "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe",
)


@dataclass(frozen=True)
class Outcome:
    """How a launch ended. `events` are the lines of each rank's log."""

    code: int | str  # what the process that forked the ranks exited with, or what happened to it
    struck: bool  # whether the fault came before the end
    seconds: float  # of the launch
    seconds_to_end: float  # from the fault to the end of the last rank
    left: list[int]  # ranks that had to be killed
    events: list[list[dict[str, Any]]]
    text: str  # what it wrote

    @property
    def point(self) -> dict[str, Any]:
        """Where the fault came; for one by the clock the last thing that rank 0 passed."""
        hits = [event for events in self.events for event in events if event.get("hit")]
        points = [event for event in self.events[0] if event["kind"] == "point"]
        return (hits or points[-1:] or [{"rank": 0, "increment": 0, "place": "importing", "nth": 0, "detail": ""}])[0]


def import_everything() -> None:
    """What a launch needs, once for all of them."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1", "GIT_PYTHON_REFRESH": "quiet"}
    sys.path.insert(0, str(forked.ROOT))
    for module in IMPORTED:
        importlib.import_module(module)


def launch(
    arguments: Sequence[object], ranks: int, work_dir: Path, folder: Path, fault: Fault | None = None
) -> Outcome:
    """Run the job on some ranks with a fault on the way; `folder` takes the logs. Nothing of it lives on."""
    folder.mkdir(parents=True)
    table = mmap.mmap(-1, 8 * ranks)  # process ids of the ranks, seen by all
    pids = lambda: [pid for (pid,) in struct.iter_unpack("q", table[:])]  # noqa: E731
    sys.stdout.flush()
    begin = time.monotonic()
    leader = os.fork()
    if leader == 0:
        lead(list(map(str, arguments)), ranks, work_dir, folder, fault, table, pids)
    struck_at = None
    status = None
    while status is None and time.monotonic() - begin < LIMIT:
        pid, found = os.waitpid(leader, os.WNOHANG)
        status = found if pid else None
        due = fault is not None and fault.seconds is not None and time.monotonic() - begin >= fault.seconds
        if due and struck_at is None and status is None and all(pids()):
            struck_at = time.monotonic()
            strike(fault.how, fault.rank, pids())
        time.sleep(0.005)
    end = time.monotonic()
    while running(pids()) and time.monotonic() - begin < LIMIT:
        time.sleep(0.005)
        end = time.monotonic()
    left = [rank for rank, pid in enumerate(pids()) if running([pid])]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    if status is None:
        os.waitpid(leader, 0)
    events = [read_events(folder / f"rank{rank}.jsonl") for rank in range(ranks)]
    hits = [event["at"] for rank in events for event in rank if event.get("hit")]
    struck_at = hits[0] if hits else struck_at
    code = "no end" if status is None else os.waitstatus_to_exitcode(status)
    since = end - struck_at if struck_at else 0.0
    text = (folder / "output").read_text(errors="replace")
    return Outcome(code, struck_at is not None, end - begin, since, left, events, text)


def lead(
    arguments: list[str],
    ranks: int,
    work_dir: Path,
    folder: Path,
    fault: Fault | None,
    table: mmap.mmap,
    pids: Callable[[], list[int]],
) -> None:
    """Be the launcher: a session of its own, the ranks below it. Does not return."""
    code = 1
    try:
        os.setsid()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)

        def first(rank: int) -> None:
            while not all(pids()):
                time.sleep(0.001)
            Watch(rank, work_dir, folder / f"rank{rank}.jsonl", fault, pids).install()

        children = forked.start(ranks, free_port(), JOB, arguments, first)
        for pid, rank in children.items():
            struct.pack_into("q", table, 8 * rank, pid)
        code = forked.wait_for(children)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def running(pids: Sequence[int]) -> bool:
    """Whether one of the processes still is at work."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if pid and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a rank's log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

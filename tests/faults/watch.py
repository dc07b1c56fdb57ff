"""What a rank of the fault harness passes, written down as it happens; at one chosen point it is killed, or asked to
stop.

Nothing of the product knows of this: in a rank's own process, after the fork, functions of the product are wrapped and
the operating system's calls are listened to. A point is named by rank, increment, place and how often the place was
passed in this launch.

    before X, after X   a stage, or another function that `EDGES` names
    step N, after step N    the N-th optimizer step of an increment, whichever launch does it
    R file              a call that makes, writes, syncs, renames or removes a file below the work_dir, inside `REGIONS`
                        (`state N`: the save after step N)
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

EDGES = {
    "pipeline.continual": (
        *("open_work_dir", "backbone_record", "prepare_tasks", "validate", "prepare", "open_tracker", "train"),
        *("learn_router", "evaluate", "gate", "register", "mark"),
    ),
}
REGIONS = {  # (module, name) of a function: what its file operations are called; the innermost one counts
    ("pipeline.stages.register", "publish"): "publish",
    ("pipeline.training.loop", "save_inflight"): "state",
    ("pipeline.experts.bank", "Bank.put"): "bank",
    ("pipeline.experts.bank", "Bank.put_stream"): "bank",
    ("pipeline.continual", "register"): "register",
    ("pipeline.continual", "validate"): "prepare",
    ("pipeline.continual", "prepare"): "prepare",
    ("pipeline.continual", "mark"): "marker",
}
_FILE_EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
How = Literal["rank", "ranks", "group", "stop"]


@dataclass(frozen=True)
class Point:
    """A moment in a launch: the `nth` time that a rank passes a place in an increment (0: before the first one)."""

    rank: int
    increment: int
    place: str
    nth: int


@dataclass(frozen=True)
class Fault:
    """SIGKILL to a rank, to all ranks or to the whole process group, or SIGTERM to a rank (`stop`).

    It comes at a point, or `seconds` after the launch began.
    """

    how: How
    point: Point | None = None
    seconds: float | None = None
    rank: int = 0  # whom a timed `rank` or `stop` hits


class Watch:
    """Writes a line for everything passed, with the time; `pids` gives the process ids of all ranks."""

    def __init__(self, rank: int, work_dir: Path, log: Path, fault: Fault | None, pids: Callable[[], Sequence[int]]):
        self.rank, self.work_dir, self.pids = rank, str(work_dir), pids
        self.fault = fault if fault and fault.point and fault.point.rank == rank else None
        self.increment = 0
        self._regions: list[str] = []
        self._passed: Counter[tuple[int, str]] = Counter()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._busy = False

    def install(self) -> None:
        """Wrap and listen, for the rest of this process."""
        for module, names in EDGES.items():
            for name in names:
                wrap(module, name, functools.partial(self._edge, name))
        for (module, name), region in REGIONS.items():
            wrap(module, name, functools.partial(self._region, region))
        wrap("pipeline.continual", "learn", self._learn)
        wrap("deepspeed.runtime.engine", "DeepSpeedEngine.step", self._step)
        wrap("pipeline.training.loop", "run_global_batch", self._batch)
        wrap("pipeline.training.loop", "forward", self._forward)
        wrap("pipeline.training.loop", "Progress", self._begins)
        wrap("pipeline.training.loop", "StepLog", self._logged)
        wrap("os", "fsync", self._fsync)
        sys.addaudithook(self._audit)

    def passes(self, place: str, detail: str = "") -> None:
        """Note that a place is passed, and strike if it is the chosen one."""
        self._passed[self.increment, place] += 1
        point = Point(self.rank, self.increment, place, self._passed[self.increment, place])
        hit = self.fault is not None and self.fault.point == point
        self.note("point", **asdict(point), detail=detail, hit=hit)
        if hit:
            strike(self.fault.how, self.rank, self.pids())

    def note(self, kind: str, **what: Any) -> None:
        """A line of the log; it survives SIGKILL."""
        os.write(self._log, (json.dumps({"kind": kind, "at": time.monotonic(), **what}) + "\n").encode())

    def _learn(self, call: Callable, *arguments: Any) -> Any:
        history = arguments[3]
        self.increment = history.length + 1
        self.passes("before learn")
        result = call(*arguments)
        self.passes("after learn")
        if self.rank == 0:
            champion = Path(self.work_dir, "champion.json").read_bytes()
            self.note("champion", increment=self.increment, sha256=sha256(champion).hexdigest())
        return result

    def _edge(self, name: str, call: Callable, *arguments: Any, **named: Any) -> Any:
        self.passes(f"before {name}")
        result = call(*arguments, **named)
        self.passes(f"after {name}")
        return result

    def _region(self, region: str, call: Callable, *arguments: Any, **named: Any) -> Any:
        self._regions.append(f"state {arguments[1].step}" if region == "state" else region)
        try:
            return call(*arguments, **named)
        finally:
            self._regions.pop()

    def _step(self, call: Callable, *arguments: Any, **named: Any) -> Any:
        self.passes(f"step {self._number}")
        result = call(*arguments, **named)
        self.passes(f"after step {self._number}")
        return result

    def _begins(self, call: Callable, title: str, total: int, *, start: int, **named: Any) -> Any:
        self.note("begins", title=title, step=start, total=total)
        return call(title, total, start=start, **named)

    def _batch(self, call: Callable, *arguments: Any) -> Any:
        self._rows, self._chosen, self._number = arguments[3], arguments[4], arguments[5] + 1
        return call(*arguments)

    def _forward(self, call: Callable, learner: Any, method: Any, batch: Any) -> Any:
        result = call(learner, method, batch)
        real = [place for place, weight in zip(batch.places, batch.row_weight.tolist(), strict=True) if weight]
        self.note("rows", step=batch.step, ids=self._rows.row_ids(self._chosen[real]) if real else [])
        return result

    def _logged(self, call: Callable, step: int, loss: float, *rest: Any) -> Any:
        self.note("loss", step=step, loss=loss)
        return call(step, loss, *rest)

    def _fsync(self, call: Callable, fd: int) -> None:
        self._file("os.fsync", os.readlink(f"/proc/self/fd/{fd}"))
        call(fd)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING:
                self._file(event, path)
        elif event in _FILE_EVENTS:
            inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # by rmtree, relative to a folder
            self._file(event, arguments[0], inside)

    def _file(self, event: str, path: Any, inside: bool = False) -> None:
        if self._busy or isinstance(path, int):
            return
        self._busy = True
        try:
            name = os.fsdecode(path)
            if inside or name.startswith(self.work_dir):
                main = threading.current_thread() is threading.main_thread()
                region = (self._regions[-1] if self._regions else "other") if main else "delivery"
                self.passes(f"{region} file", f"{event} {name.removeprefix(self.work_dir)}")
        finally:
            self._busy = False


def strike(how: How, rank: int, pids: Sequence[int]) -> None:
    """Kill, or ask to stop; of a whole group, this process too."""
    if how == "stop":
        os.kill(pids[rank], signal.SIGTERM)
    elif how == "group":
        os.killpg(os.getpgid(pids[rank]), signal.SIGKILL)
    else:
        others = [pid for number, pid in enumerate(pids) if number != rank] if how == "ranks" else []
        for pid in [*others, pids[rank]]:
            os.kill(pid, signal.SIGKILL)


def wrap(module: str, name: str, around: Callable) -> None:
    """Put `around(original, *arguments)` in the place of a function, or of a method `Class.method`."""
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    @functools.wraps(original, updated=())
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(owner, last, wrapped)

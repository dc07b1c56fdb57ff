"""What this rank spends its time on: spans by name, summed up step by step, written whole for some steps.

A line of `rank<N>.jsonl` is one JSON object with name, start (Unix time on rank 0's clock), seconds, rank, host,
increment and step (null outside of steps). Collectives are timed where DeepSpeed hands them to torch.
"""

import errno
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import SpansConfig
from pipeline.placement.clocks import offset_from_main
from pipeline.placement.distributed import World
from pipeline.spans.collectives import timed_collectives
from pipeline.spans.writer import LineWriter

FOLDER = "spans"
COLLECTIVES = ("gather", "all_to_all", "reduce", "wait")  # in which a rank may wait for the others
T = TypeVar("T")


class Recorder:
    """The spans of one rank."""

    def __init__(self, settings: SpansConfig, work_dir: Path, world: World) -> None:
        self._every = settings.every
        self._offset = offset_from_main(world)
        self._names = {"rank": world.rank, "host": socket.gethostname()}
        self.totals: dict[str, float] = {}  # seconds by name, since the start
        self.in_collectives = 0.0  # of them
        self.increment: int | None = None
        self.step: int | None = None
        self._detailed = False
        self._first_step = True
        self._before: tuple[float, float, dict[str, float]] = (0.0, 0.0, {})
        self.writer = LineWriter(lambda: folder_of(work_dir) / f"rank{world.rank:05d}.jsonl", settings.max_bytes)
        clock = {"offset": self._offset.seconds, "half_width": self._offset.half_width}
        self._write(
            "clock", time.time(), 0.0, pid=os.getpid(), world_size=world.size, device=world.device.type, **clock
        )

    @contextmanager
    def span(self, name: str, part: bool = False, **more: Any) -> Iterator[None]:
        """Time a block. A part of an increment is always written, with the sums of what lies in it."""
        begin, clock, inside = time.time(), time.perf_counter(), self.in_collectives
        before = dict(self.totals) if part else None
        try:
            yield
        finally:
            seconds = time.perf_counter() - clock
            self.add(name, begin, seconds, self.in_collectives - inside, before, **more)

    def add(
        self,
        name: str,
        begin: float,
        seconds: float,
        inside: float = 0.0,
        before: dict[str, float] | None = None,
        **more: Any,
    ) -> None:
        """A span that is over, `inside` seconds of it in collectives that are spans of their own."""
        if before is not None:
            more["sums"] = self._since(before)
        self.totals[name] = self.totals.get(name, 0.0) + seconds
        if name in COLLECTIVES:
            self.in_collectives += seconds
        if before is not None or (self._detailed and self.step is not None):
            if inside:
                more["own"] = round(seconds - inside, 6)
            self._write(name, begin, seconds, **more)

    def begin_step(self, number: int) -> None:
        """An optimizer step begins; the first of a launch and every so many are written span by span."""
        self.step = number
        self._detailed = self._first_step or number % self._every == 0
        self._first_step = False
        self._before = (time.time(), time.perf_counter(), dict(self.totals))

    def end_step(self) -> None:
        """The step is over: its sums are written."""
        begin, clock, before = self._before
        self._write("step", begin, time.perf_counter() - clock, sums=self._since(before), detailed=self._detailed)
        self.step = None

    def _since(self, before: dict[str, float]) -> dict[str, float]:
        return {name: round(s - b, 6) for name, s in self.totals.items() if s > (b := before.get(name, 0.0))}

    def _write(self, name: str, begin: float, seconds: float, **more: Any) -> None:
        start = round(begin - self._offset.seconds, 6)
        place = {"increment": self.increment, "step": self.step}
        self.writer.write({"name": name, "start": start, "seconds": round(seconds, 6), **self._names, **place, **more})


def folder_of(work_dir: Path) -> Path:
    """Where a rank's spans go: into the work_dir, or where its host has none, into a folder for temporary files.

    Raises OSError where the latter belongs to somebody else.
    """
    if work_dir.is_dir():
        return work_dir / FOLDER
    folder = local_folder(work_dir)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"{folder} belongs to somebody else; remove it, or set TMPDIR to your own")
    return folder


def local_folder(work_dir: Path) -> Path:
    """The user's folder on a host that does not share the work_dir, named after its path."""
    name = hashlib.sha256(str(work_dir).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"perennial-spans-{os.getuid()}-{name}"


_recorder: Recorder | None = None


@contextmanager
def recording(settings: SpansConfig, work_dir: Path, world: World) -> Iterator[None]:
    """Record the spans of a block, where the stream wants them. Collective."""
    global _recorder
    if not settings.enabled:
        yield
        return
    _recorder = Recorder(settings, work_dir, world)
    try:
        with timed_collectives(_recorder.add):
            yield
    finally:
        writer, _recorder = _recorder.writer, None
        writer.close()


@contextmanager
def span(name: str, part: bool = False, **more: Any) -> Iterator[None]:
    """Time a block of this rank's work (`Recorder.span`); without a recorder, nothing."""
    if _recorder is None:
        yield
        return
    with _recorder.span(name, part, **more):
        yield


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The same items; the time until each is there is a span."""
    iterator, end = iter(items), object()
    while True:
        with span(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def in_increment(number: int | None) -> None:
    """The spans to come belong to this increment."""
    if _recorder is not None:
        _recorder.increment = number


def begin_step(number: int) -> None:
    """An optimizer step begins."""
    if _recorder is not None:
        _recorder.begin_step(number)


def end_step() -> None:
    """The step is over."""
    if _recorder is not None:
        _recorder.end_step()

"""What the kernel says of processes (/proc): whether they live, what they spend, who started them."""

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "PERENNIAL_WATCH"  # in the environment of what a rank starts: the folder of its watchdog
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process, told from a later one with the same number by its start."""

    pid: int
    start: int  # clock ticks after the machine's start


@dataclass(frozen=True)
class Stat:
    """What a process is at and has spent."""

    process: Process
    parent: int
    state: str  # of its first thread: R runs, S sleeps, D disk, T stopped, Z ended and not yet reaped (proc(5))
    cpu: float  # seconds, of all threads and of children it has reaped

    @property
    def alive(self) -> bool:
        return self.state not in "ZXx"


def stat(pid: int) -> Stat | None:
    """A process by its number; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    cpu = sum(map(int, fields[11:15])) / _TICKS
    return Stat(Process(pid, int(fields[19])), int(fields[1]), fields[0], cpu)


def find(process: Process) -> Stat | None:
    """The same process, alive; None once it has ended."""
    found = stat(process.pid)
    return found if found is not None and found.process == process and found.alive else None


def transferred(pid: int) -> int:
    """Bytes a process has read and written so far, from files, pipes and disks; 0 where that is not told."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            lines = dict(line.split(": ") for line in file.read().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(lines.get(name, 0)) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def command(pid: int) -> list[str]:
    """The arguments a process was started with."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [part.decode(errors="replace") for part in file.read().split(b"\0")[:-1]]
    except OSError:
        return []


def descendants(roots: Iterable[Process]) -> dict[Process, list[Stat]]:
    """The living children, grandchildren and so on of each root."""
    children: dict[int, list[Stat]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := stat(int(name))) is not None and found.alive:
            children.setdefault(found.parent, []).append(found)
    below: dict[Process, list[Stat]] = {}
    for root in roots:
        below[root], waiting = [], [root.pid]
        while waiting:
            born = children.get(waiting.pop(), [])
            below[root] += born
            waiting += [child.process.pid for child in born]
    return below


def with_environment(entry: str) -> list[Process]:
    """The processes of this user that were started with `NAME=value` in their environment."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and entry.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found += [seen.process] if (seen := stat(int(name))) is not None else []
    return found


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL those that still live."""
    for process in processes:
        if find(process) is not None:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)


def launchers() -> list[tuple[Process, str]]:
    """Who started this rank and must outlive it, with names: the launcher's process of this host, and DeepSpeed's
    runner (on another host's end of it: the connection). Empty without a launcher.
    """
    if not {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys():
        return []
    parent = stat(os.getppid())
    if parent is None:
        return []
    by = [(parent.process, "the launcher of this host")]
    if "deepspeed.launcher.launch" in command(parent.process.pid) and parent.parent > 1:
        above = stat(parent.parent)
        by += [(above.process, "deepspeed")] if above is not None else []
    return by

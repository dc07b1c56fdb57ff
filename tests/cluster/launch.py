"""A launch of `jobs/continual.py` over hosts, its ranks forked from this process, which has imported everything.

What is forked enters a host's spaces as `nsenter` does, so that addresses, names, processes and temporary folders are
the host's. The launch as users give it, `deepspeed --hostfile`, is started by tests/cluster/ssh.py.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import forked
from tests.cluster.cluster import Cluster, Host
from tests.faults.launch import JOB

LIMIT = 240  # seconds a launch may take
PORT = 29500
_CLONE = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}


@dataclass(frozen=True)
class Strike:
    """What is done to a launch once `at` stands in the output of its first host."""

    name: str
    do: Callable[[Cluster], None]
    at: str


@dataclass
class End:
    """How a launch ended on one host."""

    code: int | str  # the exit code of the host's launcher, or what became of it
    text: str  # all it wrote
    seconds: float  # from the strike, or the beginning, to the end of the host's last process
    left: list[str] = field(default_factory=list)  # processes that did not end


def launch(
    cluster: Cluster,
    arguments: Sequence[object],
    folder: Path,
    *,
    hosts: Sequence[int] = (0, 1),
    per_host: int = 1,
    strike: Strike | None = None,
    limit: float = LIMIT,
) -> list[End]:
    """Run the job with `per_host` ranks on each of `hosts`; how it ended on each, in their order. `folder` takes the
    output. Nothing of it lives on.
    """
    folder.mkdir(parents=True)
    chosen = [cluster[number] for number in hosts]
    before = {host.name: set(host.processes()) for host in chosen}
    sys.stdout.flush()
    places = {"CROSS_SIZE": len(chosen), "MASTER_ADDR": chosen[0].address, "LOCAL_SIZE": per_host}
    leaders = [
        _start(host, number, per_host, len(chosen) * per_host, list(map(str, arguments)), places, folder / host.name)
        for number, host in enumerate(chosen)
    ]
    began = struck = time.monotonic()
    ends: dict[str, float] = {}
    codes: dict[str, int] = {}
    while len(ends) < len(chosen) and time.monotonic() - began < limit:
        time.sleep(0.02)
        if strike is not None and strike.at in _text(folder / chosen[0].name):
            strike.do(cluster)
            struck, strike = time.monotonic(), None
        for host, leader in zip(chosen, leaders, strict=True):
            if host.name not in codes and (ended := os.waitpid(leader, os.WNOHANG))[0]:
                codes[host.name] = os.waitstatus_to_exitcode(ended[1])
            if host.name in codes and host.name not in ends and not _running(host, before[host.name]):
                ends[host.name] = time.monotonic()
    results = []
    for host, leader in zip(chosen, leaders, strict=True):
        left = {} if host.name in ends else _running(host, before[host.name])
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if host.name not in codes:
            os.kill(leader, signal.SIGKILL)
            os.waitpid(leader, 0)
        code = codes.get(host.name, "no end")
        seconds = ends.get(host.name, time.monotonic()) - struck
        results.append(End(code, _text(folder / host.name), seconds, [" ".join(line)[:200] for line in left.values()]))
    return results


def enter(host: Host) -> None:
    """Put this process into a host's spaces; its later children are the host's own processes."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = {name: os.open(f"/proc/{host.init}/ns/{name}", os.O_RDONLY) for name in _CLONE}
    for name, file in files.items():
        if libc.setns(file, _CLONE[name]):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(file)


def _start(
    host: Host, number: int, per_host: int, size: int, arguments: list[str], places: dict[str, object], output: Path
) -> int:
    """Fork a host's launcher with its ranks; the process that waits for it, outside of the host."""
    if outside := os.fork():
        return outside
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        enter(host)
        if inside := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
        else:
            os.environ.update(host.environment())
            os.chdir(forked.ROOT)
            children = {}
            for local in range(per_host):
                rank = number * per_host + local
                if (pid := os.fork()) == 0:
                    own = places | {"LOCAL_RANK": local, "CROSS_RANK": number}
                    forked.be_rank(rank, size, PORT, JOB, arguments, elsewhere=own)
                children[pid] = rank
            code = forked.wait_for(children)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF if code >= 0 else 128 - code)


def _running(host: Host, before: set[int]) -> dict[int, list[str]]:
    """What runs on a host beside what ran there before; nothing on a host that is gone."""
    try:
        return {pid: line for pid, line in host.processes().items() if pid not in before}
    except OSError:
        return {}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""

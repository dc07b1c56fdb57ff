"""Launches of `jobs/continual.py` over the hosts of a cluster, and what becomes of them on each host.

`deepspeed`, `torchrun` and `srun` start it as users do; for `srun` the variables are set that SLURM sets. `forked`
saves the imports: ranks are forked from this process, which has imported everything, and enter a host's spaces.
"""

import contextlib
import ctypes
import json
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

LIMIT = 240  # seconds a launch may take
PORT = 29500
SCRIPT = "jobs/continual.py"
CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# ssh finds out by itself that the other host is gone, and `deepspeed` with it
ALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}
_CLONE = {"ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}


@dataclass(frozen=True)
class Strike:
    """What is done to a launch at the first moment when `now` says so; it is given what the first host wrote."""

    name: str
    do: Callable[[Cluster], None]
    now: Callable[[str], bool]


@dataclass
class End:
    """How a launch ended on one host."""

    code: int | str | None  # the exit code of the host's launcher, or what became of it; None: it has none
    text: str  # all it wrote
    seconds: float  # from the strike, or the beginning, to the end of the host's last process
    ranks: float  # the same to the end of its last rank, as far as ranks are told from launchers
    left: list[str] = field(default_factory=list)  # processes that did not end


def launch(
    cluster: Cluster,
    arguments: Sequence[object],
    folder: Path,
    *,
    hosts: Sequence[int] = (0, 1),
    per_host: int = 1,
    how: str = "forked",
    strike: Strike | None = None,
    limit: float = LIMIT,
    script: str = SCRIPT,
) -> list[End]:
    """Run a script of jobs/ with `per_host` ranks on each of `hosts`; how it ended on each, in their order. `folder`
    takes the output. Nothing of it lives on.
    """
    folder.mkdir(parents=True)
    chosen = [cluster[number] for number in hosts]
    before = {host.name: set(host.processes()) for host in chosen}
    sys.stdout.flush()
    leaders = _STARTERS[how](cluster, chosen, per_host, [script, *map(str, arguments)], folder)
    began = struck = time.monotonic()
    ends: dict[str, float] = {}
    seen: dict[str, float] = {}  # when a rank was last seen
    codes: dict[str, int] = {}
    while len(ends) < len(chosen) and time.monotonic() - began < limit:
        time.sleep(0.05)
        if strike is not None and strike.now(_text(folder / chosen[0].name)):
            strike.do(cluster)
            struck, strike = time.monotonic(), None
        for host in chosen:
            leader = leaders.get(host.name)
            if leader and host.name not in codes and (ended := os.waitpid(leader, os.WNOHANG))[0]:
                codes[host.name] = os.waitstatus_to_exitcode(ended[1])
            running = {} if host.name in ends else _running(host, before[host.name])
            if any(how == "forked" or "--local_rank=" in " ".join(line) for line in running.values()):
                seen[host.name] = time.monotonic()
            begun = host.name in codes or (not leader and len(codes) == len(leaders))
            if begun and host.name not in ends and not running:
                ends[host.name] = time.monotonic()
    results = []
    for host in chosen:
        left = {} if host.name in ends else _running(host, before[host.name])
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if host.name in leaders and host.name not in codes:
            os.kill(leaders[host.name], signal.SIGKILL)
            os.waitpid(leaders[host.name], 0)
        code = codes.get(host.name, "no end") if host.name in leaders else None
        seconds = ends.get(host.name, time.monotonic()) - struck
        ranks = max(0.0, seen.get(host.name, struck) - struck) if how in ("forked", "deepspeed") else seconds
        lines = [" ".join(line)[:200] for line in left.values()]
        results.append(End(code, _text(folder / host.name), seconds, ranks, lines))
    return results


def rank_process(host: Host, rank: int) -> int:
    """The process of a rank, as its host numbers it."""
    for file in (host.disk / "tmp").glob(f"perennial-watch-*/{rank}.state"):
        return json.loads(file.read_bytes()[1:])["process"][0]
    raise AssertionError(f"no rank {rank} on {host.name}")


def enter(host: Host) -> None:
    """Put this process into a host's spaces; its later children are the host's own processes."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = {name: os.open(f"/proc/{host.init}/ns/{name}", os.O_RDONLY) for name in _CLONE}
    for name, file in files.items():
        if libc.setns(file, _CLONE[name]):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(file)


def _forked(cluster: Cluster, hosts: list[Host], per_host: int, command: list[str], folder: Path) -> dict[str, int]:
    """Fork each host's launcher with its ranks."""
    size = len(hosts) * per_host
    places = {"CROSS_SIZE": len(hosts), "MASTER_ADDR": hosts[0].address, "LOCAL_SIZE": per_host}
    leaders = {}
    for number, host in enumerate(hosts):
        if outside := os.fork():
            leaders[host.name] = outside
            continue
        code = 1
        try:
            os.setsid()
            file = os.open(folder / host.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            enter(host)
            if inside := os.fork():
                code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
            else:
                code = _be_launcher(host, number, per_host, size, command, places)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code & 0xFF if code >= 0 else 128 - code)
    return leaders


def _be_launcher(host: Host, number: int, per_host: int, size: int, command: list[str], places: dict) -> int:
    """Fork a host's ranks and wait for them; the exit code."""
    os.environ.update(host.environment())
    os.chdir(forked.ROOT)
    children = {}
    for local in range(per_host):
        rank = number * per_host + local
        if (pid := os.fork()) == 0:
            own = places | {"LOCAL_RANK": local, "CROSS_RANK": number}
            forked.be_rank(rank, size, PORT, str(forked.ROOT / command[0]), command[1:], elsewhere=own)
        children[pid] = rank
    return forked.wait_for(children)


def _deepspeed(cluster: Cluster, hosts: list[Host], per_host: int, command: list[str], folder: Path) -> dict[str, int]:
    """As the platform engineer does: one command on the first host."""
    (hosts[0].disk / "home" / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in CPU.items()))
    hostfile = cluster.hostfile(per_host, hosts)
    return {hosts[0].name: _start(hosts[0], folder, ["deepspeed", "--hostfile", hostfile, *command], ALIVE)}


def _torchrun(cluster: Cluster, hosts: list[Host], per_host: int, command: list[str], folder: Path) -> dict[str, int]:
    """The same command on every host, but for the host's number."""
    leaders = {}
    for number, host in enumerate(hosts):
        started = ["torchrun", "--nnodes", len(hosts), "--nproc_per_node", per_host, "--node_rank", number]
        started += ["--master_addr", hosts[0].name, "--master_port", PORT, *command]
        leaders[host.name] = _start(host, folder, started, {})
    return leaders


def _srun(cluster: Cluster, hosts: list[Host], per_host: int, command: list[str], folder: Path) -> dict[str, int]:
    """One process a rank, with what SLURM says to each; one rank a host."""
    assert per_host == 1
    leaders = {}
    for number, host in enumerate(hosts):
        says = {"PROCID": number, "LOCALID": 0, "NODEID": number, "NTASKS": len(hosts), "NNODES": len(hosts)}
        says |= {"JOB_ID": 4711, "STEP_ID": 0, "STEP_NODELIST": f"node[1-{len(hosts)}]"}
        says |= {"STEP_TASKS_PER_NODE": f"1(x{len(hosts)})", "LAUNCH_NODE_IPADDR": "192.0.2.1"}
        variables = {f"SLURM_{name}": str(value) for name, value in says.items()}
        leaders[host.name] = _start(host, folder, ["python", *command], variables)
    return leaders


def _start(host: Host, folder: Path, command: Sequence[object], more: dict[str, str]) -> int:
    with open(folder / host.name, "wb") as file:
        return host.start(*command, environment=CPU | more, stdout=file, stderr=file).pid


_STARTERS = {"forked": _forked, "deepspeed": _deepspeed, "torchrun": _torchrun, "srun": _srun}


def _running(host: Host, before: set[int]) -> dict[int, list[str]]:
    """What runs on a host beside what ran there before, and sshd's end of a connection; nothing on one that is gone."""
    try:
        now = host.processes().items()
        return {pid: line for pid, line in now if pid not in before and not line[0].startswith("sshd:")}
    except OSError:
        return {}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""

"""Hosts as network namespaces of this machine, and ranks on them forked from one process that has imported everything.

    python -m tests.preflight.driver HOSTS FOLDER < launches > outcomes      (root and iproute2)

A launch is a line of JSON: {"ranks": [{"host": 0, "arguments": [...], "path": [...]}, ...],
"block": [[1, 2]]}; a rank with "host": null is never started. `block` has the first host answer the second no more,
"taken": true has a stranger listen at the port on host 0.
The outcome is a line of JSON: for every rank its exit code (null: not started), seconds and output.
"""

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import forked

NET = "10.78.0"
PREFIX = "pf"
PORT = 29500
LIMIT = 60.0  # seconds a launch may take
SCRIPT = str(forked.ROOT / "jobs" / "preflight.py")
IMPORTED = ("pipeline.preflight.run", "transformers.models.llama.modeling_llama")
IMPORTED += ("transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe",)
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


def ip(*arguments: str, check: bool = True) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def address(host: int) -> str:
    """Of a host."""
    return f"{NET}.{host + 1}"


class Cluster:
    """Namespaces pf<pid>n0, n1, ... on one bridge, which lies in a namespace of its own. Usable as a context."""

    def __init__(self, number: int) -> None:
        self.names = [f"{PREFIX}{os.getpid()}n{host}" for host in range(number)]
        self.switch = f"{PREFIX}{os.getpid()}s"

    def __enter__(self) -> "Cluster":
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for host, name in enumerate(self.names):
            port = ("peer", "name", f"p{host}", "netns", self.switch)
            ip("link", "add", "eth0", "netns", name, "type", "veth", *port)
            ip("-n", self.switch, "link", "set", f"p{host}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address(host)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.switch):
            ip("netns", "del", name, check=False)

    def block(self, host: int, other: int, how: str = "add") -> None:
        """What `other` sends `host` is answered no more: the way back ends in nothing."""
        ip("-n", self.names[host], "route", how, "blackhole", f"{address(other)}/32")

    def enter(self, host: int) -> None:
        """Be a process of that host: its network, its name."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{self.names[host]}", os.O_RDONLY)
        if libc.setns(fd, _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "the namespace cannot be entered")
        name = f"host{host}".encode()
        libc.sethostname(name, len(name))


def launch(cluster: Cluster, ranks: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Fork the ranks and wait for all of them; one that overruns `LIMIT` is killed."""
    begin = time.monotonic()
    places = [sum(other["host"] == rank["host"] for other in ranks[:number]) for number, rank in enumerate(ranks)]
    running: dict[int, int] = {}
    outcomes: list[dict[str, Any]] = [{"code": None, "seconds": 0.0, "output": ""} for _ in ranks]
    for number, rank in enumerate(ranks):
        if rank["host"] is None:
            continue
        if (pid := os.fork()) == 0:
            be_rank(cluster, number, len(ranks), places[number], rank, folder)
        running[pid] = number
    while running and time.monotonic() - begin < LIMIT:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            number = running.pop(pid)
            outcomes[number] |= {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}
        time.sleep(0.01)
    for pid, number in running.items():
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        outcomes[number] |= {"code": "no end", "seconds": time.monotonic() - begin}
    for number, outcome in enumerate(outcomes):
        if outcome["code"] is not None:
            outcome["output"] = (folder / str(number)).read_text(errors="replace")
    return outcomes


def be_rank(cluster: Cluster, number: int, size: int, local: int, rank: dict[str, Any], folder: Path) -> None:
    """Run the command as one rank; does not return."""
    code = 1
    try:
        output = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cluster.enter(rank["host"])
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        sys.path[:0] = rank.get("path", [])

        def place(_: int) -> None:
            os.environ.update({"MASTER_ADDR": address(0), "LOCAL_RANK": str(local), "LOCAL_SIZE": "1"})

        forked.be_rank(number, size, PORT, SCRIPT, rank["arguments"], place)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def listen(cluster: Cluster) -> None:
    """Be a stranger who holds the port on host 0, accepts and says nothing; does not return."""
    cluster.enter(0)
    server = socket.create_server((address(0), PORT))
    callers = []
    while True:
        callers.append(server.accept())


def main(number: int, folder: Path) -> None:
    """Serve launches until the input ends."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for module in IMPORTED:
        importlib.import_module(module)
    with Cluster(number) as cluster:
        print("ready", flush=True)
        for count, line in enumerate(sys.stdin):
            asked = json.loads(line)
            for pair in asked.get("block", []):
                cluster.block(*pair)
            place = folder / str(count)
            place.mkdir()
            stranger = os.fork() if asked.get("taken") else None
            if stranger == 0:
                listen(cluster)
            outcomes = launch(cluster, asked["ranks"], place)
            if stranger:
                os.kill(stranger, 9)
                os.waitpid(stranger, 0)
            for pair in asked.get("block", []):
                cluster.block(*pair, how="del")
            print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # taking the interpreter down takes seconds

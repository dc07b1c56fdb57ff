"""What is done to hosts on purpose: one of them holds something else than the others, or is lost in the midst of a run.

`watch.limit_seconds` is 10 in all of it.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from tests.cluster.cluster import ROOT, Cluster, Host, cluster
from tests.cluster.launch import Strike, launch, rank_process

if TYPE_CHECKING:
    from tests.cluster.driver import Runs

WATCH = ["--set", "watch.limit_seconds=10", "--set", "watch.grace_seconds=10"]
ALLOWED = 10.0  # seconds from a failure to the end of the last rank; the launchers' own end comes on top
# enough steps for something to happen among them
LONG_ENOUGH = ["--until", "first", "--set", "training.epochs=20", "--set", "training.save_every=1"]


def no_new_connections(made: Cluster) -> Strike:
    """Kill the sshd that listens on each host, once the ranks are at work."""

    def do(_: Cluster) -> None:
        for host in made.hosts:
            for pid in host.pids("sshd", "[listener]"):
                os.kill(pid, signal.SIGKILL)

    return Strike("sshd listener killed", do, lambda text: "== increment 1" in text)


def sshd_again(made: Cluster) -> None:
    """Start the sshd of each host anew."""
    for host in made.hosts:
        if not host.pids("sshd", "[listener]"):
            host.run("/usr/sbin/sshd", "-f", host.disk / "sshd_config")


# ---------------------------------------------------------------------------------------------------- hosts that differ


def other_backbone(host: Host) -> None:
    """The last byte of the weights is another."""
    path = host.disk / "tmp" / "inputs" / "dense" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_data(host: Host) -> None:
    """The training file of the second task is that of the first."""
    data = host.disk / "tmp" / "inputs" / "data"
    shutil.copy(data / "first" / "train.parquet", data / "second" / "train.parquet")


def other_contract(host: Host) -> None:
    """A contract says something else."""
    path = host.disk / "tmp" / "inputs" / "data" / "first.yaml"
    path.write_text(path.read_text().replace("Made by the test suite", "Made by somebody else"))


def no_backbone(host: Host) -> None:
    """It was never copied."""
    shutil.rmtree(host.disk / "tmp" / "inputs" / "dense")


def no_stream(host: Host) -> None:
    """The stream file was never copied."""
    (host.disk / "tmp" / "inputs" / "stream.yaml").unlink()


def other_library(host: Host) -> None:
    """Another version of a library is installed: for this host alone, another file lies over its metadata."""
    folder = Path(transformers.__file__).parents[1] / f"transformers-{transformers.__version__}.dist-info"
    _cover(
        host, folder / "METADATA", lambda text: text.replace(f"Version: {transformers.__version__}", "Version: 0.0.1")
    )


def other_code(host: Host) -> None:
    """One line of the product is another."""
    _cover(host, ROOT / "pipeline" / "training" / "schedule.py", lambda text: text + "# changed\n")


def _cover(host: Host, file: Path, change: Callable[[str], str]) -> None:
    changed = host.disk / f"{file.name}.changed"
    changed.write_text(change(file.read_text()))
    host.run("mount", "--bind", changed, file)


def uncover(host: Host) -> None:
    """Take away what lies over the files of others."""
    folder = Path(transformers.__file__).parents[1] / f"transformers-{transformers.__version__}.dist-info"
    for file in (folder / "METADATA", ROOT / "pipeline" / "training" / "schedule.py"):
        host.run("umount", file)


DIFFERENCES: dict[str, tuple[Callable[[Host], None], tuple[str, ...]]] = {
    "another data file": (other_data, ("host node2 differs from host node1", "second/train.parquet")),
    "no stream file": (no_stream, ("host node2: ", "stream.yaml")),
    "another backbone": (other_backbone, ("host node2 differs from host node1", "backbone.path", "sha256")),
    "another contract": (other_contract, ("host node2 differs from host node1", "contract of tasks[0]")),
    "another library": (other_library, ("host node2 differs from host node1", "transformers version (0.0.1, there")),
    "other code": (other_code, ("host node2 differs from host node1", "code of")),
    "no backbone": (no_backbone, ("host node2: ", "is not a folder with a config.json")),
}
SHORT_DIFFERENCES = 2


def differences(runs: "Runs") -> list[dict[str, Any]]:
    """Start with a second host that is not like the first: exit 2 on both, and one sentence that names it."""
    found = []
    for name, (change, words) in list(DIFFERENCES.items())[: SHORT_DIFFERENCES if runs.short else None]:
        arguments, work_dir = _own_copies(runs)
        change(runs.cluster[1])
        try:
            ends = launch(runs.cluster, [*arguments, *WATCH], runs.folder / f"differs-{len(found)}", limit=90)
        finally:
            uncover(runs.cluster[1])
        lines = [[line for line in end.text.splitlines() if line.startswith("continual:")] for end in ends]
        told = lines[0][0] if lines[0] else ""
        right = all(word in told for word in words) and lines[0] == lines[1] and len(lines[0]) == 1
        right = right and [end.code for end in ends] == [2, 2] and not (work_dir / "increments").exists()
        problem = "" if right else "\n".join(f"{end.code}: {end.text[-2000:]}" for end in ends)
        found.append({"name": name, "codes": [end.code for end in ends], "told": told, "problem": problem})
    return found


def _own_copies(runs: "Runs") -> tuple[list[object], Path]:
    """Give two hosts their own copies of everything, at the same place."""
    runs.number += 1
    work_dir = runs.cluster[0].disk / "tmp" / f"work-{runs.number}"
    for host in runs.cluster.hosts[:2]:
        inputs = host.disk / "tmp" / "inputs"
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir()
        for part in ("dense", "data"):
            shutil.copytree(runs.inputs.folder / part, inputs / part)
        stream = {
            "stream": "tiny",
            "work_dir": f"/tmp/{work_dir.name}",
            "data_roots": ["/tmp/inputs/data"],
            "backbone": {"path": "/tmp/inputs/dense", "dtype": "float32"},
            "tasks": ["/tmp/inputs/data/first.yaml", "/tmp/inputs/data/second.yaml"],
            "method": {"name": "moe_cl", "lora": {"rank": 3, "alpha": 6, "dropout": 0.0}},
            "training": {"batch_size": 8, "micro_batch_size": 4},
            "deepspeed": str(ROOT / "deepspeed_configs" / "zero3.json"),
        }
        (inputs / "stream.yaml").write_text(json.dumps(stream))
    return ["--stream", "/tmp/inputs/stream.yaml"], work_dir


# ------------------------------------------------------------------------------------------------- hosts that are lost


@dataclass(frozen=True)
class Failure:
    """Something that happens to a job of two hosts in its first increment, after a state was saved."""

    name: str
    do: Callable[[Cluster], None]
    named: str  # what is told on the hosts that are left
    left: tuple[int, ...] = (0, 1)  # hosts that the relaunch has
    storage: str = "shared"
    how: str = "deepspeed"
    stopped: bool = False  # it ends as on a request to stop


def _signal(number: int) -> Callable[[Cluster], None]:
    def do(made: Cluster) -> None:
        made[1].run("kill", f"-{number}", rank_process(made[1], 1))

    return do


def _cut(made: Cluster) -> None:
    made.link(1, up=False)


def _lose(number: int) -> Callable[[Cluster], None]:
    def do(made: Cluster) -> None:
        made.link(number, up=False)
        made[number].kill()

    return do


def _end_session(made: Cluster) -> None:
    """Kill the ssh on the first host that the ranks of the second one hang on."""
    for pid, line in made[0].processes().items():
        if line[0].endswith("ssh") and "node2" in line:
            os.kill(pid, signal.SIGKILL)


FAILURES = [
    Failure("host cut off", _cut, "host node2 (rank 1) is cut off or gone", (0,), "own", "forked"),
    Failure("rank killed", _signal(signal.SIGKILL), "rank 1 (host node2"),
    Failure("rank paused", _signal(signal.SIGSTOP), "was stopped (SIGSTOP)"),
    Failure("host cut off", _cut, "host node2 (rank 1) is cut off or gone", (0,)),
    Failure("host loses power", _lose(1), "host node2 (rank 1) is cut off or gone", (0,), "own"),
    Failure("ssh session killed", _end_session, "told by another host: deepspeed (host node2", stopped=True),
    Failure("rank 0's host loses power", _lose(0), "host node1 (rank 0) is cut off or gone", (1,), how="torchrun"),
]


def play(folder: Path, inputs: Path, short: bool, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Every failure on two hosts of its own, and the relaunch on those that are left."""
    from tests.cluster.driver import Runs

    found = []
    for number, failure in enumerate(FAILURES[:1] if short else FAILURES[1:]):
        if wanted(failure.name):
            place = folder / f"failure-{number}"
            with cluster(place / "cluster", 2) as made:
                found.append(_fail(Runs(made, place, inputs=inputs), failure))
    return found


def _fail(runs: "Runs", failure: Failure) -> dict[str, Any]:
    made, folder = runs.cluster, runs.folder
    arguments, work_dir = runs.stream("dense-fp32", 2, failure.storage)
    arguments += [*WATCH, *LONG_ENOUGH]
    state = work_dir / "inflight" / "state.safetensors"
    strike = Strike(failure.name, failure.do, lambda _: state.is_file())
    ends = launch(made, arguments, folder / "broken", how=failure.how, strike=strike)
    lost = [number for number in (0, 1) if number not in failure.left and "power" in failure.name]
    ranks = {made[n].name: round(end.ranks, 1) for n, end in enumerate(ends) if n not in lost}
    seconds = {made[n].name: round(end.seconds, 1) for n, end in enumerate(ends) if n not in lost}
    told = "".join(end.text for n, end in enumerate(ends) if n in failure.left)
    named = next((line for line in told.splitlines() if failure.named in line), "")
    again = launch(made, arguments, folder / "again", hosts=failure.left)
    run_json = next((work_dir / "increments").glob("*/run.json"), None)
    continued = json.loads(run_json.read_text())["continuations"] if run_json else 0
    codes = [end.code for end in ends if end.code is not None]
    kind = f"{failure.name} ({failure.how}, {failure.storage} work_dir)"
    result = {"name": kind, "code": codes[failure.left[0] if len(codes) > 1 else 0], "ranks": ranks, "seconds": seconds}
    result |= {
        "named": named[:160],
        "continued": f"on {len(failure.left)}: exit {again[0].code}, {continued} continuation",
    }
    problems = [line for n, end in enumerate(ends) if n not in lost for line in end.left]
    problems += ["it ended with 0"] * (0 in codes) + ["nobody was named"] * (not named)
    problems += [f"ranks ran on for {ranks} s"] * (max(ranks.values()) > ALLOWED)
    problems += [f"the relaunch: {end.text[-2000:]}" for end in again if end.code != 0]
    problems += ["the relaunch began anew"] * (continued != 1)
    result["problem"] = "\n".join(problems and [*problems, *(f"{end.code}: {end.text[-3000:]}" for end in ends)])
    sys.stdout.flush()
    return result

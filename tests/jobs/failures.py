"""Jobs on two ranks that are broken on purpose while they train, and what became of them."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.watch import processes
from tests.jobs.launch import Case, Running, started
from tests.jobs.many import digests

Act = Callable[[Running, list[int]], None]  # on a job and its ranks' process numbers
LIMIT, GRACE = 10.0, 20.0  # seconds


@dataclass(frozen=True)
class Kind:
    """A way to break a job."""

    name: str
    how: str  # of failing.py
    act: Act = lambda running, ranks: None  # at the third step
    named: str = ""  # what the one line of the watchdog must hold; "": it says nothing
    stops: bool = False  # it is a request to stop: state saved, a marker, 75 where the launcher passes it on


@dataclass(frozen=True)
class Outcome:
    """How a broken job ended."""

    kind: Kind
    work_dir: Path
    relaunch: Case  # the same command
    seconds: float  # from the act, or from the standstill, to the end of its last process
    code: int  # of the launcher
    said: list[str]  # the watchdog's lines
    marker: str  # what stopped.json says; "" without one
    left: list[str]  # processes that run ten seconds past the limit
    files: list[str]
    text: str


def break_job(kind: Kind, stream: Path, folder: Path, *, forked: bool = False, limit: float = LIMIT) -> Outcome:
    """Start the first increment of a stream on two ranks, break it, and see how it ends."""
    work_dir, temporary = folder / "work", folder / "tmp"
    temporary.mkdir(parents=True)
    settings = {"work_dir": work_dir, "watch.limit_seconds": limit, "watch.grace_seconds": GRACE}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ("--stream", stream, "--until", "first", *overrides)
    outside = {"TMPDIR": str(temporary)}
    with started("tests/jobs/failing.py", kind.how, *command, ranks=2, forked=forked, environment=outside) as running:
        running.wait_for("now\n")
        begin = time.monotonic()
        kind.act(running, rank_pids(temporary))
        code = running.process.wait(limit + GRACE + 60)
        left = ["not looked at"]
        while left and time.monotonic() < begin + limit + GRACE + 10:
            left = remaining(running.process.pid, temporary)
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        out, err = running.out.read_text(), running.err.read_text()
    marker = work_dir / "stopped.json"
    return Outcome(
        kind,
        work_dir,
        Case("continual", command, work_dir),
        seconds,
        code,
        re.findall(r"^watch: (.*)$", err, re.MULTILINE),
        json.loads(marker.read_text())["message"] if marker.is_file() else "",
        left,
        list(digests(work_dir)),
        f"exit {code}\n{out}\n{err}",
    )


def rank_pids(temporary: Path) -> list[int]:
    """The ranks' process numbers, by rank: from what they tell their watchdog."""
    states = sorted(temporary.glob("perennial-watch-*/*.state"))
    return [json.loads(path.read_bytes()[1:])["process"][0] for path in states]


def remaining(session: int, temporary: Path) -> list[str]:
    """The processes of a session, and the watchdog that met its ranks below a folder."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if not name.isdigit():
                continue
            command = processes.command(int(name))
            if os.getsid(int(name)) == session or any(str(temporary) in part for part in command):
                stat = processes.stat(int(name))
                found += [f"{name} {' '.join(command)}"] if stat is not None and stat.alive else []
    return found


def to_rank(rank: int, number: int) -> Act:
    """Signal a rank."""
    return lambda running, ranks: os.kill(ranks[rank], number)


def to_runner(number: int) -> Act:
    """Signal `deepspeed`."""
    return lambda running, ranks: os.kill(running.process.pid, number)


def to_launcher(number: int) -> Act:
    """Signal DeepSpeed's process of this host."""
    return lambda running, ranks: os.kill(processes.stat(ranks[0]).parent, number)


def to_group(number: int) -> Act:
    """Signal the whole process group, as a terminal or a scheduler does."""
    return lambda running, ranks: os.killpg(running.process.pid, number)


A_SLEEPING_RANK, A_KILLED_RUNNER = "a rank sleeps before a collective", "SIGKILL to deepspeed"
KINDS = (
    Kind("SIGKILL to a rank", "slow", to_rank(1, signal.SIGKILL), r"rank 1 \(host .* is gone"),
    Kind("SIGSTOP to a rank", "slow", to_rank(1, signal.SIGSTOP), r"rank 1 \(host .* was stopped"),
    Kind(A_SLEEPING_RANK, "asleep", named=r"rank 1 \(host .* at go_wrong"),
    Kind("a rank waits in a collective alone", "alone", named=r"rank 1 \(host .* at .*torch/distributed"),
    Kind("a rank holds its interpreter", "holding", named=r"rank 1 \(host .* gives no answer"),
    Kind(A_KILLED_RUNNER, "slow", to_runner(signal.SIGKILL), "deepspeed .* is gone", True),
    Kind("SIGTERM to deepspeed", "slow", to_runner(signal.SIGTERM), "deepspeed .* is gone", True),
    Kind("SIGKILL to the launcher of the host", "slow", to_launcher(signal.SIGKILL), "the launcher .* is gone", True),
    Kind("SIGTERM to the launcher of the host", "slow", to_launcher(signal.SIGTERM), "", True),
    Kind("SIGTERM to a rank", "slow", to_rank(1, signal.SIGTERM), "", True),
    Kind("SIGINT to a rank", "slow", to_rank(0, signal.SIGINT), "", True),
    Kind("SIGTERM to the process group", "slow", to_group(signal.SIGTERM), "(deepspeed .* is gone|$)", True),
    Kind("SIGINT to the process group", "slow", to_group(signal.SIGINT), "(deepspeed .* is gone|$)", True),
)


def published(files: Mapping[str, str]) -> dict[str, str]:
    """Of a work_dir's files and their digests, those that a repeated run writes again to the bit."""
    return {
        name: sha
        for name, sha in files.items()
        if name.startswith("bank/") or name == "champion.json" or re.fullmatch(r"increments/[^/]+/manifest.json", name)
    }


def table(outcomes: Sequence[Outcome], continued: Sequence[bool]) -> str:
    """The outcomes as a table of docs/RELIABILITY.md; `continued`: whether the relaunch ended as an unbroken run."""
    lines = [
        "| what happens | job's end after | exit code | stopped.json | named on stderr | processes left | continued |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome, same in zip(outcomes, continued, strict=True):
        named = re.match(r"rank \d+|deepspeed|the launcher", "".join(outcome.said))
        cells = [
            outcome.kind.name,
            f"{outcome.seconds:.1f} s",
            str(outcome.code),
            "yes" if outcome.marker else "no",
            named[0] if named else "-",
            str(len(outcome.left)),
            "same bits" if same else "NO",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["", *lines])

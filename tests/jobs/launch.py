"""Start the commands of jobs/ as a user starts them, and leave no process behind whatever happens."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds for one launch; it takes 20-60 on two quiet cores
_STARTED: set[subprocess.Popen] = set()  # what is not ended yet


@dataclass(frozen=True)
class Done:
    """A command that has ended. `files` are the digests below the watched folder (only from `run_many`)."""

    code: int
    stdout: str
    stderr: str
    files: dict[str, str] = field(default_factory=dict)
    others: tuple["Done", ...] = ()  # the same command on ranks 1, 2, ...

    @property
    def text(self) -> str:
        """All it wrote, for a failed assertion's message."""
        return f"exit {self.code}\n{self.stdout}\n{self.stderr}"


@dataclass(frozen=True)
class Case:
    """One command of `run_many`."""

    job: str
    arguments: Sequence[str]
    watch: Path | None = None


class Running:
    """A started command: its output so far, and its ranks by number."""

    def __init__(self, process: subprocess.Popen, out: Path, err: Path) -> None:
        self.process, self.out, self.err = process, out, err

    def wait_for(self, text: str, timeout: float = TIMEOUT) -> None:
        """Wait until `text` was printed. Fails when the command ends or the time runs out before."""
        self._until(lambda: text in self.out.read_text(), f"{text!r} was not printed", timeout)

    def rank_pid(self, rank: int) -> int:
        """Process id of a rank under the launcher."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                if os.getsid(int(folder.name)) == self.process.pid and f"--local_rank={rank}".encode() in arguments:
                    return int(folder.name)
        raise AssertionError(f"no rank {rank} is running\n{self.err.read_text()}")

    def finish(self, timeout: float = TIMEOUT) -> Done:
        """Wait for the end."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout} s\n{self.err.read_text()}\n{self.out.read_text()}") from None
        return Done(code, self.out.read_text(), self.err.read_text())

    def _until(self, condition: Callable[[], bool], failure: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{failure}\n{self.err.read_text()}\n{self.out.read_text()}")
            time.sleep(0.02)


@contextlib.contextmanager
def started(
    script: str,
    *arguments: object,
    ranks: int = 0,
    forked: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Running]:
    """Start a script with `deepspeed` on `ranks` ranks, or forked (tests/forked.py), or with plain python (0 ranks);
    afterwards its session is gone. `environment` comes on top of this process's.
    """
    launcher = [sys.executable]
    if ranks and forked:
        launcher += ["tests/forked.py", str(ranks), str(free_port())]
    elif ranks:
        launcher = [
            str(Path(sys.executable).with_name("deepspeed")),
            *("--num_accelerators", str(ranks), "--master_port", str(free_port())),
        ]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **inherited, **environment}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(
                [*launcher, script, *map(str, arguments)],
                **{"cwd": ROOT, "stdout": stdout, "stderr": stderr, "env": environment, "start_new_session": True},
            )
        _STARTED.add(process)
        try:
            yield Running(process, out, err)
        finally:
            end_session(process)
            _STARTED.discard(process)


def run(script: str, *arguments: object, ranks: int = 0, forked: bool = False, timeout: float = TIMEOUT) -> Done:
    """Start a command and wait for its end."""
    with started(script, *arguments, ranks=ranks, forked=forked) as running:
        return running.finish(timeout)


def run_many(cases: Sequence[Case], folder: Path, *, ranks: int = 0, timeout: float = TIMEOUT) -> list[Done]:
    """Run commands one after another in one process a rank (tests/jobs/many.py), the ranks forked; `folder` takes what
    they leave.
    """
    folder.mkdir(parents=True)
    listed = [
        {"job": case.job, "arguments": list(map(str, case.arguments)), "watch": case.watch and str(case.watch)}
        for case in cases
    ]
    (folder / "cases.json").write_text(json.dumps(listed))
    launch = run("tests/jobs/many.py", folder / "cases.json", folder, ranks=ranks, forked=True, timeout=timeout)
    results = []
    for number in range(len(cases)):
        files = [folder / f"{number}.{rank}.json" for rank in range(max(1, ranks))]
        assert all(file.is_file() for file in files), f"case {number} did not end\n{launch.text}"
        done = [Done(**json.loads(file.read_text())) for file in files]
        results.append(Done(done[0].code, done[0].stdout, done[0].stderr, done[0].files, tuple(done[1:])))
    assert launch.code == results[-1].code, launch.text  # a rank's exit code is passed on
    return results


def free_port() -> int:
    """A port nobody listens on: several launches may share the machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_session(process: subprocess.Popen) -> None:
    """Kill what is left of the session a process was started as the leader of."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_everything() -> None:
    """Kill whatever is still running: the tests were interrupted."""
    for process in list(_STARTED):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

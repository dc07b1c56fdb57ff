"""What a rank tells the watchdog of its host, and what it does at the watchdog's word.

The ranks of a host meet in a folder for temporary files, named after their launcher's process:

    <rank>.state   one byte that is "1" once the rank was asked to stop, then JSON: who it is and what it is doing
    <rank>.ask     a pipe of requests: s (say where you are), t (stop at the next step), x (leave now, with 75)
    <rank>.stack   the answer to s
    lock           held by the watchdog, which the first rank starts
    link, port     on a job of several hosts: how its watchdogs find each other (link.py)

A report comes from the main thread alone, at every step and every batch: a rank whose main thread stands still is
silent. The requests are served by a thread, which also works while the main thread waits in a collective.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat as modes
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipeline.hosts import launcher
from pipeline.watch import processes
from pipeline.watch.judge import EXIT_STOPPED

LIMIT_SECONDS, GRACE_SECONDS = 60.0, 30.0  # until the configuration is read
STATE_BYTES = 2048
_WATCHDOG = Path(__file__).with_name("watchdog.py")
# where a rank without work waits for others: the innermost Python frame of some thread lies in one of these. DeepSpeed
# and autograd wait for collectives at many places of theirs
_COLLECTIVES = ("/torch/", "/deepspeed/", "/pipeline/spans/collectives.py")
# where it waits for a server, MLflow's or a remote store's, with a time limit of its own
_BOUNDED = ("/pipeline/tracking/courier.py", "/fsspec/")


class Unwatchable(Exception):
    """The ranks of this host cannot meet; the message names the remedy."""


class Stoppable(Protocol):
    """What is told that the job is to stop."""

    def request(self) -> None:
        """Stop at the next step; called from another thread than the main one."""

    def leave(self, doing: str) -> None:
        """The process ends now, with exit code 75, since the next step took too long; `doing` says what."""


class WatchedRank:
    """This process as the watchdog sees it."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.stopping: Stoppable | None = None
        self._main = threading.get_ident()
        self._file = -1
        environment = os.environ
        own = processes.stat(os.getpid())
        launcher.map_slurm(environment)
        self.rank = int(environment.get("RANK") or 0)
        size = int(environment.get("WORLD_SIZE") or 1)
        self._says = {
            "rank": self.rank,
            "world_size": size,
            "local_size": int(environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or 1),
            "host": self.host,
            "process": [own.process.pid, own.process.start],
            "launchers": [[by.pid, by.start, name] for by, name in processes.launchers()],
            "limit": LIMIT_SECONDS,
            "grace": GRACE_SECONDS,
            "configured": False,
            "doing": "starting",
            "reports": 0,
            "ended": None,  # the exit code, when the command is through
        }
        self.folder = self._enter()
        os.environ[processes.MARK] = str(self.folder)  # by this the watchdog knows whom this rank has started

    def report(self, doing: str | None = None) -> None:
        """Say that the work advances, and at what (None: at the same). Of other threads than the main one: nothing."""
        if threading.get_ident() == self._main:
            self._says["reports"] += 1
            self._say(doing=self._says["doing"] if doing is None else doing)

    def limits(self, limit_seconds: float | None, grace_seconds: float) -> None:
        """Set the watchdog's limits."""
        self._say(limit=limit_seconds, grace=grace_seconds, configured=True)

    def asked(self) -> None:
        """Say that this rank was asked to stop."""
        os.pwrite(self._file, b"1", 0)

    def end(self, code: int) -> None:
        """Say that the command is through: a process that stays on after it is not at work any more."""
        self._say(ended=code)

    def _enter(self) -> Path:
        """Join the folder of this host's ranks, and start the watchdog if there is none."""
        key = self._says["launchers"][0][:2] if self._says["launchers"] else self._says["process"]
        key = [os.getuid(), *key, os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)]
        folder = Path(tempfile.gettempdir()) / "-".join(map(str, ["perennial-watch", *key]))
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not modes.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise Unwatchable(f"{folder} belongs to somebody else; remove it, or set TMPDIR to your own")
            self._file = os.open(folder / f"{self.rank}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.pwrite(self._file, b"0", 0)
            self._say()
            ask = folder / f"{self.rank}.ask"
            ask.unlink(missing_ok=True)
            os.mkfifo(ask, 0o600)
            os.replace(folder / f"{self.rank}.new", folder / f"{self.rank}.state")
            self._start_watchdog(folder)
        except OSError as error:
            raise Unwatchable(
                f"{error.filename or folder}: cannot be used ({error.strerror}); set TMPDIR to a folder of this host "
                "that can be written"
            ) from error
        requests = os.open(ask, os.O_RDWR | os.O_CLOEXEC)  # also for writing: reading never meets an end
        threading.Thread(target=self._serve, args=(requests, folder), name="watch", daemon=True).start()
        return folder

    def _start_watchdog(self, folder: Path) -> None:
        """Start one that outlives its starter and takes the lock along; nothing where there is one already."""
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-I", "-S", str(_WATCHDOG), str(folder)]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
            subprocess.run(command, pass_fds=(lock,), check=True, **quiet)  # it forks, and this half ends at once
        except BlockingIOError:
            pass
        finally:
            os.close(lock)

    def _say(self, **news: object) -> None:
        self._says |= news
        text = json.dumps(self._says | {"doing": str(self._says["doing"])[:300]})
        os.pwrite(self._file, text.encode().ljust(STATE_BYTES - 1), 1)

    def _serve(self, requests: int, folder: Path) -> None:
        while True:
            request = os.read(requests, 1)
            if request == b"s":
                beside = folder / f"{self.rank}.said"
                beside.write_text(json.dumps(where(self._main)))
                os.replace(beside, folder / f"{self.rank}.stack")
            elif request == b"t" and self.stopping is not None:
                self.stopping.request()
            elif request == b"x" and self._says["ended"] is None:
                self._leave()

    def _leave(self) -> None:
        try:
            if self.stopping is not None:
                self.stopping.leave(self._says["doing"])
        finally:
            self.end(EXIT_STOPPED)
            _leave_now(EXIT_STOPPED)


def where(main: int) -> dict[str, str]:
    """Where this process is: `at`, the main thread's place in words, and `waits`: "ranks" in a collective of whatever
    thread, "bounded" where something else will end the waiting, else "".
    """
    stacks = {number: _files(frame) for number, frame in sys._current_frames().items() if _is_work(number)}
    waits = ""
    if any(part in stack[0][0] for stack in stacks.values() for part in _COLLECTIVES):
        waits = "ranks"
    elif any(part in file for file, _ in stacks.get(main, [])[:4] for part in _BOUNDED):
        waits = "bounded"
    stack = stacks.get(main) or [("", "")]
    own = next((place for file, place in stack if "/pipeline/" in file and place != stack[0][1]), None)
    return {"waits": waits, "at": stack[0][1] + (f", for {own}" if own else "")}


def _files(frame) -> list[tuple[str, str]]:
    """(file, place in words) of a thread's frames, innermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        short = "/".join(Path(code.co_filename).parts[-3:])
        found.append((code.co_filename, f"{code.co_name} ({short}:{frame.f_lineno})"))
        frame = frame.f_back
    return found


def _is_work(thread: int) -> bool:
    return thread != threading.get_ident()


_watched: WatchedRank | None = None


def watched(command: Callable[[], int]) -> int:
    """Run a job's command under the eyes of its host's watchdog; 0, or the end of the process with
    another exit code. Where the kernel has no /proc, the command runs unwatched.
    """
    global _watched
    if processes.stat(os.getpid()) is None:
        return command()
    try:
        _watched = WatchedRank()
    except Unwatchable as error:
        print(f"watch: {error}", file=sys.stderr)
        return 2
    code = 1
    try:
        code = command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        _watched.end(code)
    if code:
        # all is saved and said: no seconds for taking the interpreter down, in which the launcher's next signal to this
        # rank would change its exit code
        _leave_now(code)
    return code


def _leave_now(code: int) -> None:
    """End this process at once."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_watched() -> bool:
    """Whether this process has a watchdog, which sees to it that a stop comes to its end."""
    return _watched is not None


def report(doing: str | None = None) -> None:
    """Say that the work advances, and at what (None: at the same as before). Costs microseconds."""
    if _watched is not None:
        _watched.report(doing)


def set_limits(limit_seconds: float | None, grace_seconds: float) -> None:
    """Seconds after which a job that stands still is ended (None: never), and that a stop may take."""
    if _watched is not None:
        _watched.limits(limit_seconds, grace_seconds)


def follow(stopping: Stoppable) -> None:
    """Have `stopping` told when this host's watchdog wants the job to stop."""
    if _watched is not None:
        _watched.stopping = stopping


def join_watchdogs(record: dict) -> None:
    """Tell this host's watchdog of the others (`link.Link` says how)."""
    if _watched is not None:
        beside = _watched.folder / "link.new"
        beside.write_text(json.dumps(record))  # the folder is this user's alone
        os.replace(beside, _watched.folder / "link")


def link_port(seconds: float = 10.0) -> int | None:
    """The port at which this host's watchdog, told to by `join_watchdogs`, waits for the others; None where it does
    not come to that.
    """
    end = time.monotonic() + seconds
    while _watched is not None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            return int((_watched.folder / "port").read_text())
        time.sleep(0.05)
    return None


def report_stop() -> None:
    """Say that this rank was asked to stop; fit for a signal handler."""
    if _watched is not None:
        _watched.asked()

"""One writer at a time: the lock that a job which writes into a work_dir holds for its whole run.

    <work_dir>/lock.json   {"host", "machine", "pid", "since", "command"} of the holder; gone when nobody holds it

The file is locked with flock, which the operating system lets go when the holder ends, however it ends: a lock file
that a killed job of this machine left over is taken over without asking. flock cannot speak for another machine on
every shared file system, so a file left by another one is refused until `--break-lock` says that its job is gone.
Jobs that only read need no lock.
"""

import fcntl
import getpass
import json
import os
import shlex
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from data_contracts.credentials import shown
from data_contracts.errors import UserError
from pipeline.files import canonical_json, storage_error

LOCK = "lock.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine, new at every start


class WorkLock:
    """The lock of one work_dir; rank 0 alone takes it. Usable as a context."""

    def __init__(self, work_dir: Path | str, command: list[str] | None = None) -> None:
        self.path = Path(work_dir) / LOCK
        self.command = shown(shlex.join(sys.argv if command is None else command))
        self._fd: int | None = None

    def acquire(self, break_lock: bool = False) -> "WorkLock":
        """Take the lock. Raises UserError that names the holder where there is one, or cannot be ruled out.

        `break_lock` takes over what a job of another machine left; a lock that is held on this one is never broken.
        """
        while self._fd is None:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise storage_error(error, self.path) from error
            try:
                self._take(fd, break_lock)
            except BaseException:
                os.close(fd)
                raise
        return self

    def release(self) -> None:
        """Let the lock go; without one, nothing."""
        if self._fd is None:
            return
        try:
            self.path.unlink(missing_ok=True)  # before it is free: nobody else can hold this file now
        except OSError:
            pass  # a file left over on this machine is taken over by the next job
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> "WorkLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _take(self, fd: int, break_lock: bool) -> None:
        """Lock an open file and write the holder into it; sets nothing where the file was replaced meanwhile."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path.parent}: another job is at work there ({told(_holder(fd))}); wait for its end or stop it"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: this file system has no locks ({error.strerror}); name a work_dir on one that has"
            ) from error
        try:
            if os.stat(self.path).st_ino != os.fstat(fd).st_ino:
                raise FileNotFoundError
        except FileNotFoundError:  # its holder ended between our opening and locking it, and took the file along
            os.close(fd)
            return
        left = _holder(fd)
        if left and not _of_this_machine(left) and not break_lock:
            raise UserError(
                f"{self.path.parent}: a job of another machine held it and did not let it go ({told(left)}); if that "
                "job is gone, run again with --break-lock"
            )
        holder = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "command": self.command}
        holder["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, canonical_json(holder).encode(), 0)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._fd = fd


def user_name() -> str:
    """Who runs this process: the name, or the number where a container's user has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def told(holder: dict) -> str:
    """A holder in words."""
    if not holder:
        return "it has not said yet who it is"
    return (
        f"host {holder.get('host')}, process {holder.get('pid')}, since {holder.get('since')}: {holder.get('command')}"
    )


def _holder(fd: int) -> dict:
    """What a lock file says; empty where it says nothing readable."""
    try:
        read = json.loads(os.pread(fd, 65536, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _of_this_machine(holder: dict) -> bool:
    return holder.get("host") == socket.gethostname() or (bool(_machine()) and holder.get("machine") == _machine())


def _machine() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""

"""Digests and atomic files: the few primitives that everything published on disk rests on."""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_contracts.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values always give the same text. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of `text` in UTF-8."""
    return sha256_bytes(text.encode("utf-8"))


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_durable(folder: Path) -> None:
    """fsync every file and folder below `folder`, and its parent."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        if path.is_dir():
            fsync_dir(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class FileBeside:
    """A file that is written beside `path`, to take its place."""

    def __init__(self, path: Path, temporary: Path, file: BinaryIO) -> None:
        self.path = path
        self.temporary = temporary
        self.file = file
        self.taken = False

    def take_place(self, durable: bool = True) -> None:
        """Close the file and give it the name `path`: a kill at any moment leaves the old or the new there, whole.

        Not `durable`: whoever calls sees to it that a power failure does not take it back (`make_durable`).
        """
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        self.taken = True
        if durable:
            fsync_dir(self.path.parent)


@contextmanager
def file_beside(path: Path | str) -> Iterator[FileBeside]:
    """A file beside `path`, of which nothing is left after the block unless it has taken its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        beside = FileBeside(path, temporary, file)
        try:
            yield beside
        finally:
            if not beside.taken:
                with suppress(OSError):  # the first error is the one to tell
                    temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path | str, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end of the block (`FileBeside.take_place`); nothing is
    left of it when the block raises.
    """
    with file_beside(path) as beside:
        yield beside.file
        beside.take_place(durable)


def start_writing(file: BinaryIO) -> None:
    """Have the kernel begin to write what `file` holds so far, without waiting: a later fsync then finds little left.

    Where the system has no such call, that fsync does it all.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def date_apart(file: Path | int) -> int | None:
    """Give a file, by path or descriptor, a time of modification in ns that no change before or after it has: the
    system may date two changes in a row alike. None where it refuses, as for somebody else's file.
    """
    now = time.time_ns()
    try:
        os.utime(file, ns=(now, now))
    except OSError:
        return None
    return now


def seed_of(text: str) -> int:
    """A random generator's seed from what is drawn for, the same on every machine: below 2^60."""
    return int(sha256_text(text)[:15], 16)


def write_atomic(path: Path | str, data: bytes, durable: bool = True) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path, durable) as file:
        file.write(data)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raise what the operating system refuses inside the block as a UserError with the remedy, naming the file or,
    where the system names none, `path`.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path | str | None = None) -> UserError:
    """A full disk, a read-only folder or a failing device as one sentence."""
    where = error.filename or path or "the disk"
    if error.errno in _FULL:
        remedy = "free some space there or name a place on another disk"
    elif error.errno in _CLOSED:
        remedy = "make it writable or name another folder"
    else:
        remedy = "check the path and the disk"
    return UserError(
        f"{where}: {error.strerror or error}; {remedy}, then run the same command again (what was published stands)"
    )

"""The running increment on disk: one world-size-free file, written beside and renamed, removed at publish.

The file belongs to exactly one set of inputs (its key); a state of other inputs is never continued. It carries its own
sha256, taken with zeros where the digest stands: a state whose bytes are not those that were written is refused.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_contracts.errors import UserError
from pipeline.files import canonical_json, fsync_dir, writing
from pipeline.placement.state import MOMENTS
from pipeline.tensor_files import METADATA_KEY, TensorFile, write_tensors

_FILE = "state.safetensors"
_NO_DIGEST = "0" * 64
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_BLOCK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True)
class Progressed:
    """How far an increment has come: its inputs' key, steps done, how often it was continued, rows consumed."""

    key: str
    step: int
    continuations: int
    rows: int = 0  # of the global batches of these steps, counted as they were learned


def save_inflight(
    folder: Path, done: Progressed, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Replace the in-flight file, atomically; the tensors are those of `placement.state.stream_state`.

    Raises UserError where the disk refuses; the old file then stands.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_FILE}.{secrets.token_hex(4)}.tmp"
        try:
            note = canonical_json(asdict(done) | {"sha256": _NO_DIGEST})
            _seal(temporary, write_tensors(temporary, shapes, tensors, note))
            os.replace(temporary, folder / _FILE)
        finally:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
        fsync_dir(folder)


def load_inflight(folder: Path, key: str) -> Progressed | None:
    """How far the inputs `key` have come; None where there is no state, or one of other inputs.

    All bytes are read and hashed. Raises UserError, changing nothing, for a file that is not what was written.
    """
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        note, found = _read(path)
        written = note.pop("sha256")
        done = Progressed(**note)
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refused(path, "is no in-flight state of this version") from error
    if found != written:
        raise _refused(path, "was altered since it was written")
    return done if done.key == key else None


def open_inflight(
    folder: Path, read_here: Callable[[Path], Path] = lambda path: path
) -> tuple[TensorFile, dict[str, TensorFile]]:
    """The saved values, and the saved moments by name, for reading by slices; `load_inflight` has checked the bytes."""
    file = TensorFile(read_here(folder / _FILE))
    return file.below("value/"), {moment: file.below(f"{moment}/") for moment in MOMENTS}


def remove_published(folder: Path, key: str) -> None:
    """Remove the folder where its state is that of the inputs `key`, whose increment was published since, or where it
    holds no state at all: a job died while it removed it. Raises UserError as `load_inflight` does.
    """
    if folder.is_dir() and (not (folder / _FILE).is_file() or load_inflight(folder, key) is not None):
        shutil.rmtree(folder, ignore_errors=True)


def _seal(path: Path, digest: str) -> None:
    """Put the digest of a file into its place in the header, durably."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(_NO_DIGEST.encode()))
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The note in a file's header, and the file's sha256 with zeros in the place of the digest that the note has."""
    with open(path, "rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        if length > _LONGEST_HEADER:
            raise ValueError("the header is longer than the format allows")
        header = file.read(length)
        note = json.loads(json.loads(header)["__metadata__"][METADATA_KEY])
        digest = hashlib.sha256(size + header.replace(note["sha256"].encode(), _NO_DIGEST.encode(), 1))
        while block := file.read(_BLOCK):
            digest.update(block)
    return note, digest.hexdigest()


def _refused(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path}: {problem}; restore it from a backup to go on from its step, or move it away: the same command then "
        "learns the increment again from the champion, and nothing that was published is touched"
    )

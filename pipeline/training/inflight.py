"""The running increment on disk: one world-size-free file, written beside and renamed, removed at publish.

The file belongs to exactly one set of inputs (its key); a state of other inputs is never continued.
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipeline.files import canonical_json, fsync_dir, writing
from pipeline.placement.state import MOMENTS
from pipeline.tensor_files import TensorFile, write_tensors

_FILE = "state.safetensors"


@dataclass(frozen=True)
class Progressed:
    """How far an increment has come: its inputs' key, steps done, how often it was continued."""

    key: str
    step: int
    continuations: int


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
            write_tensors(temporary, shapes, tensors, canonical_json(asdict(done)))
            os.replace(temporary, folder / _FILE)
        finally:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
        fsync_dir(folder)


def load_inflight(folder: Path, key: str) -> Progressed | None:
    """How far the inputs `key` have come; None where there is no state, or one of other inputs."""
    if not (folder / _FILE).is_file():
        return None
    done = Progressed(**json.loads(TensorFile(folder / _FILE).metadata()))
    return done if done.key == key else None


def open_inflight(folder: Path) -> tuple[TensorFile, dict[str, TensorFile]]:
    """The saved values, and the saved moments by name, for reading by slices."""
    file = TensorFile(folder / _FILE)
    return file.below("value/"), {moment: file.below(f"{moment}/") for moment in MOMENTS}

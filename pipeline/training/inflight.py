"""The running increment on disk: one world-size-free file, written beside and renamed, removed at publish.

The file belongs to exactly one set of inputs (its key); a state of other inputs is never continued.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from pipeline.files import canonical_json, write_atomic
from pipeline.placement.state import MOMENTS, TrainableState

_FILE = "state.safetensors"


@dataclass(frozen=True)
class InFlight:
    """A stopped increment: steps done, the trainable state, how often it was continued."""

    step: int
    state: TrainableState
    continuations: int


def save_inflight(folder: Path, key: str, step: int, state: TrainableState, continuations: int) -> None:
    """Replace the in-flight file, atomically."""
    tensors = {f"value/{name}": tensor for name, tensor in state.values.items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": tensor for name, tensor in state.moments[moment].items()}
    note = {"key": key, "step": step, "optimizer_steps": state.optimizer_steps, "continuations": continuations}
    write_atomic(folder / _FILE, save(tensors, metadata={"perennial": canonical_json(note)}))


def load_inflight(folder: Path, key: str) -> InFlight | None:
    """The in-flight state of the inputs `key`; None where there is none or it belongs to other inputs."""
    path = folder / _FILE
    if not path.is_file():
        return None
    values: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["perennial"])
        if note["key"] != key:
            return None
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            kind, _, parameter = name.partition("/")
            target = values if kind == "value" else moments[kind]
            target[parameter] = file.get_tensor(name)
    return InFlight(note["step"], TrainableState(values, moments, note["optimizer_steps"]), note["continuations"])

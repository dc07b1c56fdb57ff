"""A PEFT adapter folder as the start of a task's LoRA expert: read, held against the stream, converted.

Nothing but `adapter_config.json` and `adapter_model.safetensors` is read: no pickle, no code.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest, skeleton
from pipeline.config import StreamConfig, build_method
from pipeline.experts.attach import ExpertPlan, attach_experts, components_of
from pipeline.experts.peft_format import CONFIG_FILE, TENSOR_FILE, Tensors, from_peft
from pipeline.methods.protocol import Increment, Method
from pipeline.tensor_files import METADATA_KEY


@dataclass(frozen=True)
class AdapterFolder:
    """What stands in a folder."""

    config: dict[str, Any]  # adapter_config.json
    tensors: Tensors
    note: dict[str, Any]  # of an adapter that `jobs/export.py` wrote: its task, increment and backbone; else empty


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Read a folder. Raises UserError where it is none of PEFT's, or keeps its tensors in a pickle."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read ({error}); name a PEFT adapter folder") from error
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"{folder / CONFIG_FILE} is not PEFT's; name a PEFT adapter folder")
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "pkl") for file in folder.glob(f"*.{suffix}"))
        why = f"only {pickles[0]}, a pickle, which is never read" if pickles else "and no tensors"
        raise UserError(f"{folder} has no {TENSOR_FILE}, {why}; save the adapter with safe_serialization=True")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            note = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); save the adapter again") from error
    return AdapterFolder(config, tensors, note if isinstance(note, dict) else {})


def started_role(plan: ExpertPlan) -> str:
    """The LoRA expert that an adapter can start: the task's own."""
    return "dedicated" if "dedicated" in plan.roles else plan.roles[0]


def check_start_from(config: StreamConfig, method: Method) -> None:
    """Raise UserError for an adapter that cannot start the expert it is named for, before any weight is read."""
    if not config.start_from:
        return
    name = config.method["name"]
    if method.plan is None:
        raise UserError(f"start_from: method {name} trains no LoRA expert; remove the key or choose another method")
    role = started_role(method.plan)
    model, family = skeleton(config.backbone)
    parameters = components_of(attach_experts(model, family, method.plan))[role]
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if not all(name.endswith((".lora_A", ".lora_B")) for name in shapes):
        raise UserError(f"start_from: an expert of method {name} is more than LoRA pairs; choose another method")
    for task in config.start_from:
        start_tensors(config, method, task, shapes)


def check_started_tasks(config: StreamConfig, names: Sequence[str]) -> None:
    """Raise UserError where an adapter is named for no task of the stream (`names`, in order), or for one that goes on
    from another task's expert.
    """
    if unknown := [task for task in config.start_from if task not in names]:
        raise UserError(f"start_from names {unknown[0]!r}, which is no task of the stream; it has {', '.join(names)}")
    method = build_method(config)
    later = [task for task in config.start_from if task != names[0]]
    if not later or method.plan is None:
        return
    before = {"first": dict.fromkeys(method.published(), "-")}
    second = Increment(number=2, task="second", seed=config.seed, bundles=before, states={}, order=("first",))
    if method.start(second)[started_role(method.plan)] is not None:
        raise UserError(
            f"start_from.{later[0]}: with method {config.method['name']} every task goes on from the one before it; an "
            f"adapter can start the first task, {names[0]}, alone"
        )


def start_tensors(
    config: StreamConfig, method: Method, task: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The adapter named for a task as tensors of its LoRA expert, by public name, fp32; `shapes` are the expert's.

    Raises UserError naming the folder, what is wrong and the remedy.
    """
    folder = config.start_from[task]
    where = f"start_from.{task}: {folder}"
    try:
        adapter = read_adapter(folder)
        check_base(adapter, config.backbone.path)
        lora = method.plan.lora
        return from_peft(adapter.config, adapter.tensors, shapes, lora.alpha / lora.rank)
    except UserError as error:
        raise UserError(
            f"{where} cannot start the expert: {error}; correct method.lora or name another adapter"
        ) from error


def check_base(adapter: AdapterFolder, backbone: str) -> None:
    """Raise UserError where the adapter says that it belongs to another model: by its digest where it has one, else by
    the name of its base model, which counts up to the folder's own name.
    """
    base = adapter.config.get("base_model_name_or_path")
    digest = adapter.note.get("backbone")
    if digest is None and base and os.path.isfile(os.path.join(base, "config.json")):
        digest = backbone_digest(base)
    if digest is not None:
        if digest != backbone_digest(backbone):
            raise UserError(f"it was trained on another model ({base}) than backbone.path {backbone}")
    elif base and Path(base).name != Path(backbone).resolve().name:
        raise UserError(
            f"its base model is {base!r} and backbone.path is {backbone}; if they are the same, say so in "
            f"base_model_name_or_path of its {CONFIG_FILE}"
        )

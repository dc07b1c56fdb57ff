"""LoRA pairs as PEFT stores them, and back: dictionaries and tensors alone, no model and no file.

A pair on a linear map is the same there: `base_model.model.<path>.lora_A.weight` (R, in), `lora_B.weight` (out, R).
Routed experts are stacked parameters in transformers, `experts.gate_up_proj` (E, 2F, D) and `experts.down_proj`
(E, D, F), which PEFT adapts through `target_parameters`: A is (E * R, in), routed experts first, B is (out, R * E),
ranks first. Gate and up are one parameter there: two pairs become one of twice the rank, B block-diagonal, which is
exact.

Legend: E routed experts, R LoRA rank, D model width, F width of one routed expert.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from data_contracts.errors import UserError
from pipeline.backbones.families import PROJECTIONS

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # public path of a projection -> A, B; 3-D of routed experts
Tensors = dict[str, torch.Tensor]
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = ("gate_proj", "up_proj")
_REFUSED = {  # what a LoRA pair of ours has not: key -> the values that mean it is off
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "megatron_config": ({}, None),
}


def pairs_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of a component by path; empty where some tensor is not part of a pair (a gate, a discriminator)."""
    paths = [name.removesuffix(".lora_A") for name in sorted(tensors) if name.endswith(".lora_A")]
    if 2 * len(paths) != len(tensors) or any(f"{path}.lora_B" not in tensors for path in paths):
        return {}
    return {path: (tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]) for path in paths}


def summed(parts: list[tuple[Pairs, float]]) -> Pairs:
    """sum_k w_k B_k A_k on every projection as one pair of the summed rank: the A's stacked, the w_k B_k side by side.

    All parts adapt the same projections.
    """
    return {
        path: (
            torch.cat([pairs[path][0] for pairs, _ in parts], dim=-2),
            torch.cat([pairs[path][1] * weight for pairs, weight in parts], dim=-1),
        )
        for path in parts[0][0]
    }


def to_peft(pairs: Pairs, scaling: float, base_model: str, routed_backbone: bool) -> tuple[dict[str, Any], Tensors]:
    """adapter_config.json and the tensors of adapter_model.safetensors for W x + scaling * B A x.

    On a backbone with routed experts the dense feed-forward networks are named as parameters too: of such families PEFT
    takes module names that end in `gate_proj` for those of routed experts in older checkpoints.
    """
    ranks: dict[str, int] = {}  # by target
    modules, parameters, tensors = [], [], {}
    for path, (lora_a, lora_b) in pairs.items():
        if lora_a.dim() == 3:
            continue
        ranks[path] = lora_a.shape[0]
        if routed_backbone and path.rpartition(".")[2] in PROJECTIONS:
            parameters.append(f"{path}.weight")
        else:
            modules.append(path)
        tensors |= {f"{_PREFIX}{path}.lora_A.weight": lora_a, f"{_PREFIX}{path}.lora_B.weight": lora_b}
    for block in dict.fromkeys(path.rpartition(".")[0] for path, (lora_a, _) in pairs.items() if lora_a.dim() == 3):
        parts = {name: pairs[f"{block}.{name}"] for name in (*_HALVES, "down_proj") if f"{block}.{name}" in pairs}
        stacked = {}
        if any(name in parts for name in _HALVES):
            stacked["gate_up_proj"] = _one_pair([parts.get(name) for name in _HALVES])
        if "down_proj" in parts:
            stacked["down_proj"] = parts["down_proj"]
        # PEFT wraps the module once a parameter, in the module's order: the last wrapper is the outermost
        for depth, (name, (lora_a, lora_b)) in enumerate(reversed(stacked.items())):
            parameters.append(f"{block}.{name}")
            ranks[f"{block}.{name}"] = lora_a.shape[1]
            where = _PREFIX + block + ".base_layer" * depth
            tensors[f"{where}.lora_A.weight"] = lora_a.flatten(0, 1)
            tensors[f"{where}.lora_B.weight"] = lora_b.permute(1, 2, 0).flatten(1)
    rank = min(ranks.values())
    pattern = _pattern(ranks, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": pattern,
        "alpha_pattern": {target: scaling * own for target, own in pattern.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _one_pair(halves: list[tuple[torch.Tensor, torch.Tensor] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs on gate and up, each (E, R, D) and (E, F, R) or missing, as one on both: (E, P, D), (E, 2F, P)."""
    there = [half for half in halves if half is not None]
    lora_a = torch.cat([a for a, _ in there], dim=1)
    num_experts, width, _ = there[0][1].shape
    lora_b = lora_a.new_zeros(num_experts, 2 * width, lora_a.shape[1])
    first = 0
    for index, half in enumerate(halves):
        if half is not None:
            last = first + half[1].shape[2]
            lora_b[:, index * width : (index + 1) * width, first:last] = half[1]
            first = last
    return lora_a, lora_b


def _pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """`rank_pattern`: by projection where all of its name have one rank, else by path."""
    by_leaf: dict[str, set[int]] = {}
    for target, rank in ranks.items():
        by_leaf.setdefault(target.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for target, rank in ranks.items():
        leaf = target.rpartition(".")[2]
        if rank != usual:
            pattern[leaf if len(by_leaf[leaf]) == 1 else target] = rank
    return pattern


def from_peft(
    config: Mapping[str, Any], tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], scaling: float
) -> Tensors:
    """The pairs' tensors by public name, fp32, for W x + scaling * B A x; `shapes` are those they must have.

    Raises UserError, in half a sentence, for another kind of adapter, another rank, or projections that are not those
    of `shapes`.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"its peft_type is {config.get('peft_type')!r}, and only LORA can be read")
    for key, off in _REFUSED.items():
        if config.get(key) not in off:
            raise UserError(f"it uses {key}, which a LoRA expert here has not")
    left = dict(tensors)

    def take(path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        names = [f"{_PREFIX}{path}.lora_{part}.weight" for part in "AB"]
        if any(name not in left for name in names):
            return None
        pair = tuple(left.pop(name).float() for name in names)
        if any(tensor.dim() != 2 or not tensor.numel() or not torch.isfinite(tensor).all() for tensor in pair):
            raise UserError(f"the pair on {path} is not two matrices of finite numbers")
        return pair

    found: Tensors = {}
    paths = [name.removesuffix(".lora_A") for name in shapes if name.endswith(".lora_A")]
    for path in [path for path in paths if len(shapes[f"{path}.lora_A"]) == 2]:
        pair = take(path)
        if pair is None:
            raise UserError(f"it has no pair on {path}, which method.lora.targets names")
        found |= _checked(path, *pair, shapes, _scale(config, path, pair[0].shape[0]) / scaling)
    for block in dict.fromkeys(path.rpartition(".")[0] for path in paths if len(shapes[f"{path}.lora_A"]) == 3):
        found |= _routed(block, take, shapes, config, scaling)
    if left:
        raise UserError(f"it adapts {min(left).removeprefix(_PREFIX)} too, which method.lora.targets does not name")
    return found


def _routed(block: str, take: Callable, shapes: Mapping, config: Mapping[str, Any], scaling: float) -> Tensors:
    """The pairs on the routed experts of a block."""
    ours = {n: shapes[f"{block}.{n}.lora_A"] for n in (*_HALVES, "down_proj") if f"{block}.{n}.lora_A" in shapes}
    num_experts = next(iter(ours.values()))[0]
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    wanted = ["down_proj"] * ("down_proj" in ours) + ["gate_up_proj"] * any(name in ours for name in _HALVES)
    for depth, name in enumerate(wanted):  # the outermost wrapper first, as in `to_peft`
        pair = take(block + ".base_layer" * depth)
        if pair is None:
            raise UserError(f"it has no pair on {block}.{name}, which method.lora.targets names")
        lora_a, lora_b = pair
        if lora_a.shape[0] % num_experts or lora_b.shape[1] % num_experts:
            raise UserError(f"the pair on {block}.{name} is not one for each of {num_experts} routed experts")
        lora_a = lora_a.unflatten(0, (num_experts, -1))
        stacked[name] = lora_a, lora_b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    found: Tensors = {}
    for name, (lora_a, lora_b) in stacked.items():
        factor = _scale(config, f"{block}.{name}", lora_a.shape[1]) / scaling
        if name == "down_proj":
            found |= _checked(f"{block}.{name}", lora_a, lora_b, shapes, factor)
            continue
        for half, pair in zip(_HALVES, _two_pairs(lora_a, lora_b, ours), strict=True):
            if half in ours:
                found |= _checked(f"{block}.{half}", *pair, shapes, factor)
            elif pair[1].any():
                raise UserError(f"it adapts {block}.{half} too, which method.lora.targets does not name")
    return found


def _two_pairs(lora_a: torch.Tensor, lora_b: torch.Tensor, ours: Mapping[str, tuple[int, ...]]):
    """One pair on gate and up as two: by blocks where it has two ranks' worth of them, else both with the whole A."""
    width, rank = lora_b.shape[1] // 2, next(shape[1] for name, shape in ours.items() if name in _HALVES)
    gate, up = lora_b[:, :width], lora_b[:, width:]
    if lora_a.shape[1] == 2 * rank and not gate[..., rank:].any() and not up[..., :rank].any():
        return (lora_a[:, :rank], gate[..., :rank]), (lora_a[:, rank:], up[..., rank:])
    return (lora_a, gate), (lora_a, up)


def _checked(path: str, lora_a: torch.Tensor, lora_b: torch.Tensor, shapes: Mapping, factor: float) -> Tensors:
    """A pair under its public names, B scaled. Raises UserError where it has not the shapes it must have."""
    pair = {f"{path}.lora_A": lora_a, f"{path}.lora_B": lora_b}
    for name, tensor in pair.items():
        rank, wanted = (t[-2] if name.endswith("A") else t[-1] for t in (tensor.shape, shapes[name]))
        if rank != wanted:
            raise UserError(f"its rank on {path} is {rank}, and method.lora.rank is {wanted}")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(f"{name} is {tuple(tensor.shape)}, and this backbone needs {tuple(shapes[name])}")
    return {f"{path}.lora_A": lora_a.contiguous(), f"{path}.lora_B": (lora_b * factor).contiguous()}


def _scale(config: Mapping[str, Any], target: str, found: int) -> float:
    """alpha / rank, or alpha / sqrt(rank), of a target. Raises UserError where its tensors have another rank."""
    rank, alpha = (
        _own(config.get(f"{kind}_pattern") or {}, target, config.get(key))
        for kind, key in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if not all(isinstance(number, int | float) and 0 < number < 1e9 for number in (rank, alpha)):
        raise UserError(
            f"its r and lora_alpha for {target} are {rank!r} and {alpha!r}, and must be positive numbers below 1e9"
        )
    if rank != found:
        raise UserError(f"its rank on {target} is {found}, and {CONFIG_FILE} says {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _own(pattern: Any, target: str, usual: Any) -> Any:
    """What a `rank_pattern` says of a target. Raises UserError for a regular expression but PEFT's own `.*\\.name`."""
    if not isinstance(pattern, dict):
        raise UserError(f"its pattern of ranks or alphas is {pattern!r}, and must be a mapping")
    for key, value in pattern.items():
        name = re.sub(r"\\(.)", r"\1", key.removeprefix(r".*\."))
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f"it has a pattern of ranks or alphas by the expression {key!r}; name paths instead")
        if target == name or target.endswith(f".{name}"):
            return value
    return usual

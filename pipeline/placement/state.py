"""World-size-free trainable state: full fp32 tensors out of, and into, a ZeRO-2 or ZeRO-3 engine.

DeepSpeed's own checkpoint is bound to its partitioning. Here each trainable parameter is one full tensor (its fp32
master value and Adam's two moments) plus the number of optimizer steps, so any world size and ZeRO stage can go on
from it. This file alone reaches into DeepSpeed's optimizer; tests/placement/test_state.py guards what it relies on.

Every function here is a collective: all ranks call it together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainableState:
    """Full tensors, fp32 on CPU, by parameter name; `moments` is {moment: {name: tensor}} and empty before any step."""

    values: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    optimizer_steps: int


def gather_values(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The fp32 master value of each trainable parameter, full and on CPU, on every rank."""
    return {name: safe_get_full_fp32_param(parameter).cpu().clone() for name, parameter in parameters.items()}


def gather_state(parameters: Mapping[str, nn.Parameter], optimizer_steps: int) -> TrainableState:
    """Everything that training goes on from."""
    moments: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            moments[moment][name] = safe_get_full_optimizer_state(parameter, moment).cpu().clone()
    return TrainableState(gather_values(parameters), moments, optimizer_steps)


def restore_state(engine, parameters: Mapping[str, nn.Parameter], state: TrainableState) -> None:
    """Put `state` into the engine: master values, moments (zero where absent), Adam's step, working weights."""
    _create_adam_state(engine, state.optimizer_steps)
    for name, parameter in parameters.items():
        value = state.values[name]
        if value.shape != full_shape(parameter):
            raise AssertionError(f"{name}: state has {tuple(value.shape)}, the model {tuple(full_shape(parameter))}")
        _set(parameter, None, value)
        for moment in MOMENTS:
            tensor = state.moments.get(moment, {}).get(name)
            _set(parameter, moment, torch.zeros_like(value) if tensor is None else tensor)
    write_weights(parameters, state.values)


def write_weights(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Copy full tensors into the working weights (in their own dtype); the optimizer's master values stay as they
    are.
    """
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rsplit(".", 3)[0], []).append(name)
    for names in by_module.values():  # one FFN's experts at a time: never more than a layer is whole
        chosen = [parameters[name] for name in names]
        with torch.no_grad(), gathered(chosen, modifier_rank=0):
            for name, parameter in zip(names, chosen, strict=True):
                parameter.data.copy_(values[name])


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None):
    """Context in which parameters partitioned by ZeRO-3 are whole; nothing to do for whole ones."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank, enabled=bool(partitioned))


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole tensor, partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _set(parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    value = value.to(device=parameter.device, dtype=torch.float32)
    if hasattr(parameter, "ds_id"):
        local = _local_part(parameter, value)
        if moment is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _local_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    # the flattened tensor is padded to a multiple of the group, then cut evenly
    size = parameter.ds_tensor.ds_numel
    group = parameter.ds_process_group
    flat = torch.zeros(size * dist.get_world_size(group), dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.flatten()
    return flat.narrow(0, size * dist.get_rank(group), size).clone()


def _create_adam_state(engine, steps: int) -> None:
    zero = engine.optimizer
    adam = zero.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        state = adam.state[flat]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["step"] = torch.tensor(float(steps))
    if not stage3:
        zero._lazy_init_hp_params_optimizer_state()  # links the moments' fragments to the parameters

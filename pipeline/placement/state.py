"""World-size-free trainable state: full fp32 tensors out of, and into, a ZeRO-2 or ZeRO-3 engine.

DeepSpeed's own checkpoint is bound to its partitioning. Here each trainable parameter is one full tensor (its fp32
master value and Adam's two moments) plus the number of optimizer steps, so any world size, ZeRO stage and
expert-parallel degree can go on from it; of a tensor over routed experts each rank writes and reads its own. This file
alone reaches into DeepSpeed's optimizer; tests/placement/test_state.py guards what it relies on.

What gathers is a collective: all ranks call it together.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import nn

from pipeline.tensor_files import Experts

MOMENTS = ("exp_avg", "exp_avg_sq")


class Source(Protocol):
    """Where full tensors are read from: a rank asks for a whole tensor, or for its own routed experts of it."""

    def read(self, name: str, experts: Experts = None) -> torch.Tensor:
        """The tensor, or its rows [first, stop), on the CPU."""


@dataclass(frozen=True)
class Whole:
    """A `Source` of tensors in memory."""

    tensors: Mapping[str, torch.Tensor]

    def read(self, name: str, experts: Experts = None) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor if experts is None else tensor[experts[0] : experts[1]]


def gather_values(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The fp32 master value of each trainable parameter, full and on CPU, on every rank."""
    return dict(stream_values(parameters))


def stream_values(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, one tensor at a time, in the order of the names."""
    for name in sorted(parameters):
        yield name, _whole(parameters[name], safe_get_full_fp32_param(parameters[name]))


def stream_state(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything training goes on from, one tensor at a time: `exp_avg/<name>`, `exp_avg_sq/<name>`, `value/<name>`."""
    for moment in MOMENTS:
        for name in sorted(parameters):
            value = safe_get_full_optimizer_state(parameters[name], moment)
            yield f"{moment}/{name}", _whole(parameters[name], value)
    for name, value in stream_values(parameters):
        yield f"value/{name}", value


def state_shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `stream_state` yields."""
    return {f"{kind}/{name}": tuple(full_shape(p)) for kind in (*MOMENTS, "value") for name, p in parameters.items()}


def restore_state(
    engine, parameters: Mapping[str, nn.Parameter], values: Source, moments: Mapping[str, Source], optimizer_steps: int
) -> None:
    """Put a state into the engine: master values, moments (zero where there is no source), Adam's step, working
    weights. Each rank reads its own routed experts alone.
    """
    _create_adam_state(engine, optimizer_steps)
    for name, parameter in parameters.items():
        value = _own_part(values, name, parameter)
        _set(parameter, None, value)
        for moment in MOMENTS:
            source = moments.get(moment)
            _set(parameter, moment, torch.zeros_like(value) if source is None else _own_part(source, name, parameter))
        _write(parameter, value)


def write_weights(parameters: Mapping[str, nn.Parameter], values: Source) -> None:
    """Copy tensors into the working weights (in their own dtype); the optimizer's master values stay as they are."""
    for name, parameter in parameters.items():
        _write(parameter, _own_part(values, name, parameter))


def own_value(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of the fp32 master value, with this rank's routed experts alone, on the device. Collective."""
    return safe_get_full_fp32_param(parameter).detach().view(local_shape(parameter)).clone()


def add_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to the gradient that the engine's next step applies; `gradient` is shaped as `own_value`. To be called
    between the last backward and the step, on all ranks alike.
    """
    if hasattr(parameter, "ds_id"):
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) + _local_part(parameter, gradient))
    elif parameter._hp_mapping is not None:  # this rank's part of the optimizer holds some of it
        part = parameter._hp_mapping
        place = part.lp_fragment_address
        held = part.get_lp_grad_fragment(parameter._index_in_param_group)
        held.add_(gradient.flatten().narrow(0, place.start, place.numel).view_as(held))


def whole_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient after the last backward, with this rank's routed experts alone, fp32. Collective."""
    return safe_get_full_grad(parameter).detach().view(local_shape(parameter)).float()


def experts_of(parameter: nn.Parameter) -> Experts:
    """The routed experts of the full tensor that this rank holds; None for a parameter that is not shared out."""
    return parameter.expert_slice[:2] if hasattr(parameter, "expert_slice") else None


def gathered(parameters: Iterable[nn.Parameter]):
    """Context in which parameters partitioned by ZeRO-3 are whole; nothing to do for whole ones."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned))


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole tensor, however it is partitioned and shared out."""
    here = local_shape(parameter)
    return torch.Size((parameter.expert_slice[2], *here[1:])) if hasattr(parameter, "expert_slice") else here


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """The same with this rank's routed experts alone."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_over_experts(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    """The tensor of all routed experts from this rank's share of it. Collective over the expert-parallel group."""
    if not hasattr(parameter, "expert_slice"):
        return local
    group = groups._get_expert_parallel_group(parameter.group_name)
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _whole(parameter: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    return whole_over_experts(parameter, local.view(local_shape(parameter))).cpu().clone()


def _own_part(source: Source, name: str, parameter: nn.Parameter) -> torch.Tensor:
    value = source.read(name, experts_of(parameter))
    if value.shape != local_shape(parameter):
        raise AssertionError(f"{name}: there are {tuple(value.shape)}, the model has {tuple(local_shape(parameter))}")
    return value


@torch.no_grad()
def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Into the working weights: this rank's share, and the whole where ZeRO-3 keeps it at hand."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    parameter.ds_tensor.data.copy_(_local_part(parameter, value.to(torch.float32)))
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.data.copy_(value)


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

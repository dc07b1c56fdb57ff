"""Make the parameters of a model on the meta device real, each rank reading only what it keeps.

Without ZeRO-3 a rank keeps every tensor, cut to its routed experts. Under ZeRO-3 it keeps its share of each: the
flattened tensor is padded to a multiple of the partition group and cut evenly, and no tensor is ever whole on a rank.

This file alone reaches into DeepSpeed's partitioning; tests/placement/test_materialise.py guards what it relies on:
`zero.Init._convert_to_deepspeed_param`, `zero.Init._enable_mem_efficient_linear`, `zero.Init.mem_efficient_linear`, and
of a converted parameter `partition`, `ds_tensor` (with its own `ds_numel`), `ds_numel`, `ds_zero_partition_rank`, and
`ds_zero_partition_process_group`, which an expert's parameter carries beforehand.
"""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from data_contracts.errors import UserError
from pipeline.backbones.checkpoint import Checkpoint
from pipeline.placement.state import experts_of

Buffers = Mapping[str, tuple[nn.Module, str]]  # name in the stock model: (its module, its name there)


def stock_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, tuple[nn.Module, str]]]:
    """Parameters and buffers of a stock model by name, to be taken before anything in it is wrapped.

    A tied parameter occurs once.
    """
    buffers = {
        f"{path}.{name}".removeprefix("."): (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
    }
    return dict(model.named_parameters()), buffers


@torch.no_grad()
def materialise(
    parameters: Mapping[str, nn.Parameter],
    buffers: Buffers,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    zero3_settings: Mapping[str, Any] | None = None,
) -> None:
    """Fill every meta parameter and buffer from the checkpoint, in place: the objects, their attributes and ties stay.

    A parameter with `expert_slice` (first, stop, total) gets these experts alone. All become `dtype`, except what the
    family keeps in fp32; buffers become fp32. Buffers that are real already are moved to `device`.

    Args:
        parameters: by name in the stock model, in the order they are to be read.
        buffers: by name in the stock model.
        checkpoint: is held against all of these names first.
        device: where whole tensors go; shares go where `zero3_settings` says.
        dtype: of the backbone.
        zero3_settings: the whole DeepSpeed configuration of a ZeRO-3 engine, or None where nothing is partitioned.
            No collective is called.

    Raises UserError where the checkpoint and the model differ, or for settings that shares cannot be read for.
    """
    init = None if zero3_settings is None else _zero_init(zero3_settings)
    shapes = {name: _whole_shape(parameter) for name, parameter in parameters.items()}
    pending = {name: place for name, place in buffers.items() if getattr(*place).is_meta}
    checkpoint.check(shapes | {name: tuple(getattr(*place).shape) for name, place in pending.items()})
    for name, parameter in parameters.items():
        kept_dtype = torch.float32 if _stays_float32(checkpoint, name) else dtype
        _replace(parameter, torch.empty(parameter.shape, dtype=kept_dtype, device=device))
        if init is None:
            checkpoint.read(name, expert_slice=experts_of(parameter), out=parameter.data)
        else:
            _partition(init, parameter)
            start, stop = _share(parameter)
            share = parameter.ds_tensor.data
            checkpoint.read(name, expert_slice=experts_of(parameter), flat=(start, stop), out=share[: stop - start])
            share[stop - start :].zero_()  # padding
    for name, (module, attribute) in buffers.items():
        buffer = getattr(module, attribute)
        value = checkpoint.read(name, torch.float32) if name in pending else buffer
        module._buffers[attribute] = value.to(device)


def _zero_init(settings: Mapping[str, Any]) -> deepspeed.zero.Init:
    zero = settings["zero_optimization"]
    unread = {
        "zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) > 1,
        "zero_quantized_weights": zero.get("zero_quantized_weights", False),
        "zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights", False),
        "offload_param.device nvme": (zero.get("offload_param") or {}).get("device") == "nvme",
    }
    for key, is_set in unread.items():
        if is_set:
            raise UserError(
                f"deepspeed: zero_optimization.{key} is not supported: the backbone is read share by share; "
                "remove it from the file"
            )
    init = deepspeed.zero.Init(config_dict_or_path=dict(settings))
    if init.mem_efficient_linear:
        # torch's own linear would keep a gathered weight alive until the backward pass
        init._enable_mem_efficient_linear()
    return init


def _partition(init: deepspeed.zero.Init, parameter: nn.Parameter) -> None:
    """Hand a parameter to ZeRO-3 with whatever values. Its memory was never written to, and is only read from here for
    the share, so that no page of it becomes resident on a CPU.
    """
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()


def _share(parameter: nn.Parameter) -> tuple[int, int]:
    """This rank's range of the flattened tensor, padding left out."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)


def _replace(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a meta parameter memory on a device; torch cannot set `.data` across these."""
    real = nn.Parameter(data, requires_grad=parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    if not hasattr(parameter, "expert_slice"):
        return tuple(parameter.shape)
    first, stop, total = parameter.expert_slice
    assert parameter.shape[0] == stop - first, (tuple(parameter.shape), parameter.expert_slice)
    return (total, *parameter.shape[1:])


def _stays_float32(checkpoint: Checkpoint, name: str) -> bool:
    routed = checkpoint.family.routed
    return routed is not None and any(part in name for part in routed.float32)

"""Expert parallelism: each rank of a group holds an equal run of every block's routed experts, and the LoRA experts on
them.

DeepSpeed's AutoEP shards and reduces such parameters by the marks they carry: their ZeRO partitions and gradients
belong to the ranks with the same experts. It knows an expert-parallel model by a layer of its own class; ours has its
own dispatch, so one `Marker` in the model says it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn
from transformers import PreTrainedConfig

from data_contracts.errors import UserError
from pipeline.backbones.families import Family


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's place: consecutive ranks share out the experts, ranks `size` apart hold the same ones."""

    size: int
    rank: int  # among the ranks that share out the experts
    group: Any  # of those ranks
    data_group: Any  # of the ranks that hold the same experts

    @property
    def name(self) -> str:
        """What DeepSpeed calls the group."""
        return f"ep_size_{self.size}"

    def slice_of(self, num_experts: int) -> tuple[int, int]:
        """This rank's experts: first, and one past the last."""
        local = num_experts // self.size
        return self.rank * local, (self.rank + 1) * local

    def own(self, parameter: nn.Parameter, num_experts: int) -> None:
        """Mark a parameter whose first dimension is this rank's share of `num_experts`."""
        parameter.expert_slice = (*self.slice_of(num_experts), num_experts)
        parameter.allreduce = False
        parameter.group_name = self.name
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = self.name
        parameter.ds_zero_partition_process_group = self.data_group


def check_degrees(size: int, world_size: int, family: Family, config: PreTrainedConfig) -> None:
    """Raise UserError, with all the numbers, where `size` does not fit the world or the backbone's experts."""
    if size == 1:
        return
    if family.routed is None:
        raise UserError(
            f"expert_parallel.autoep_size {size}: a backbone of type '{family.model_type}' has no routed experts; "
            "name a DeepSpeed file without expert_parallel"
        )
    experts = getattr(config, family.routed.num_experts)
    if world_size % size or experts % size:
        fits = [n for n in range(1, world_size + 1) if world_size % n == 0 and experts % n == 0]
        raise UserError(
            f"expert_parallel.autoep_size {size} must divide the world of {world_size} ranks and the {experts} routed "
            f"experts of a block (rests {world_size % size} and {experts % size}); here fit {', '.join(map(str, fits))}"
        )


def join(size: int) -> ExpertParallel | None:
    """Create, or find, the groups of this degree; None for 1, where nothing is shared out. Collective."""
    if size == 1:
        return None
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    group = groups._get_expert_parallel_group(name)
    return ExpertParallel(size, dist.get_rank(group), group, groups._get_expert_data_parallel_group(name))


def share_out(model: nn.Module, family: Family, parallel: ExpertParallel) -> None:
    """Replace each block's stacked expert weights, on the meta device, by this rank's share of them, marked."""
    for _, _, block in family.feed_forwards(model):
        if not family.is_routed(block):
            continue
        experts = getattr(block, family.routed.experts)
        for name, weight in list(experts.named_parameters(recurse=False)):
            first, stop = parallel.slice_of(len(weight))
            own = nn.Parameter(torch.empty_like(weight[first:stop]), requires_grad=False)
            parallel.own(own, len(weight))
            setattr(experts, name, own)


class Marker(AutoEPMoELayer):
    """Holds nothing and computes nothing: DeepSpeed's engine looks for this class to find a model expert parallel."""

    def __init__(self, parallel: ExpertParallel, num_experts: int) -> None:
        nn.Module.__init__(self)  # the layer's own start would take over a block
        self.num_experts = num_experts
        self.ep_size, self.ep_rank, self.ep_group_name = parallel.size, parallel.rank, parallel.name

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups are there already."""

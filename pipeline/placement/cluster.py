"""What a plan is made for: the cluster with its degrees of parallelism, and the work of one rank."""

from dataclasses import dataclass

from data_contracts.errors import UserError
from pipeline.placement.architecture import Architecture, TensorSpec

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
FP32 = 4


@dataclass(frozen=True)
class Placement:
    """The cluster, the degrees and what of DeepSpeed's configuration decides memory."""

    nodes: int = 1
    devices_per_node: int = 8
    zero_stage: int = 3
    expert_parallel: int = 1
    device_memory: float = 80e9  # bytes
    bandwidth: float = 50e9  # bytes a second of one device, between nodes
    persistence_threshold: int = 1_000  # elements; stage3_param_persistence_threshold
    reduce_bucket_size: int = 5_000_000  # elements
    prefetch_bucket_size: int = 5_000_000  # elements
    max_reuse_distance: int = 1_000_000_000  # elements; stage3_max_reuse_distance

    @property
    def world(self) -> int:
        """Ranks, one a device."""
        return self.nodes * self.devices_per_node

    def ranks_of(self, tensor: TensorSpec) -> int:
        """Ranks that hold the same part of a tensor, over which ZeRO partitions it."""
        return self.world // self.expert_parallel if tensor.expert_owned else self.world

    def numel(self, tensor: TensorSpec) -> int:
        """Elements of a tensor on one rank before ZeRO partitions it."""
        return tensor.numel // self.expert_parallel if tensor.expert_owned else tensor.numel

    def share(self, tensor: TensorSpec) -> int:
        """Elements of a tensor in one ZeRO-3 partition, padding included."""
        return -(-self.numel(tensor) // self.ranks_of(tensor))

    def persists(self, tensor: TensorSpec) -> bool:
        """Whether ZeRO-3 keeps the tensor whole between its uses."""
        return self.numel(tensor) <= self.persistence_threshold


@dataclass(frozen=True)
class Workload:
    """What one rank works on."""

    tokens: int = 2048  # of one micro-batch, padding included
    sequences: int = 16  # of one micro-batch
    answer_tokens: int = 64  # of one micro-batch: tokens that get logits
    micro_batches: int = 1  # of one optimizer step
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    adversary: bool = True  # the discriminator's game is on (from the second task)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


def check(architecture: Architecture, placement: Placement, workload: Workload) -> None:
    """Raise UserError, with all the numbers, for what cannot be."""
    counts = {
        "nodes": placement.nodes,
        "devices a node": placement.devices_per_node,
        "expert-parallel size": placement.expert_parallel,
        "tokens": workload.tokens,
        "sequences": workload.sequences,
        "micro-batches": workload.micro_batches,
    }
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: {count} is not at least 1")
    if placement.zero_stage not in (2, 3):
        raise UserError(f"ZeRO stage {placement.zero_stage}: this pipeline runs stages 2 and 3")
    if workload.dtype not in ELEMENT_BYTES:
        raise UserError(f"dtype {workload.dtype}: choose one of {', '.join(ELEMENT_BYTES)}")
    if placement.device_memory <= 0 or placement.bandwidth <= 0:
        raise UserError("device memory and bandwidth must be above 0")
    size, world, experts = placement.expert_parallel, placement.world, architecture.num_experts
    if size > 1 and not experts:
        raise UserError(
            f"expert-parallel size {size}: the backbone ({architecture.model_type}) has no routed experts; use 1"
        )
    if size > 1 and (world % size or experts % size):
        raise UserError(
            f"expert-parallel size {size} must divide the world of {world} ranks ({placement.nodes} nodes x "
            f"{placement.devices_per_node} devices) and the {experts} routed experts of a layer (rests {world % size} "
            f"and {experts % size}); here fit {', '.join(map(str, degrees(experts, world)))}"
        )


def degrees(num_experts: int, world: int) -> list[int]:
    """The expert-parallel sizes that divide both."""
    return [size for size in range(1, max(num_experts, 1) + 1) if num_experts % size == 0 and world % size == 0] or [1]

"""What the run that is to come will hold, send and write, from the stream and the backbone's config.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_contracts import load_contract
from data_contracts.contract import TrainShare
from data_contracts.errors import UserError
from data_contracts.readers import open_file
from data_contracts.sources import resolve_source
from pipeline.backbones.fetch import local_backbone
from pipeline.config import StreamConfig
from pipeline.experts.attach import ExpertPlan
from pipeline.placement.architecture import load_architecture
from pipeline.placement.cluster import FP32, Placement, Workload, check
from pipeline.placement.learner import expert_parallel_size, read_deepspeed_config
from pipeline.placement.memory import memory_of
from pipeline.placement.traffic import layer_pass
from pipeline.placement.trainable import MethodChoice, SubExperts, trainable_of

WRITTEN_TIMES = 3  # token shards, their temporary copy and the spooled rows, against the source files' bytes
LOGGED = 50_000_000  # bytes: MLflow's database, pictures and records


@dataclass(frozen=True)
class Sizes:
    """Estimates of one rank, in bytes unless said otherwise; `docs/PLAN.md` has the rules."""

    memory: int  # of the device: weights, optimizer, gathered layers, activations
    gradients: int  # elements of all LoRA gradients
    gathered: int  # of the largest layer that ZeRO-3 gathers
    token_copies: int  # handed to one all-to-all of a routed layer; 0: this run has none
    expert_parallel: int
    element_bytes: int


def sizes_of(config: StreamConfig, plan: ExpertPlan | None, hosts: int, ranks_per_host: int) -> Sizes:
    """Of one rank of a run on so many hosts. Raises UserError where the backbone is not one that can be planned."""
    architecture = load_architecture(local_backbone(config.backbone.path))
    placement = placement_of(config, hosts, ranks_per_host)
    workload = workload_of(config, placement.world)
    check(architecture, placement, workload)
    trainable = trainable_of(architecture, method_of(config, plan))
    memory = memory_of(architecture, trainable, placement, workload)
    token_copies = 0
    if architecture.routed_layers:
        token_copies = layer_pass(architecture, placement, workload).dispatch
    largest = memory.largest_layer if placement.zero_stage == 3 else 0
    return Sizes(
        memory=memory.total,
        gradients=sum(placement.numel(tensor) for tensor in trainable.tensors),
        gathered=largest,
        token_copies=token_copies,
        expert_parallel=placement.expert_parallel,
        element_bytes=workload.element_bytes,
    )


def method_of(config: StreamConfig, plan: ExpertPlan | None) -> MethodChoice:
    """The stream's method as a plan of memory knows it."""
    if plan is None:
        return MethodChoice(config.method["name"], discriminator_outputs=0)
    return MethodChoice(
        config.method["name"],
        plan.lora.rank,
        tuple(plan.lora.targets),
        plan.num_discriminator_outputs,
        plan.sub_experts or SubExperts(),
    )


def placement_of(config: StreamConfig, hosts: int, ranks_per_host: int) -> Placement:
    """The DeepSpeed file's degrees and thresholds on this cluster."""
    zero = read_deepspeed_config(config.deepspeed)["zero_optimization"]
    keys = {
        "persistence_threshold": "stage3_param_persistence_threshold",
        "reduce_bucket_size": "reduce_bucket_size",
        "prefetch_bucket_size": "stage3_prefetch_bucket_size",
        "max_reuse_distance": "stage3_max_reuse_distance",
    }
    given = {name: int(zero[key]) for name, key in keys.items() if isinstance(zero.get(key), int | float)}
    return Placement(
        nodes=hosts,
        devices_per_node=ranks_per_host,
        zero_stage=zero["stage"],
        expert_parallel=expert_parallel_size(config),
        **given,
    )


def workload_of(config: StreamConfig, world: int) -> Workload:
    """The most that one rank works on."""
    training = config.training
    return Workload(
        tokens=training.micro_batch_tokens,
        sequences=training.micro_batch_size,
        answer_tokens=min(training.micro_batch_tokens, 8 * training.micro_batch_size),
        micro_batches=math.ceil(training.batch_size / (world * training.micro_batch_size)),
        dtype=config.backbone.dtype,
        activation_checkpointing=config.training.activation_checkpointing,
    )


def written_bytes(config: StreamConfig, plan: ExpertPlan | None, source_bytes: int) -> int:
    """What the run leaves in the work_dir, at most: shards of the data, every task's experts, the in-flight state."""
    architecture = load_architecture(local_backbone(config.backbone.path))
    trained = trainable_of(architecture, method_of(config, plan)).parameters
    # of each task its experts; of the running one values and two moments, the old file beside the new one
    experts = FP32 * trained * (len(config.tasks) + 2 * 3)
    return WRITTEN_TIMES * source_bytes + experts + LOGGED


def source_bytes(tasks: Sequence[str], roots: Sequence[str]) -> int:
    """Bytes of the data files of all contracts; what cannot be read counts nothing here."""
    total = 0
    for path in tasks:
        try:
            source = load_contract(path).source
            patterns = [getattr(source, split) for split in ("train", "validation", "test")]
            names = {
                file
                for given in patterns
                if not isinstance(given, TrainShare)
                for pattern in given
                for file in resolve_source(pattern, list(roots))
            }
            for name in names:
                with open_file(name) as file:
                    total += file.seek(0, 2)
        except (UserError, OSError):
            continue
    return total

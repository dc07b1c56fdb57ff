"""Bytes on the wire in one optimizer step of one rank, from sizes alone.

What is handed to each collective is counted, send side: also the part that stays on the rank. Of an all-gather, what
comes from other ranks is counted.

Legend: T tokens of a rank's micro-batch, K top-k, D model width, E routed experts, B sequences of a micro-batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.placement.architecture import Architecture, TensorSpec
from pipeline.placement.cluster import FP32, Placement, Workload
from pipeline.placement.trainable import Trainable

INT64 = 8


@dataclass(frozen=True)
class RoutedPass:
    """All-to-all payload of one routed layer in one micro-batch, in bytes a rank hands over (`experts/dispatch.py`).

    `combine`, and the backward of `dispatch`, are sent by the owners: exact in the mean over the expert-parallel group,
    on one rank only where the routing is even. The other figures are exact on every rank.
    """

    counts: int  # forward: copies for each routed expert, and the number of sequences, to each rank
    dispatch: int  # forward: a row of D for each token copy
    combine: int  # forward: the rows back
    notes: int  # forward: share and sequence slot of each copy
    pooled: int  # forward: one row of D a (sending rank, sequence)

    @property
    def forward(self) -> int:
        return self.counts + self.dispatch + self.combine + self.notes + self.pooled

    @property
    def backward(self) -> int:
        """Gradients travel the way their rows came; counts and notes have none."""
        return self.dispatch + self.combine + self.pooled


def routed_pass(
    tokens: int,
    top_k: int,
    width: int,
    num_experts: int,
    expert_parallel: int,
    element_bytes: int,
    sequences: int = 0,
) -> RoutedPass:
    """The payload of one routed layer.

    Args:
        tokens: T, padding counted: every token of a packed row is routed.
        top_k: K.
        width: D.
        num_experts: E, over all ranks.
        expert_parallel: ranks that share out the experts; with 1 nothing is sent.
        element_bytes: of the backbone's dtype.
        sequences: B where the routed experts of this layer play the adversary's game, the same on every rank; else 0.
    """
    if expert_parallel == 1:
        return RoutedPass(0, 0, 0, 0, 0)
    rows = tokens * top_k * width * element_bytes
    return RoutedPass(
        counts=(num_experts + expert_parallel) * INT64,
        dispatch=rows,
        combine=rows,
        notes=tokens * top_k * 2 * FP32 if sequences else 0,
        pooled=expert_parallel * sequences * width * element_bytes,
    )


@dataclass(frozen=True)
class Gathered:
    """A tensor ZeRO-3 gathers: its bytes on the rank when whole, the ranks it is partitioned over, how often."""

    whole_bytes: int
    group: int
    times: int  # in one optimizer step

    @property
    def received(self) -> int:
        """Bytes that come from other ranks in one optimizer step."""
        return self.times * self.whole_bytes * (self.group - 1) // self.group


@dataclass(frozen=True)
class Traffic:
    """One optimizer step of one rank, in bytes, and the time of each kind if nothing overlaps with it, in seconds."""

    all_to_all: int  # handed over, the part for the rank itself included
    all_to_all_leaving: int  # of it, to other ranks, under even routing
    all_gather_experts: int  # received: routed experts and the LoRA experts on them
    all_gather_rest: int  # received: all else
    all_gather_later: int  # received: both together from the second step on
    gradients: int  # handed to reduce-scatter (ZeRO-3) or all-reduce (ZeRO-2)
    gradients_leaving: int  # sent by a ring
    bandwidth: float  # bytes a second of one device

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each kind at the stated bandwidth, latency left out."""
        return {
            "all_to_all": self.all_to_all_leaving / self.bandwidth,
            "all_gather": self.all_gather_later / self.bandwidth,
            "gradients": self.gradients_leaving / self.bandwidth,
        }

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def ring_sent(handed_over: int, group: int, zero_stage: int) -> int:
    """Bytes a rank sends in a ring reduce-scatter (ZeRO-3) or all-reduce (ZeRO-2) of a buffer."""
    return (1 if zero_stage == 3 else 2) * handed_over * (group - 1) // group


def sum_received(gathers: Iterable[Gathered]) -> int:
    """Bytes received for all of them."""
    return sum(gather.received for gather in gathers)


def layer_pass(architecture: Architecture, placement: Placement, workload: Workload, sequences: int = 0) -> RoutedPass:
    """`routed_pass` of each routed layer of this backbone, placed so, for a micro-batch."""
    return routed_pass(
        workload.tokens,
        architecture.top_k,
        architecture.hidden_size,
        architecture.num_experts,
        placement.expert_parallel,
        workload.element_bytes,
        sequences,
    )


def traffic_of(architecture: Architecture, trainable: Trainable, placement: Placement, workload: Workload) -> Traffic:
    """Bytes of one optimizer step of one rank."""
    first = trainable.first_layer
    has_backward = set() if first is None else set(range(first, architecture.num_layers))
    played = {tensor.layer for tensor in trainable.tensors if tensor.kind == "lora_routed_experts"}
    all_to_all = 0
    for layer in architecture.routed_layers:
        plays = workload.adversary and trainable.method.plays and layer in played
        payload = layer_pass(architecture, placement, workload, workload.sequences if plays else 0)
        forwards = 2 if workload.activation_checkpointing and layer in has_backward else 1
        backward = payload.backward if layer in has_backward else 0
        all_to_all += workload.micro_batches * (forwards * payload.forward + backward)
    experts, rest, later = [], [], []
    kept = keeps_for_backward(architecture, trainable, placement)
    for tensor in (*architecture.tensors, *trainable.tensors):
        times = _gathers(tensor, trainable, placement, workload, architecture.tied)
        size = FP32 if tensor.float32 else workload.element_bytes
        gathered = Gathered(size * placement.numel(tensor), placement.ranks_of(tensor), times)
        (experts if tensor.expert_owned else rest).append(gathered)
        if kept and placement.zero_stage == 3 and not placement.persists(tensor):
            gathered = replace(gathered, times=workload.micro_batches)
        later.append(gathered)
    handed, sent = 0, 0
    for tensor in trainable.tensors:
        size = workload.micro_batches * workload.element_bytes * placement.numel(tensor)
        handed += size
        sent += ring_sent(size, placement.ranks_of(tensor), placement.zero_stage)
    return Traffic(
        all_to_all=all_to_all,
        all_to_all_leaving=all_to_all * (placement.expert_parallel - 1) // placement.expert_parallel,
        all_gather_experts=sum_received(experts),
        all_gather_rest=sum_received(rest),
        all_gather_later=sum_received(later),
        gradients=handed,
        gradients_leaving=sent,
        bandwidth=placement.bandwidth,
    )


def keeps_for_backward(architecture: Architecture, trainable: Trainable, placement: Placement) -> bool:
    """Whether ZeRO-3, once it has traced a step, keeps every gathered tensor from its forward to its backward.

    It does so where the modules between the two uses hold fewer elements than `max_reuse_distance`, each counted as
    often as it is listed: a tensor is listed with its layer, its attention and itself, before the backward begins with
    the whole model.
    """
    elements = sum(placement.numel(tensor) for tensor in (*architecture.tensors, *trainable.tensors))
    return 3 * elements < placement.max_reuse_distance


def _gathers(tensor: TensorSpec, trainable: Trainable, placement: Placement, workload: Workload, tied: bool) -> int:
    """How often a tensor is gathered in one optimizer step: an upper bound, since ZeRO-3 may keep what it uses soon."""
    if placement.zero_stage == 2:
        return 1 if tensor.component else 0  # the updated weights
    if placement.persists(tensor):
        return 0 if trainable.first_layer is None else 1  # after the step
    if tensor.name.startswith("model.embed_tokens"):
        uses = 3 if tied else 1  # forward; as the head, forward and backward
    elif tensor.layer is None or trainable.first_layer is None:
        uses = 1 if trainable.first_layer is None else 2
    else:
        uses = 2 if tensor.layer >= trainable.first_layer else 1
        if tensor.layer == trainable.first_layer and ".self_attn." in tensor.name and not trainable.attention_first:
            uses = 1  # nothing is trained below it
    return uses * workload.micro_batches

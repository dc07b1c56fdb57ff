"""Bytes on one rank: weights, gradients, optimizer, activations, and what loading reads and holds.

The rules are those of DeepSpeed 0.19.8 with torch's AdamW and of `placement/expert_parallel.py`:

    routed experts, and LoRA on them   E / ep on a rank, partitioned over the world / ep ranks with the same ones
    everything else                    partitioned over the world
    ZeRO-2     weights whole; gradients and optimizer partitioned, each optimizer group padded to 2 x its ranks
    ZeRO-3     every tensor padded to its ranks and cut; one of at most `persistence_threshold` elements on the rank
               stays whole beside its share
    optimizer  two fp32 moments and an fp32 master copy, which is a copy also where the weights are fp32
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.placement.architecture import Architecture
from pipeline.placement.cluster import FP32, Placement, Workload
from pipeline.placement.trainable import Trainable


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, the fullest one."""

    weights_frozen: int  # between steps, whole small tensors included
    weights_trained: int
    weights_whole: int  # of the two above: tensors ZeRO-3 keeps whole beside their shares
    gradients: int  # this rank's partition
    optimizer: int  # this rank's partition: master copy and moments
    gathered: int  # ZeRO-3: gathered for use at the worst moment (an estimate)
    largest_layer: int  # of it: the largest module fetched at once
    buffers: int  # reduction buckets
    activations: int  # an estimate

    @property
    def weights(self) -> int:
        return self.weights_frozen + self.weights_trained

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.buffers + self.activations


@dataclass(frozen=True)
class Loading:
    """Reading the backbone from safetensors in the dtypes it is kept in, on one rank, the fullest, in bytes.

    A slice is read in whole rows, which may reach beyond its ends.
    """

    requested: int  # tensor slices
    resident: int  # held afterwards, before the first pass gathers anything
    largest_layer: int  # of the backbone, whole but for the other ranks' experts

    @property
    def peak(self) -> int:
        """What is held, and one layer."""
        return self.resident + self.largest_layer


def memory_of(architecture: Architecture, trainable: Trainable, placement: Placement, workload: Workload) -> Memory:
    """Bytes on the fullest rank."""
    frozen, trained, whole = 0, 0, 0
    fetched: dict[str, int] = defaultdict(int)  # bytes of a module's tensors that are gathered for its use
    for tensor in (*architecture.tensors, *trainable.tensors):
        size = FP32 if tensor.float32 else workload.element_bytes
        held = placement.numel(tensor)
        if placement.zero_stage == 3:
            held = placement.share(tensor)
            if placement.ranks_of(tensor) > 1 and placement.persists(tensor):
                gathered = placement.share(tensor) * placement.ranks_of(tensor)  # with padding
                held += gathered
                whole += size * gathered
            elif placement.ranks_of(tensor) > 1:
                fetched[_fetched_with(tensor.name)] += size * placement.numel(tensor)
        if tensor.component is None:
            frozen += size * held
        else:
            trained += size * held
    partition = _trained_partition(trainable, placement)
    if placement.zero_stage == 2:
        trained = workload.element_bytes * sum(padded for padded, _ in _zero2_groups(trainable, placement))
    largest = max(fetched.values(), default=0)
    # a module stays gathered after its forward if its backward comes within the reuse distance: twice its way to the
    # middle of the step
    kept = (placement.prefetch_bucket_size + placement.max_reuse_distance // 2) * workload.element_bytes
    return Memory(
        weights_frozen=frozen,
        weights_trained=trained,
        weights_whole=whole,
        gradients=workload.element_bytes * partition,
        optimizer=3 * FP32 * partition,
        gathered=min(sum(fetched.values()), largest + kept),
        largest_layer=largest,
        buffers=workload.element_bytes * placement.reduce_bucket_size if trainable.tensors else 0,
        activations=activations_of(architecture, trainable, workload),
    )


def _trained_partition(trainable: Trainable, placement: Placement) -> int:
    """Trained elements that one rank updates, padding included."""
    if placement.zero_stage == 3:
        return sum(placement.share(tensor) for tensor in trainable.tensors)
    return sum(padded // ranks for padded, ranks in _zero2_groups(trainable, placement))


def _zero2_groups(trainable: Trainable, placement: Placement) -> Iterator[tuple[int, int]]:
    """(elements with padding, ranks) of each optimizer group: a component, its part on routed experts apart."""
    groups: dict[tuple[str | None, bool], int] = defaultdict(int)
    ranks: dict[tuple[str | None, bool], int] = {}
    for tensor in trainable.tensors:
        key = (tensor.component, tensor.expert_owned)
        groups[key] += placement.numel(tensor)
        ranks[key] = placement.ranks_of(tensor)
    for key, numel in groups.items():
        yield math.ceil(numel / (2 * ranks[key])) * 2 * ranks[key], ranks[key]


def _fetched_with(name: str) -> str:
    """The module ZeRO-3 fetches a tensor with: a whole FFN block, an attention projection, or its own module."""
    block = re.match(r"model\.layers\.\d+\.(mlp|self_attn\.\w+)", name)
    return block.group() if block else name.rpartition(".")[0]


def activations_of(architecture: Architecture, trainable: Trainable, workload: Workload) -> int:
    """Bytes kept for backward, an estimate: widths kept per token and layer, times the dtype's size.

    Attention keeps x, its norm, q, k, v and the output (no S x S matrix). A SwiGLU network keeps x, its norm and five
    FFN widths a LoRA expert (both sums, their activation, product and mixture), four more for the adversary's game,
    three where there is no LoRA expert; a routed layer does so for each of the K copies of a token, and keeps a row out
    and a row back of each. Layers below the first trained one keep nothing. With checkpointing a layer keeps its input,
    and one is whole. Logits of the answer tokens are kept in the dtype and twice in fp32.
    """
    width, heads = architecture.hidden_size, architecture.num_heads + architecture.num_kv_heads
    method = trainable.method
    ffn_widths = max(3, 5 * len(method.roles)) + 4 * (method.plays and workload.adversary)
    attention = 2 * width + 2 * heads * architecture.head_dim
    dense = 2 * width + ffn_widths * architecture.dense_width
    routed = 2 * width + architecture.top_k * (2 * width + ffn_widths * architecture.expert_width)
    routed += ffn_widths * architecture.always_on_width
    layers = [attention + (dense if i in architecture.dense_layers else routed) for i in range(architecture.num_layers)]
    if trainable.first_layer is None:
        kept = max(layers)
    elif workload.activation_checkpointing:
        kept = width * len(layers[trainable.first_layer :]) + max(layers)
    else:
        kept = sum(layers[trainable.first_layer :])
    logits = workload.answer_tokens * architecture.vocab_size * (workload.element_bytes + 2 * FP32)
    return workload.tokens * kept * workload.element_bytes + logits


def loading_of(architecture: Architecture, placement: Placement, workload: Workload) -> Loading:
    """What `placement/materialise.py` reads and holds on one rank."""
    requested, resident = 0, 0
    layers: dict[int | None, int] = defaultdict(int)
    for tensor in architecture.tensors:
        size = FP32 if tensor.float32 else workload.element_bytes
        held = placement.share(tensor) if placement.zero_stage == 3 else placement.numel(tensor)
        requested += size * min(held, placement.numel(tensor))
        resident += size * held
        if tensor.layer is not None:
            layers[tensor.layer] += size * placement.numel(tensor)
    return Loading(requested, resident, max(layers.values()))

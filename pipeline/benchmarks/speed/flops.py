"""Floating-point operations of a training step by formula, and the machine's own rate for such matrix products.

Legend: T tokens of a batch, n tokens of one sequence, D model width, F FFN width, H heads of width d, P answer tokens,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.placement.architecture import Architecture
from pipeline.placement.trainable import Trainable

_TIMES = 8  # products of each shape in one sweep


@dataclass(frozen=True)
class StepFlops:
    """Operations of one optimizer step; a multiplication and an addition are two."""

    frozen: int
    attention: int
    low_rank: int
    head: int

    @property
    def total(self) -> int:
        return self.frozen + self.attention + self.low_rank + self.head


def step_flops(
    architecture: Architecture, trainable: Trainable, lengths: Sequence[int], answer_tokens: int
) -> StepFlops:
    """What a step must compute on sequences of `lengths` tokens, with `answer_tokens` of logits; a dense backbone.

    - frozen linear maps of m elements: 2 T m forward, and 2 T m for the gradient of their input; none for weights that
      do not learn. Below the first adapted layer, and in its attention and its gate and up projections, nothing asks
      for that gradient;
    - attention, causal: 2 n^2 H d forward (the two products, half of each) and twice that backward, above the first
      adapted layer;
    - LoRA pairs and gates of m elements: 2 T m forward, 4 T m backward;
    - the LM head: 2 P D V forward and as many backward.

    Left out: norms, activations, softmax, the discriminator, the optimizer, padding, and whatever is computed twice.
    """
    tokens = sum(lengths)
    first = trainable.first_layer
    frozen = attention = 0
    for layer in range(architecture.num_layers):
        projections = sum(rows * columns for rows, columns in architecture.attention_projections(layer).values())
        one_ffn = architecture.hidden_size * architecture.dense_width
        scores = sum(2 * n * n * architecture.num_heads * architecture.head_dim for n in lengths)
        frozen += 2 * tokens * (projections + 3 * one_ffn)
        attention += scores
        if first is not None and layer > first:
            frozen += 2 * tokens * (projections + 3 * one_ffn)
            attention += 2 * scores
        elif layer == first:
            frozen += 2 * tokens * one_ffn
    low_rank = sum(6 * tokens * tensor.numel for tensor in trainable.tensors if tensor.component != "discriminator")
    head = 4 * answer_tokens * architecture.hidden_size * architecture.vocab_size
    return StepFlops(frozen, attention, low_rank, head)


def gemm_shapes(architecture: Architecture) -> list[tuple[int, int]]:
    """(out, in) of every linear map of one dense layer."""
    width, ffn_width = architecture.hidden_size, architecture.dense_width
    ffn = [(ffn_width, width), (ffn_width, width), (width, ffn_width)]
    return [*architecture.attention_projections(0).values(), *ffn]


def gemm_flops(architecture: Architecture, tokens: int) -> int:
    """Operations of one call of `gemm_sweep`."""
    return sum(2 * tokens * out * width * _TIMES for out, width in gemm_shapes(architecture))


def gemm_sweep(
    architecture: Architecture, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], None]:
    """Products of `tokens` rows with the weights of one layer and nothing else, into memory that is there already."""
    work = []
    for out, width in gemm_shapes(architecture):
        x = torch.randn(tokens, width, device=device).to(dtype)
        weight = torch.randn(out, width, device=device).to(dtype)
        work.append((x, weight.T, torch.empty(tokens, out, dtype=dtype, device=device)))

    def sweep(_: int) -> None:
        for x, weight, result in work:
            for _ in range(_TIMES):
                torch.mm(x, weight, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return sweep

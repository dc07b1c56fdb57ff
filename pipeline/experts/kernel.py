"""The expert SwiGLU with its own backward pass: little is kept, nothing is computed twice that costs a matmul.

One function for a dense network, and for the routed experts of a rank, whose tokens stand sorted by routed expert: a
*segment* is a run of tokens that share weights (segment.py). Kept for backward are x, the frozen a and b, and the
low-rank products; gates, activations and h are computed again. Here stand the matmuls; the passes over FFN-wide
tensors, which are what the second LoRA expert costs, are in passes_torch.py and, fused for a CPU, in passes_cpu.py.
swiglu.py is the same in plain autograd, and tests/experts/test_kernel.py holds them against each other.

Legend: C tokens, D model width, F FFN width, R LoRA rank, n LoRA experts, P pooled rows.
"""

from typing import TYPE_CHECKING

import torch

from pipeline.experts.passes_torch import TorchPasses
from pipeline.experts.segment import Frozen, Part, Segment, Shape, Sums, wide

if TYPE_CHECKING:
    from pipeline.experts.passes_cpu import CpuPasses

FUSED_FROM = 512  # FFN width from which a CPU takes the fused passes


class MixedSwiglu(torch.autograd.Function):
    """(y, means): y = W_down (sum_e beta_e h_e) + sum_e L_down,e (beta_e h_e), (C, D), without the bias of W_down, and,
    where asked for, the weighed sums of the shared expert's h over the tokens of each slot, (P, F) a segment.

    The gradient of `means` reaches the LoRA pairs of the shared expert alone: on that path x, a and b are detached.
    """

    @staticmethod
    def forward(ctx, shape: Shape, x, dropped, beta, slot, share, gate, up, down, gate_bias, up_bias, *lora):
        """
        Args:
            x: (C, D); dropped: the same under LoRA's dropout, or None.
            beta: (C, n), or None where one expert speaks alone.
            slot, share: (C,) pooled row of each token, and its share of that row; None where nothing is pooled.
            gate, up, down, gate_bias, up_bias: the `Frozen` weights.
            lora: for each LoRA expert, for each of `shape.targeted`: A and B.
        """
        frozen = Frozen(gate, up, down, gate_bias, up_bias)
        reads, width = x if dropped is None else dropped, down.shape[-1]
        rank, inward = lora[0].shape[-2], len(shape.inward)
        a, b, y = x.new_empty(len(x), width), x.new_empty(len(x), width), x.new_empty(len(x), down.shape[-2])
        low_in = x.new_empty(len(x), inward * rank) if inward else None  # scaling (A x)
        low_down = x.new_empty(len(x), shape.num_experts * rank) if "down_proj" in shape.targeted else None
        groups = 1 if shape.counts is None else len(shape.counts)
        means = torch.zeros(groups, shape.pooled_rows, width, dtype=wide(x), device=x.device)
        passes, noise = _passes(x, width), None
        if shape.dropout and low_down is not None:
            noise = x.new_empty(shape.num_experts, len(x), width).bernoulli_(1 - shape.dropout).div_(1 - shape.dropout)
        for expert, rows in shape.segments(len(x)):
            part = Part(shape, frozen, lora, expert)
            _mm(x[rows], part.gate, gate_bias, a[rows])
            _mm(x[rows], part.up, up_bias, b[rows])
            if low_in is not None:
                torch.mm(reads[rows], part.stacked_a().T, out=low_in[rows]).mul_(shape.scaling)
            segment = Segment.of(shape, part, rows, a, b, low_in, beta, noise, slot, share)
            pooled = means[expert or 0] if shape.pooled_rows else None
            mixed = passes.forward(segment, None if low_down is None else low_down[rows], pooled)
            torch.mm(mixed, part.down.T, out=y[rows])
            if low_down is not None:
                y[rows].addmm_(low_down[rows], part.stacked_down_b().T, alpha=shape.scaling)
        ctx.shape = shape
        ctx.save_for_backward(x, dropped, beta, slot, share, *frozen, a, b, low_in, low_down, noise, *lora)
        return y, means.view(-1, width).to(x.dtype)

    @staticmethod
    def backward(ctx, dy, dmeans):
        shape: Shape = ctx.shape
        x, dropped, beta, slot, share, *rest = ctx.saved_tensors
        frozen, (a, b, low_in, low_down, noise), lora = Frozen(*rest[:5]), rest[5:10], rest[10:]
        reads, width, scaling = x if dropped is None else dropped, frozen.down.shape[-1], shape.scaling
        sums, passes = Sums(shape, lora), _passes(x, width)
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        dreads = dx if dropped is None else torch.zeros_like(x)
        dbeta = None if beta is None else torch.zeros_like(beta)
        dmeans = dmeans.view(-1, shape.pooled_rows, width) if shape.pooled_rows else None
        for expert, rows in shape.segments(len(x)):
            part = Part(shape, frozen, lora, expert)
            dmixed = dy[rows] @ part.down
            dlow_down = None
            if low_down is not None:
                dlow_down = (dy[rows] @ part.stacked_down_b()).mul_(scaling)
                sums.add_stacked("down_proj", 1, expert, (low_down[rows].T @ dy[rows]).mul_(scaling))
            segment = Segment.of(shape, part, rows, a, b, low_in, beta, noise, slot, share)
            above = None if dmeans is None else dmeans[expert or 0]
            found = passes.backward(segment, dmixed, dlow_down, above, None if dbeta is None else dbeta[rows], sums)
            torch.mm(found.da, part.gate, out=dx[rows])
            dx[rows].addmm_(found.db, part.up)
            if low_in is not None:
                dreads[rows].addmm_(found.dlow_in, part.stacked_a())
                pooled = found.dlow_pooled
                sums.add_a(expert, (found.dlow_in if pooled is None else pooled.add_(found.dlow_in)).T @ reads[rows])
        return (None, dx, None if dropped is None else dreads, dbeta, *[None] * 7, *sums.gradients())


def _passes(x: torch.Tensor, width: int) -> "TorchPasses | CpuPasses":
    """The passes for x's device and dtype. Narrow networks are not worth the compiled kernels' import."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and width >= FUSED_FROM:
        from pipeline.experts.passes_cpu import CpuPasses, torchs_openmp  # half a second, and needed on a CPU alone

        if torchs_openmp() is not None:
            return CpuPasses()
    return TorchPasses(x, width)


def _mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)

"""The algebra of LoRA experts on a frozen SwiGLU network, for one network or for many at once (METHODS section 1).

    a = W_gate x, b = W_up x                                  frozen, once
    h_e = act(a + L_gate,e x) * (b + L_up,e x)                one a LoRA expert e
    y = W_down (sum_e beta_e h_e) + sum_e L_down,e (beta_e h_e)

The same formulas hold for a dense network, where a weight is (out, in), and for the routed experts of a rank, where it
is (E, out, in) and tokens are sorted by routed expert: only the linear map differs, so it is an argument.

`plain_mixed` is the formula in plain autograd, for any activation; kernel.py computes the same for SiLU with its own
backward pass.

Legend: C tokens (in any leading shape), D model width, F FFN width, R LoRA rank, E routed experts of this rank.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from pipeline.experts.lora import LoraExpert
from pipeline.experts.passes_torch import membership
from pipeline.experts.segment import Frozen, Shape

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (C, in), weight -> (C, out), no bias


class GroupedLinear:
    """x_c -> W[e_c] x_c for tokens that stand sorted by their routed expert; `counts` of them for each of E experts."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(C, in), (E, out, in) -> (C, out)."""
        return _Grouped.apply(x, weight, self.counts)


class _Grouped(torch.autograd.Function):
    """One matmul an expert, written into one result. Under ZeRO-3 the weight must be kept for backward as the parameter
    itself, which is gathered again by then: views of it would keep every layer's gathered experts alive.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.counts = counts
        y = x.new_empty(len(x), weight.shape[1])
        for expert, rows in _runs(counts):
            torch.mm(x[rows], weight[expert].T, out=y[rows])
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(len(grad), weight.shape[2])
            for expert, rows in _runs(ctx.counts):
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)  # an expert without a token has none
            for expert, rows in _runs(ctx.counts):
                torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _runs(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, with their rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def expert_hidden(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    experts: Sequence[LoraExpert],
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    scaling: float,
    linear: Linear = F.linear,
) -> list[torch.Tensor]:
    """h_e for each LoRA expert, (C, F), from x (C, D) and the frozen a, b (C, F).

    All A-products that read x are one matmul with stacked A.
    """
    pairs = [(i, name) for i, expert in enumerate(experts) for name in ("gate_proj", "up_proj") if name in expert]
    deltas = {}
    if pairs:
        factors = [experts[i][name].factors() for i, name in pairs]
        stacked = torch.cat([lora_a for lora_a, _ in factors], dim=-2)
        lows = linear(x, stacked).chunk(len(pairs), dim=-1)
        for key, low, (_, lora_b) in zip(pairs, lows, factors, strict=True):
            deltas[key] = linear(low, lora_b) * scaling
    result = []
    for i in range(len(experts)):
        gate = a + deltas[i, "gate_proj"] if (i, "gate_proj") in deltas else a
        up = b + deltas[i, "up_proj"] if (i, "up_proj") in deltas else b
        result.append(act_fn(gate) * up)
    return result


def expert_down(
    hidden: Sequence[torch.Tensor], experts: Sequence[LoraExpert], scaling: float, linear: Linear = F.linear
) -> torch.Tensor | None:
    """sum_e L_down,e h_e, (C, D); None where the down-projection is not targeted."""
    if "down_proj" not in experts[0]:
        return None
    factors = [expert["down_proj"].factors() for expert in experts]
    low = [linear(h, lora_a) for h, (lora_a, _) in zip(hidden, factors, strict=True)]
    return linear(torch.cat(low, dim=-1), torch.cat([lora_b for _, lora_b in factors], dim=-1)) * scaling


def add(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """first + second, where there is a second."""
    return first if second is None else first + second


def plain_mixed(
    shape: Shape,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    beta: torch.Tensor | None,
    slot: torch.Tensor | None,
    share: torch.Tensor | None,
    frozen: Frozen,
    experts: Sequence[LoraExpert],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, means) as `kernel.MixedSwiglu` defines them and its arguments."""
    linear = F.linear if shape.counts is None else GroupedLinear(shape.counts)
    if frozen.up is None:
        a, b = linear(x, frozen.gate).chunk(2, dim=-1)
    else:
        a, b = linear(x, frozen.gate), linear(x, frozen.up)
    a, b = (t if bias is None else t + bias for t, bias in ((a, frozen.gate_bias), (b, frozen.up_bias)))
    reads = x if dropped is None else dropped
    hidden = expert_hidden(reads, a, b, experts, act_fn, shape.scaling, linear)
    if beta is not None:
        hidden = [h * beta[:, e : e + 1] for e, h in enumerate(hidden)]
    y = linear(sum(hidden), frozen.down)
    kept = [F.dropout(h, shape.dropout) for h in hidden] if shape.dropout else hidden
    y = add(y, expert_down(kept, experts, shape.scaling, linear))
    if not shape.pooled_rows:
        return y, y.new_zeros(0, frozen.down.shape[-1])
    shared = [experts[shape.shared]]
    (h,) = expert_hidden(reads.detach(), a.detach(), b.detach(), shared, act_fn, shape.scaling, linear)
    counts = [len(x)] if shape.counts is None else list(shape.counts)
    runs = zip(h.split(counts), slot.split(counts), share.split(counts), strict=True)
    return y, torch.cat([membership(where, weight, shape.pooled_rows, part) @ part for part, where, weight in runs])

"""The expert SwiGLU with its own backward pass: little is kept, nothing is computed twice that costs a matmul.

One function for a dense network, and for the routed experts of a rank, whose tokens stand sorted by routed expert: a
*segment* is a run of tokens that share weights. Kept for backward are x, the frozen a and b, and the low-rank products;
gates, activations and h are computed again, block by block of tokens that fit a CPU's cache. swiglu.py is the same in
plain autograd, and tests/experts/test_kernel.py holds the two against each other.

Legend: C tokens, D model width, F FFN width, R LoRA rank, n LoRA experts, P pooled rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK_BYTES = 1 << 19  # of one (block, F) tensor on a CPU; about ten are alive at once


@dataclass(frozen=True)
class Shape:
    """What a mixed SwiGLU must know beside tensors."""

    counts: tuple[int, ...] | None  # tokens of each routed expert of this rank; None: one dense network
    scaling: float
    targeted: tuple[str, ...]  # projections with LoRA pairs
    num_experts: int  # LoRA experts that speak
    dropout: float  # on h, of the low-rank down-projection alone; 0 in evaluation
    pooled_rows: int  # P of one segment; 0: nothing is pooled
    shared: int = 0  # which LoRA expert is pooled

    def segments(self, tokens: int) -> Iterator[tuple[int | None, slice]]:
        """(routed expert or None, its tokens), without the experts that got none."""
        if self.counts is None:
            yield None, slice(0, tokens)
            return
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


class Frozen(NamedTuple):
    """Frozen weights of a SwiGLU: (out, in), or (E, out, in). `up` is None where `gate` holds both, gate first."""

    gate: torch.Tensor
    up: torch.Tensor | None
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None


def _blocks(rows: slice, width: int, like: torch.Tensor) -> Iterator[slice]:
    """Cut a segment into blocks that stay in a CPU's cache; other devices take it whole."""
    size = rows.stop - rows.start
    if like.device.type == "cpu":
        size = max(32, BLOCK_BYTES // (width * like.element_size()))
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _of(weight: torch.Tensor | None, expert: int | None) -> torch.Tensor | None:
    """A segment's own weight: that of its routed expert, where weights are stacked."""
    return weight if weight is None or expert is None else weight[expert]


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
        pairs = _pairs(shape, lora)
        reads = x if dropped is None else dropped
        width = down.shape[-1]
        a, b, y = x.new_empty(len(x), width), x.new_empty(len(x), width), x.new_empty(len(x), down.shape[-2])
        low_in, low_down = _empty_lows(shape, pairs, x)
        groups = 1 if shape.counts is None else len(shape.counts)
        means = torch.zeros(groups, shape.pooled_rows, width, dtype=_wide(x), device=x.device)
        noise = None
        if shape.dropout and "down_proj" in shape.targeted:
            noise = x.new_empty(shape.num_experts, len(x), width).bernoulli_(1 - shape.dropout).div_(1 - shape.dropout)
        for expert, rows in shape.segments(len(x)):
            w_gate, w_up = _two(gate, up, expert)
            _mm(x[rows], w_gate, gate_bias, a[rows])
            _mm(x[rows], w_up, up_bias, b[rows])
            if low_in is not None:
                torch.mm(reads[rows], _stack_a(shape, pairs, expert).T, out=low_in[rows])
            mixed = x.new_empty(rows.stop - rows.start, width)
            for block in _blocks(rows, width, x):
                into = mixed[block.start - rows.start : block.stop - rows.start]
                for e in range(shape.num_experts):
                    h_gate, h_up = _gates(shape, pairs, expert, e, a[block], b[block], low_in, block)
                    h = F.silu(h_gate).mul_(h_up)
                    if shape.pooled_rows and e == shape.shared:
                        means[expert or 0] += membership(slot[block], share[block], shape.pooled_rows, h) @ h
                    if beta is not None:
                        h.mul_(beta[block, e : e + 1])
                    if low_down is not None:
                        kept = h if noise is None else h * noise[e, block]
                        low_a = _of(pairs[e]["down_proj"][0], expert)
                        low_down[block, e * len(low_a) : (e + 1) * len(low_a)] = kept @ low_a.T
                    into.copy_(h) if e == 0 else into.add_(h)
            torch.mm(mixed, _of(down, expert).T, out=y[rows])
            if low_down is not None:
                stacked = torch.cat([_of(pair["down_proj"][1], expert) for pair in pairs], dim=-1)
                y[rows].addmm_(low_down[rows], stacked.T, alpha=shape.scaling)
        ctx.shape = shape
        ctx.save_for_backward(x, dropped, beta, slot, share, gate, up, down, a, b, low_in, low_down, noise, *lora)
        return y, means.view(-1, width).to(x.dtype)

    @staticmethod
    def backward(ctx, dy, dmeans):
        shape = ctx.shape
        x, dropped, beta, slot, share, gate, up, down, a, b, low_in, low_down, noise, *lora = ctx.saved_tensors
        pairs, grads = _pairs(shape, lora), [torch.zeros(p.shape, dtype=_wide(x), device=x.device) for p in lora]
        sums = _pairs(shape, grads)
        reads, width, s = x if dropped is None else dropped, down.shape[-1], shape.scaling
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        dreads = dx if dropped is None else torch.zeros_like(x)
        dbeta = None if beta is None else x.new_empty(beta.shape, dtype=_wide(x))
        dmeans = dmeans.view(-1, shape.pooled_rows, width) if shape.pooled_rows else None
        for expert, rows in shape.segments(len(x)):
            w_gate, w_up = _two(gate, up, expert)
            size = rows.stop - rows.start
            dmixed = dy[rows] @ _of(down, expert)
            dlow_down = None
            if low_down is not None:
                stacked = torch.cat([_of(pair["down_proj"][1], expert) for pair in pairs], dim=-1)
                dlow_down = (dy[rows] @ stacked).mul_(s)
                _add(sums, "down_proj", 1, expert, (dy[rows].T @ low_down[rows]).mul_(s), shape)
            da, db = x.new_empty(size, width), x.new_empty(size, width)
            # gradients of the low-rank products: into the weights everything, into x without the pooled path
            dlow_all = None if low_in is None else x.new_empty(size, low_in.shape[1])
            dlow_x = dlow_all if not shape.pooled_rows or low_in is None else torch.empty_like(dlow_all)
            for block in _blocks(rows, width, x):
                here = slice(block.start - rows.start, block.stop - rows.start)
                for e in range(shape.num_experts):
                    h_gate, h_up = _gates(shape, pairs, expert, e, a[block], b[block], low_in, block)
                    active = F.silu(h_gate)
                    dh = dmixed[here]
                    weigh = None if beta is None else beta[block, e : e + 1]
                    if dlow_down is not None:
                        low_a = _of(pairs[e]["down_proj"][0], expert)
                        mine = dlow_down[here, e * len(low_a) : (e + 1) * len(low_a)]
                        h = active * h_up
                        if noise is None:
                            dh = torch.addmm(dh, mine, low_a)
                            kept = h
                        else:
                            dh = torch.addcmul(dh, mine @ low_a, noise[e, block])
                            kept = h * noise[e, block]
                        mine = mine if weigh is None else mine * weigh
                        _accumulate(sums[e]["down_proj"][0], expert, mine.T @ kept)
                    elif weigh is not None:
                        h = active * h_up
                    if weigh is not None:
                        dbeta[block, e] = h.mul_(dh).sum(dim=-1, dtype=dbeta.dtype)
                        dh = dh * weigh
                    d_up = dh * active
                    d_gate = torch.ops.aten.silu_backward(dh * h_up, h_gate)
                    if e == 0:
                        da[here], db[here] = d_gate, d_up
                    else:
                        da[here] += d_gate
                        db[here] += d_up
                    if low_in is None:
                        continue
                    pooled = shape.pooled_rows and e == shape.shared
                    if pooled:
                        _low_gradients(shape, pairs, None, expert, e, d_gate, d_up, low_in, block, dlow_x, here)
                        member = membership(slot[block], share[block], shape.pooled_rows, dh)
                        more = member.T @ dmeans[expert or 0]
                        d_up = torch.addcmul(d_up, more, active)
                        d_gate = torch.ops.aten.silu_backward(more.mul_(h_up), h_gate).add_(d_gate)
                    into = dlow_all
                    _low_gradients(shape, pairs, sums, expert, e, d_gate, d_up, low_in, block, into, here)
                    if dlow_x is not dlow_all and not pooled:
                        _copy_lows(shape, pairs, e, dlow_all, dlow_x, here)
            torch.mm(da, w_gate, out=dx[rows])
            dx[rows].addmm_(db, w_up)
            if low_in is not None:
                dreads[rows].addmm_(dlow_x, _stack_a(shape, pairs, expert))
                _add_a(shape, sums, expert, dlow_all.T @ reads[rows], pairs)
        flat = [grad.to(p.dtype) for grad, p in zip(grads, lora, strict=True)]
        dbeta = None if dbeta is None else dbeta.to(beta.dtype)
        return (None, dx, None if dropped is None else dreads, dbeta, *[None] * 7, *flat)


Pairs = list[dict[str, tuple[torch.Tensor, torch.Tensor]]]  # for each LoRA expert: projection -> A, B


def _pairs(shape: Shape, flat: Sequence[torch.Tensor]) -> Pairs:
    each = len(shape.targeted)
    return [
        {name: (flat[2 * (e * each + i)], flat[2 * (e * each + i) + 1]) for i, name in enumerate(shape.targeted)}
        for e in range(shape.num_experts)
    ]


def _two(gate: torch.Tensor, up: torch.Tensor | None, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen gate and up projection of a segment, (F, D) each."""
    if up is None:
        return _of(gate, expert).chunk(2)
    return _of(gate, expert), _of(up, expert)


def _mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _inward(shape: Shape) -> list[tuple[int, str]]:
    """The pairs that read x, in the order of their columns in `low_in`."""
    return [(e, name) for e in range(shape.num_experts) for name in ("gate_proj", "up_proj") if name in shape.targeted]


def _columns(shape: Shape, pairs: Pairs, e: int, name: str) -> slice:
    rank = pairs[e][name][0].shape[-2]
    place = _inward(shape).index((e, name))
    return slice(place * rank, (place + 1) * rank)


def _stack_a(shape: Shape, pairs: Pairs, expert: int | None) -> torch.Tensor:
    return torch.cat([_of(pairs[e][name][0], expert) for e, name in _inward(shape)])


def _empty_lows(shape: Shape, pairs: Pairs, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rank = next(iter(pairs[0].values()))[0].shape[-2]
    inward = len(_inward(shape))
    low_in = x.new_empty(len(x), inward * rank) if inward else None
    return low_in, x.new_empty(len(x), shape.num_experts * rank) if "down_proj" in shape.targeted else None


def _gates(shape, pairs, expert, e, a, b, low_in, block) -> tuple[torch.Tensor, torch.Tensor]:
    """a + L_gate x and b + L_up x of one LoRA expert on one block."""
    result = []
    for name, frozen in (("gate_proj", a), ("up_proj", b)):
        if name in shape.targeted:
            low_b = _of(pairs[e][name][1], expert)
            low = low_in[block, _columns(shape, pairs, e, name)]
            frozen = torch.addmm(frozen, low, low_b.T, alpha=shape.scaling)
        result.append(frozen)
    return result[0], result[1]


def _low_gradients(shape, pairs, sums, expert, e, d_gate, d_up, low_in, block, into, here) -> None:
    """Gradients of one LoRA expert's low-rank products on one block, and, into `sums`, of its B's."""
    for name, d in (("gate_proj", d_gate), ("up_proj", d_up)):
        if name in shape.targeted:
            columns = _columns(shape, pairs, e, name)
            into[here, columns] = (d @ _of(pairs[e][name][1], expert)).mul_(shape.scaling)
            if sums is not None:
                _accumulate(sums[e][name][1], expert, (d.T @ low_in[block, columns]).mul_(shape.scaling))


def _copy_lows(shape, pairs, e, source, into, here) -> None:
    for name in ("gate_proj", "up_proj"):
        if name in shape.targeted:
            columns = _columns(shape, pairs, e, name)
            into[here, columns] = source[here, columns]


def _add_a(shape, sums, expert, stacked: torch.Tensor, pairs) -> None:
    """Share out the gradient of the stacked A's, (rows, D)."""
    for e, name in _inward(shape):
        _accumulate(sums[e][name][0], expert, stacked[_columns(shape, pairs, e, name)])


def _add(sums, name, place, expert, stacked: torch.Tensor, shape) -> None:
    """Share out the gradient of the stacked B's of the down-projection, (D, n R)."""
    for e, part in enumerate(stacked.chunk(shape.num_experts, dim=-1)):
        _accumulate(sums[e][name][place], expert, part)


def _accumulate(total: torch.Tensor, expert: int | None, part: torch.Tensor) -> None:
    (total if expert is None else total[expert]).add_(part)


def membership(slot: torch.Tensor, share: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """(P, block): the share of each token in its pooled row."""
    member = like.new_zeros(rows, len(slot))
    member[slot, torch.arange(len(slot), device=slot.device)] = share.to(like.dtype)
    return member


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

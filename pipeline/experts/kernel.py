"""The expert SwiGLU with its own backward pass: little is kept, nothing is computed twice that costs a matmul.

One function for a dense network, and for the routed experts of a rank, whose tokens stand sorted by routed expert: a
*segment* is a run of tokens that share weights. Kept for backward are x, the frozen a and b, and the low-rank products;
gates, activations and h are computed again. Passes over FFN-wide tensors are what the second LoRA expert costs, so the
gate's weights are applied to low-rank products wherever that is the same. swiglu.py is the same in plain autograd, and
tests/experts/test_kernel.py holds the two against each other.

Legend: C tokens, D model width, F FFN width, R LoRA rank, n LoRA experts, P pooled rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

silu, silu_backward = torch.ops.aten.silu, torch.ops.aten.silu_backward

BLOCK_BYTES = 1 << 23


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
    sums_to_one: bool = False  # beta does, over the experts that speak

    @property
    def inward(self) -> list[tuple[int, str]]:
        """(LoRA expert, projection) of the pairs that read x, in the order of their columns among low-rank products."""
        names = [name for name in ("gate_proj", "up_proj") if name in self.targeted]
        return [(e, name) for e in range(self.num_experts) for name in names]

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
        means = torch.zeros(groups, shape.pooled_rows, width, dtype=_wide(x), device=x.device)
        scratch, noise = _Scratch(x, width), None
        if shape.dropout and low_down is not None:
            noise = x.new_empty(shape.num_experts, len(x), width).bernoulli_(1 - shape.dropout).div_(1 - shape.dropout)
        for expert, rows in shape.segments(len(x)):
            part = _Part(shape, frozen, lora, expert)
            _mm(x[rows], part.gate, gate_bias, a[rows])
            _mm(x[rows], part.up, up_bias, b[rows])
            if low_in is not None:
                torch.mm(reads[rows], part.stacked_a().T, out=low_in[rows]).mul_(shape.scaling)
            mixed = x.new_empty(rows.stop - rows.start, width)
            for block, here in _blocks(rows, width, x):
                scratch.rows = block.stop - block.start
                for e in range(shape.num_experts):
                    h_gate, h_up = part.gates(e, a[block], b[block], low_in, block, scratch)
                    into = mixed[here]
                    active = silu.out(h_gate, out=scratch("active"))
                    h = torch.mul(active, h_up, out=into if e == 0 else active)
                    weigh = None if beta is None else beta[block, e : e + 1]
                    if shape.pooled_rows and e == shape.shared:
                        means[expert or 0] += membership(slot[block], share[block], shape.pooled_rows, h) @ h
                    if low_down is not None:
                        kept = h if noise is None else h * noise[e, block]
                        product = torch.mm(kept, part.pairs[e]["down_proj"][0].T)
                        low_down[block, part.columns(e)] = product if weigh is None else product * weigh
                    _mix(into, h, e, weigh, shape.sums_to_one)
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
        sums, scratch = _Sums(shape, lora), _Scratch(x, frozen.down.shape[-1])
        reads, width, scaling = x if dropped is None else dropped, frozen.down.shape[-1], shape.scaling
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        dreads = dx if dropped is None else torch.zeros_like(x)
        dbeta = None if beta is None else torch.zeros_like(beta)
        one = x.new_ones(())
        dmeans = dmeans.view(-1, shape.pooled_rows, width) if shape.pooled_rows else None
        for expert, rows in shape.segments(len(x)):
            part = _Part(shape, frozen, lora, expert)
            size = rows.stop - rows.start
            dmixed = dy[rows] @ part.down
            dlow_down = None
            if low_down is not None:
                dlow_down = (dy[rows] @ part.stacked_down_b()).mul_(scaling)
                sums.add_stacked("down_proj", 1, expert, (low_down[rows].T @ dy[rows]).mul_(scaling))
            da, db = x.new_empty(size, width), x.new_empty(size, width)
            # gradients of the low-rank products A x: those that go on into x, and those of the pooled path alone
            dlow_in = None if low_in is None else x.new_empty(size, low_in.shape[1])
            dlow_pooled = None
            if low_in is not None and shape.pooled_rows:
                dlow_pooled = x.new_zeros(size, low_in.shape[1])
            for block, here in _blocks(rows, width, x):
                scratch.rows = block.stop - block.start
                for e in range(shape.num_experts):
                    h_gate, h_up = part.gates(e, a[block], b[block], low_in, block, scratch)
                    active = silu.out(h_gate, out=scratch("active"))
                    weigh = None if beta is None else beta[block, e : e + 1]
                    dh = dmixed[here]  # before the gate's weight
                    if weigh is not None or dlow_down is not None:
                        h = torch.mul(active, h_up, out=scratch("h"))
                    if dlow_down is not None:
                        low_a = part.pairs[e]["down_proj"][0]
                        mine = dlow_down[here, part.columns(e)]
                        kept = h if noise is None else h * noise[e, block]
                        sums.add(e, "down_proj", 0, expert, (mine if weigh is None else mine * weigh).T @ kept)
                        if noise is None:
                            dh = torch.addmm(dh, mine, low_a, out=scratch("dh"))
                        else:
                            dh = torch.addcmul(dh, mine @ low_a, noise[e, block], out=scratch("dh"))
                    if weigh is not None:
                        dbeta[block, e] = h.mul_(dh).sum(dim=-1)
                    d_up = torch.mul(dh, active, out=db[here] if e == 0 else scratch("d_up"))
                    d_gate = da[here] if e == 0 else scratch("d_gate")
                    pooled = dlow_pooled is not None and e == shape.shared
                    if pooled or (weigh is not None and e == shape.shared):  # the same with and without the game
                        slope = silu_backward.grad_input(one.expand_as(h_gate), h_gate, grad_input=scratch("slope"))
                        torch.mul(dh, slope.mul_(h_up), out=d_gate)
                    else:
                        silu_backward.grad_input(torch.mul(dh, h_up, out=scratch("h")), h_gate, grad_input=d_gate)
                    both = {"gate_proj": d_gate, "up_proj": d_up}
                    part.low_gradients(sums, e, both, weigh, low_in, block, dlow_in, here)
                    if pooled:
                        torch.index_select(dmeans[expert or 0], 0, slot[block], out=(more := scratch("dh")))
                        both = {"gate_proj": slope.mul_(more), "up_proj": active.mul_(more)}
                        weigh_pooled = share[block].to(x.dtype).unsqueeze(1)
                        part.low_gradients(sums, e, both, weigh_pooled, low_in, block, dlow_pooled, here)
                    _mix(da[here], d_gate, e, weigh, shape.sums_to_one)
                    _mix(db[here], d_up, e, weigh, shape.sums_to_one)
            torch.mm(da, part.gate, out=dx[rows])
            dx[rows].addmm_(db, part.up)
            if low_in is not None:
                dreads[rows].addmm_(dlow_in, part.stacked_a())
                total = dlow_in if dlow_pooled is None else dlow_pooled.add_(dlow_in)
                sums.add_a(expert, total.T @ reads[rows])
        return (None, dx, None if dropped is None else dreads, dbeta, *[None] * 7, *sums.gradients())


class _Part:
    """The weights of one segment: those of its routed expert where they are stacked."""

    def __init__(self, shape: Shape, frozen: Frozen, lora: Sequence[torch.Tensor], expert: int | None) -> None:
        self.shape, self.expert = shape, expert
        self.down = _of(frozen.down, expert)
        if frozen.up is None:
            self.gate, self.up = _of(frozen.gate, expert).chunk(2)
        else:
            self.gate, self.up = _of(frozen.gate, expert), _of(frozen.up, expert)
        weights = iter(lora)
        self.pairs = [  # for each LoRA expert: projection -> A, B
            {name: (_of(next(weights), expert), _of(next(weights), expert)) for name in shape.targeted}
            for _ in range(shape.num_experts)
        ]
        self.rank = _of(lora[0], expert).shape[0]

    def stacked_a(self) -> torch.Tensor:
        """The A's that read x, one below the other."""
        return torch.cat([self.pairs[e][name][0] for e, name in self.shape.inward])

    def stacked_down_b(self) -> torch.Tensor:
        """The B's of the down-projection side by side, (D, n R)."""
        return torch.cat([pair["down_proj"][1] for pair in self.pairs], dim=-1)

    def columns(self, place: int) -> slice:
        """The columns of the pair at `place` among low-rank products."""
        return slice(place * self.rank, (place + 1) * self.rank)

    def gates(self, e: int, a, b, low_in, block: slice, scratch: "_Scratch") -> tuple[torch.Tensor, torch.Tensor]:
        """a + L_gate x and b + L_up x of one LoRA expert on one block, (block, F) each."""
        results = []
        for name, frozen in (("gate_proj", a), ("up_proj", b)):
            if name in self.shape.targeted:
                low = low_in[block, self.columns(self.shape.inward.index((e, name)))]
                frozen = torch.addmm(frozen, low, self.pairs[e][name][1].T, out=scratch(f"h_{name}"))
            results.append(frozen)
        return results[0], results[1]

    def low_gradients(self, sums: "_Sums", e: int, both, weigh, low_in, block: slice, into, here: slice) -> None:
        """From the gradients of one LoRA expert's two gates, before the mixing weight, those of its low-rank products
        (`into`) and of its B's (`sums`).
        """
        for name, d in both.items():
            if name in self.shape.targeted:
                columns = self.columns(self.shape.inward.index((e, name)))
                low, dlow = low_in[block, columns], (d @ self.pairs[e][name][1]).mul_(self.shape.scaling)
                if weigh is not None:
                    low, dlow = low * weigh, dlow.mul_(weigh)
                into[here, columns] = dlow
                sums.add(e, name, 1, self.expert, low.T @ d)


class _Scratch:
    """Named FFN-wide buffers that every block writes again: on a CPU they stay in its cache, fresh memory would not."""

    def __init__(self, like: torch.Tensor, width: int) -> None:
        self.like, self.width, self.rows = like, width, 0
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The buffer `name`, (rows, F)."""
        if name not in self.buffers or len(self.buffers[name]) < self.rows:
            self.buffers[name] = self.like.new_empty(self.rows, self.width)
        return self.buffers[name][: self.rows]


class _Sums:
    """Gradients of the LoRA weights over blocks and segments, summed in at least fp32. Those of B's lie transposed."""

    def __init__(self, shape: Shape, lora: Sequence[torch.Tensor]) -> None:
        self.shape, self.lora = shape, lora
        self.totals: list[torch.Tensor | None] = [None] * len(lora)
        if shape.counts is not None:
            for place, weight in enumerate(lora):
                like = weight if place % 2 == 0 else weight.mT
                self.totals[place] = torch.zeros(like.shape, dtype=_wide(weight), device=weight.device)

    def add(self, e: int, name: str, side: int, expert: int | None, part: torch.Tensor) -> None:
        """Add to the gradient of A (side 0), (R, in), or B (side 1), (R, out), of one LoRA expert's pair."""
        place = 2 * (e * len(self.shape.targeted) + self.shape.targeted.index(name)) + side
        total = self.totals[place]
        if expert is not None:
            total[expert].add_(part)
        else:
            self.totals[place] = part if total is None else total.to(_wide(part)).add_(part)

    def add_a(self, expert: int | None, stacked: torch.Tensor) -> None:
        """Share out the gradients of the A's that read x, (rows, D), in the order of `Shape.inward`."""
        pairs = self.shape.inward
        for (e, name), part in zip(pairs, stacked.chunk(len(pairs)), strict=True):
            self.add(e, name, 0, expert, part)

    def add_stacked(self, name: str, side: int, expert: int | None, stacked: torch.Tensor) -> None:
        """Share out gradients that stand one LoRA expert below the other, (n R, ...)."""
        for e, part in enumerate(stacked.chunk(self.shape.num_experts)):
            self.add(e, name, side, expert, part)

    def gradients(self) -> list[torch.Tensor]:
        """One a LoRA weight, of its shape and dtype; zero where no token came."""
        found = []
        for place, (total, weight) in enumerate(zip(self.totals, self.lora, strict=True)):
            if total is None:
                total = torch.zeros_like(weight)
            elif place % 2:
                total = total.mT
            found.append(total.to(weight.dtype))
        return found


def _mix(into: torch.Tensor, part: torch.Tensor, e: int, weigh: torch.Tensor | None, sums_to_one: bool) -> None:
    """Add one LoRA expert's share to a mixture; the first `part` is `into` itself.

    Of two weights that sum to one the second alone is read, which saves two passes.
    """
    if weigh is None:
        return
    if sums_to_one and e < 2:
        if e == 1:
            into.lerp_(part, weigh)
    elif e == 0:
        into.mul_(weigh)
    else:
        into.addcmul_(part, weigh)


def membership(slot: torch.Tensor, share: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """(P, block): the share of each token in its pooled row."""
    member = like.new_zeros(rows, len(slot))
    member[slot, torch.arange(len(slot), device=slot.device)] = share.to(like.dtype)
    return member


def _blocks(rows: slice, width: int, like: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut a segment into blocks, (place among all tokens, place in the segment), that bound what is alive at once on a
    CPU; other devices take it whole.
    """
    size = rows.stop - rows.start
    if like.device.type == "cpu":
        size = max(32, BLOCK_BYTES // (width * like.element_size()))
    for start in range(rows.start, rows.stop, size):
        stop = min(start + size, rows.stop)
        yield slice(start, stop), slice(start - rows.start, stop - rows.start)


def _of(weight: torch.Tensor, expert: int | None) -> torch.Tensor:
    """A segment's own weight: that of its routed expert, where weights are stacked."""
    return weight if expert is None else weight[expert]


def _mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

"""The passes over FFN-wide tensors in torch's own operations: any device and dtype.

On a CPU a segment is cut into blocks whose buffers stay in the cache; other devices take it whole. The gate's weights
are applied to low-rank products wherever that is the same, since each of these operations is one more pass.

Legend: C tokens of the segment, F FFN width, R LoRA rank, n LoRA experts, P pooled rows.
"""

from collections.abc import Iterator

import torch

from pipeline.experts.segment import Backward, Segment, Sums

silu, silu_backward = torch.ops.aten.silu, torch.ops.aten.silu_backward

BLOCK_BYTES = 1 << 23


class TorchPasses:
    """Between the frozen matmuls: what the LoRA experts do to a and b, forward and backward."""

    def __init__(self, like: torch.Tensor, width: int) -> None:
        self.scratch = _Scratch(like, width)

    def forward(self, segment: Segment, low_down: torch.Tensor | None, means: torch.Tensor | None) -> torch.Tensor:
        """sum_e beta_e h_e, (C, F).

        Args:
            low_down: (C, n R), filled with beta_e A_down,e h_e; None where the down-projection has no pairs.
            means: (P, F), to which the shared expert's share-weighed h is added; None where nothing is pooled.
        """
        shape, part, scratch = segment.shape, segment.part, self.scratch
        mixed = torch.empty_like(segment.a)
        for block in _blocks(segment.a):
            scratch.rows = block.stop - block.start
            for e in range(shape.num_experts):
                h_gate, h_up = _gates(segment, e, block, scratch)
                into = mixed[block]
                active = silu.out(h_gate, out=scratch("active"))
                h = torch.mul(active, h_up, out=into if e == 0 else active)
                weigh = None if segment.beta is None else segment.beta[block, e : e + 1]
                if means is not None and e == shape.shared:
                    means += membership(segment.slot[block], segment.share[block], shape.pooled_rows, h) @ h
                if low_down is not None:
                    kept = h if segment.noise is None else h * segment.noise[e, block]
                    product = torch.mm(kept, part.pairs[e]["down_proj"][0].T)
                    low_down[block, part.columns(e)] = product if weigh is None else product * weigh
                _mix(into, h, e, weigh, shape.sums_to_one)
        return mixed

    def backward(
        self,
        segment: Segment,
        dmixed: torch.Tensor,
        dlow_down: torch.Tensor | None,
        dmeans: torch.Tensor | None,
        dbeta: torch.Tensor | None,
        sums: Sums,
    ) -> Backward:
        """
        Args:
            dmixed: (C, F), the gradient of what `forward` returned through the frozen down-projection alone.
            dlow_down: (C, n R), that of A_down,e (beta_e h_e).
            dmeans: (P, F).
            dbeta: (C, n), filled.
            sums: gets the gradients of the B's that make gates and of the A's that read h.
        """
        shape, part, beta, noise, scratch = segment.shape, segment.part, segment.beta, segment.noise, self.scratch
        one = dmixed.new_ones(())
        da, db = torch.empty_like(dmixed), torch.empty_like(dmixed)
        dlow_in = None if segment.low_in is None else torch.empty_like(segment.low_in)
        dlow_pooled = None if segment.low_in is None or dmeans is None else torch.zeros_like(segment.low_in)
        for block in _blocks(dmixed):
            scratch.rows = block.stop - block.start
            for e in range(shape.num_experts):
                h_gate, h_up = _gates(segment, e, block, scratch)
                active = silu.out(h_gate, out=scratch("active"))
                weigh = None if beta is None else beta[block, e : e + 1]
                dh = dmixed[block]  # before the gate's weight
                if weigh is not None or dlow_down is not None:
                    h = torch.mul(active, h_up, out=scratch("h"))
                if dlow_down is not None:
                    low_a = part.pairs[e]["down_proj"][0]
                    mine = dlow_down[block, part.columns(e)]
                    kept = h if noise is None else h * noise[e, block]
                    sums.add(e, "down_proj", 0, part.expert, (mine if weigh is None else mine * weigh).T @ kept)
                    if noise is None:
                        dh = torch.addmm(dh, mine, low_a, out=scratch("dh"))
                    else:
                        dh = torch.addcmul(dh, mine @ low_a, noise[e, block], out=scratch("dh"))
                if weigh is not None:
                    dbeta[block, e] = h.mul_(dh).sum(dim=-1)
                d_up = torch.mul(dh, active, out=db[block] if e == 0 else scratch("d_up"))
                d_gate = da[block] if e == 0 else scratch("d_gate")
                pooled = dlow_pooled is not None and e == shape.shared
                if pooled or (weigh is not None and e == shape.shared):  # the same with and without the game
                    slope = silu_backward.grad_input(one.expand_as(h_gate), h_gate, grad_input=scratch("slope"))
                    torch.mul(dh, slope.mul_(h_up), out=d_gate)
                else:
                    silu_backward.grad_input(torch.mul(dh, h_up, out=scratch("h")), h_gate, grad_input=d_gate)
                both = {"gate_proj": d_gate, "up_proj": d_up}
                _low_gradients(segment, sums, e, both, weigh, dlow_in, block)
                if pooled:
                    torch.index_select(dmeans, 0, segment.slot[block], out=(more := scratch("dh")))
                    both = {"gate_proj": slope.mul_(more), "up_proj": active.mul_(more)}
                    weigh_pooled = segment.share[block].to(dmixed.dtype).unsqueeze(1)
                    _low_gradients(segment, sums, e, both, weigh_pooled, dlow_pooled, block)
                _mix(da[block], d_gate, e, weigh, shape.sums_to_one)
                _mix(db[block], d_up, e, weigh, shape.sums_to_one)
        return Backward(da, db, dlow_in, dlow_pooled)


def _gates(segment: Segment, e: int, block: slice, scratch: "_Scratch") -> tuple[torch.Tensor, torch.Tensor]:
    """a + L_gate x and b + L_up x of one LoRA expert on one block, (block, F) each."""
    results = []
    for name, frozen in (("gate_proj", segment.a[block]), ("up_proj", segment.b[block])):
        if name in segment.shape.targeted:
            low = segment.low_in[block, _columns(segment, e, name)]
            frozen = torch.addmm(frozen, low, segment.part.pairs[e][name][1].T, out=scratch(f"h_{name}"))
        results.append(frozen)
    return results[0], results[1]


def _low_gradients(segment: Segment, sums: Sums, e: int, both, weigh, into, block: slice) -> None:
    """From the gradients of one LoRA expert's two gates, before the mixing weight, those of its low-rank products
    (`into`) and of its B's (`sums`).
    """
    for name, d in both.items():
        if name in segment.shape.targeted:
            columns = _columns(segment, e, name)
            low = segment.low_in[block, columns]
            dlow = (d @ segment.part.pairs[e][name][1]).mul_(segment.shape.scaling)
            if weigh is not None:
                low, dlow = low * weigh, dlow.mul_(weigh)
            into[block, columns] = dlow
            sums.add(e, name, 1, segment.part.expert, low.T @ d)


def _columns(segment: Segment, e: int, name: str) -> slice:
    return segment.part.columns(segment.shape.inward.index((e, name)))


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


def _blocks(like: torch.Tensor) -> Iterator[slice]:
    """Cut a segment's tokens into blocks that bound what is alive at once on a CPU; other devices take it whole."""
    rows, width = like.shape
    size = max(32, BLOCK_BYTES // (width * like.element_size())) if like.device.type == "cpu" else rows
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))

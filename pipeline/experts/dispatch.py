"""Send each token to the ranks that hold its routed experts, and bring the results back.

A rank sorts its token copies (one for each of a token's K experts) by expert and sends each to the expert's rank; the
owner sorts what came by its own experts. Without a group every expert is here and nothing is sent. What travels:

    counts   per layer and pass: copies for each routed expert, and the number of sequences, as int64
    states   forward: one row of D a copy, out and back; backward: the same two again
    notes    while pooled features are asked for: share in its sequence's mean, and sequence slot, of each copy, fp32
    pooled   while they are asked for: one row of D a (sending rank, sequence) and owner; backward: the same

Legend: T tokens, K top-k, E routed experts (of all ranks), D model width, B sequences, C copies on their owner.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist


class AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group and rows from them, (sum of in_splits, ...) -> (sum of out_splits, ...).

    Backward sends the gradients the way the rows came from.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, out_splits: list[int], in_splits: list[int], group: Any) -> torch.Tensor:
        ctx.splits = out_splits, in_splits, group
        return _exchange(rows, out_splits, in_splits, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        out_splits, in_splits, group = ctx.splits
        return _exchange(grad, in_splits, out_splits, group), None, None, None


def _exchange(rows: torch.Tensor, out_splits: list[int], in_splits: list[int], group: Any) -> torch.Tensor:
    received = rows.new_empty((sum(out_splits), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), out_splits, in_splits, group=group)
    return received


@dataclass(frozen=True)
class Route:
    """Where the copies of one pass go and come from. Splits count rows for, and from, each rank of the group."""

    order: torch.Tensor  # (T * K,) the copies, sorted by routed expert
    top_k: int
    in_splits: list[int]  # copies to each rank
    out_splits: list[int]  # copies from each rank
    regroup: torch.Tensor  # (C,) the received copies, sorted by local expert
    counts: list[int]  # copies for each local expert
    sequences: list[int]  # sequences of each sending rank; zeros where no pooled features are asked for
    group: Any  # expert-parallel group; None: nothing is sent

    def dispatch(self, x: torch.Tensor) -> torch.Tensor:
        """Token states (T, D), or notes (T, K, n), to the owners: (C, D) or (C, n), sorted by local expert."""
        copies = x.flatten(0, 1)[self.order] if x.dim() == 3 else x[self.order // self.top_k]
        if self.group is not None:
            copies = AllToAll.apply(copies, self.out_splits, self.in_splits, self.group)
        return copies[self.regroup]

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Results (C, D) back to their tokens, summed under the route weights (T, K): (T, D)."""
        back = torch.empty_like(y).index_copy(0, self.regroup, y)
        if self.group is not None:
            back = AllToAll.apply(back, self.in_splits, self.out_splits, self.group)
        copies = torch.empty_like(back).index_copy(0, self.order, back).view(*weights.shape, -1)
        wide = torch.promote_types(y.dtype, torch.float32)
        return (copies * weights.to(wide).unsqueeze(-1)).sum(dim=1).to(y.dtype)

    def slots(self, notes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From dispatched notes (C, 2): share, zero for padding, and slot among all senders' sequences, (C,) each."""
        offsets = torch.tensor([0, *self.sequences[:-1]], device=notes.device).cumsum(0)
        sender = torch.arange(len(self.out_splits), device=notes.device).repeat_interleave(
            torch.tensor(self.out_splits, device=notes.device)
        )
        return notes[:, 0], notes[:, 1].long() + offsets[sender[self.regroup]]

    def home(self, pooled: torch.Tensor) -> torch.Tensor:
        """Sums for every sender's sequences (sum of sequences, D) to their senders, summed over owners: (B, D)."""
        if self.group is None:
            return pooled
        rank = dist.get_rank(self.group)
        own = [self.sequences[rank]] * len(self.sequences)
        back = AllToAll.apply(pooled, own, self.sequences, self.group)
        return back.view(len(self.sequences), self.sequences[rank], -1).sum(dim=0)


def route(chosen: torch.Tensor, num_experts: int, num_sequences: int, group: Any) -> Route:
    """Agree on the way of one pass. `chosen` (T, K): the routed experts of each token. Collective over the group.

    The ranks of the group hold equal runs of experts, in rank order.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    per_expert = torch.bincount(flat, minlength=num_experts)
    if group is None:
        everything = torch.arange(len(order), device=order.device)
        counts = per_expert.tolist()
        return Route(order, chosen.shape[1], [len(order)], [len(order)], everything, counts, [num_sequences], None)
    size = dist.get_world_size(group)
    sequences = per_expert.new_full((size, 1), num_sequences)
    sent = torch.cat([per_expert.view(size, -1), sequences], dim=1)  # (ranks, local experts + 1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    table, by_sender = sent.tolist(), received.tolist()  # the one wait for the device
    counts = [[row[e] for row in by_sender] for e in range(sent.shape[1] - 1)]  # (local experts, ranks)
    # received: sender after sender, each sorted by expert; wanted: expert after expert
    expert = torch.arange(sent.shape[1] - 1, device=order.device).repeat(size)
    regroup = expert.repeat_interleave(received[:, :-1].flatten()).argsort(stable=True)
    return Route(
        order=order,
        top_k=chosen.shape[1],
        in_splits=[sum(row[:-1]) for row in table],
        out_splits=[sum(row[:-1]) for row in by_sender],
        regroup=regroup,
        counts=[sum(row) for row in counts],
        sequences=[row[-1] for row in by_sender],
        group=group,
    )

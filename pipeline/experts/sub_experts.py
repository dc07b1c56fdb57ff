"""Sparse sub-experts: a pool of K LoRA experts on one weight, shared by all tasks (METHODS section 4).

A task chooses k of the K by learned weights, and of a chosen one the share `density` of its parameters by learned
scores. What earlier tasks have claimed it may read, never write:

    value = earlier tasks' value where claimed, its own elsewhere       no gradient reaches a claimed place
    used  = value * mask, mask the top `density` of score + head start  d mask / d score = 1 (straight through)
    added to the weight: sum over chosen sub-experts j of g_j B_j A_j,  g = k * softmax of their matches

Both factors are seen as *blocks*, (..., K, N): a sub-expert's N parameters of A (R * in) or of B transposed (R * out).

Legend: E routed experts (a leading dimension where there are any), K sub-experts, k chosen ones, R rank of one, N as
above.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.experts.lora import LoraPair
from pipeline.experts.pool import SubExperts, num_kept


@dataclass
class Claims:
    """What earlier tasks left in the blocks of one factor; tensors (..., K, N) on the device."""

    owner: torch.Tensor  # int16: which earlier bank file claimed the parameter, -1 for none
    value: torch.Tensor  # of claimed parameters, in the working precision
    head: torch.Tensor  # fp32, added to the scores: parameters of similar tasks' masks have a head start

    def to(self, device: torch.device, dtype: torch.dtype) -> "Claims":
        """On a device, the values in the working precision."""
        return Claims(self.owner.to(device), self.value.to(device, dtype), self.head.to(device))


class SparsePair(LoraPair):
    """The sub-experts of one frozen weight as one pair of rank K * R, with the scores and matches of the task at hand.

    `factors` gives those of the chosen, masked sub-experts alone: rank k * R. While `served` is set it gives that.
    """

    def __init__(
        self, weight_shape: tuple[int, ...], rank: int, pool: SubExperts, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(weight_shape, pool.number * rank, dtype, device)
        self.sub_experts, self.rank = pool, rank
        experts = weight_shape[:-2]
        a, b = (blocks.detach() for blocks in self.blocks(self.lora_A, self.lora_B))
        self.shapes = a.shape, b.shape  # of the blocks, also while ZeRO-3 keeps the parameters cut up
        self.score_A, self.score_B = nn.Parameter(torch.zeros_like(a)), nn.Parameter(torch.zeros_like(b))
        self.match = nn.Parameter(torch.zeros(*experts, pool.number, 1, dtype=dtype, device=device))  # (..., K, 1)
        self.prior = torch.zeros_like(self.match, dtype=torch.float32)  # (..., K, 1) added to `match`; no parameter
        self.claims: tuple[Claims, Claims] | None = None  # of A and of B
        self.served: tuple[torch.Tensor, torch.Tensor] | None = None  # (..., k * R, in), (..., out, k * R)

    def blocks(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., K * R, in), (..., out, K * R) -> (..., K, R * in), (..., K, R * out)."""
        a, b = (t.unflatten(-2, (self.sub_experts.number, -1)).flatten(-2) for t in (lora_a, lora_b.mT))
        return a, b

    def joined(self, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (..., k * R, in), (..., out, k * R) of chosen blocks (..., k, N), weighed by (..., k)."""
        b = b * weights.unsqueeze(-1).to(b.dtype)
        a, b = (t.unflatten(-1, (self.rank, -1)).flatten(-3, -2) for t in (a, b))
        return a, b.mT

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.served is not None:
            return self.served
        chosen, weights = choose(self.match + self.prior, self.sub_experts.top_k)
        used = []
        parts = zip(self.blocks(self.lora_A, self.lora_B), (self.score_A, self.score_B), strict=True)
        for side, (blocks, scores) in enumerate(parts):
            value, ranking, _ = self.standing(side, blocks, scores, chosen)
            mask = keep_mask(ranking.detach(), self.sub_experts.density).to(value.dtype)
            score = taken(scores, chosen)
            used.append(value * (mask + (score - score.detach())))
        return self.joined(*used, weights)

    def standing(
        self, side: int, blocks: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of the chosen A (side 0) or B (side 1): value, score with head start, owner, each (..., k, N)."""
        value, ranking = taken(blocks, chosen), taken(scores, chosen)
        if self.claims is None:
            return value, ranking, None
        claims = self.claims[side]
        owner = taken(claims.owner, chosen)
        value = torch.where(owner >= 0, taken(claims.value, chosen), value)
        return value, ranking + taken(claims.head, chosen), owner


def choose(match: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` sub-experts that match best: matches (..., K, 1) -> their numbers, ascending, and weights (..., k),
    whose mean is 1.
    """
    match = match.squeeze(-1)
    chosen = match.detach().topk(top_k, dim=-1).indices.sort(dim=-1).values
    return chosen, top_k * torch.softmax(match.gather(-1, chosen), dim=-1, dtype=torch.float32)


def taken(blocks: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen sub-experts' blocks: (..., K, N), (..., k) -> (..., k, N)."""
    return torch.take_along_dim(blocks, chosen.unsqueeze(-1), dim=-2)


def keep_mask(scores: torch.Tensor, density: float) -> torch.Tensor:
    """The highest scores of each block: (..., N) -> bool (..., N)."""
    best = scores.topk(num_kept(scores.shape[-1], density), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

"""What a pass over the tokens of an expert SwiGLU reads: weights, low-rank products and notes of one *segment*, a run
of tokens that share weights, and where it leaves the gradients of the LoRA weights. kernel.py says what is computed.

Legend: C tokens, D model width, F FFN width, R LoRA rank, n LoRA experts, P pooled rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


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
    sums_to_one: bool = False  # two experts speak, and beta sums to one over them

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


class Part:
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


class Segment(NamedTuple):
    """One run of C tokens through the same weights."""

    shape: Shape
    part: Part
    a: torch.Tensor  # W_gate x, (C, F)
    b: torch.Tensor  # W_up x, (C, F)
    low_in: torch.Tensor | None  # scaling (A x) of the pairs in `Shape.inward`, (C, n_inward R)
    beta: torch.Tensor | None  # (C, n)
    noise: torch.Tensor | None  # dropout on h, (n, C, F)
    slot: torch.Tensor | None  # (C,) pooled row of each token
    share: torch.Tensor | None  # (C,) its share of that row

    @classmethod
    def of(cls, shape: Shape, part: Part, rows: slice, a, b, low_in, beta, noise, slot, share) -> "Segment":
        """The rows of one segment out of all tokens' tensors."""
        cut = [None if tensor is None else tensor[rows] for tensor in (a, b, low_in, beta)]
        noise = None if noise is None else noise[:, rows]
        return cls(shape, part, *cut, noise, *(None if tensor is None else tensor[rows] for tensor in (slot, share)))


class Backward(NamedTuple):
    """What the backward pass of a segment finds beside the gradients of LoRA weights."""

    da: torch.Tensor  # (C, F)
    db: torch.Tensor  # (C, F)
    dlow_in: torch.Tensor | None  # of A x, (C, n_inward R): what goes on into x
    dlow_pooled: torch.Tensor | None  # the same shape: what the pooled path adds for the A's alone


class Sums:
    """Gradients of the LoRA weights over blocks and segments, summed in at least fp32. Those of B's lie transposed."""

    def __init__(self, shape: Shape, lora: Sequence[torch.Tensor]) -> None:
        self.shape, self.lora = shape, lora
        self.totals: list[torch.Tensor | None] = [None] * len(lora)
        if shape.counts is not None:
            for place, weight in enumerate(lora):
                like = weight if place % 2 == 0 else weight.mT
                self.totals[place] = torch.zeros(like.shape, dtype=wide(weight), device=weight.device)

    def add(self, e: int, name: str, side: int, expert: int | None, part: torch.Tensor) -> None:
        """Add to the gradient of A (side 0), (R, in), or B (side 1), (R, out), of one LoRA expert's pair."""
        place = 2 * (e * len(self.shape.targeted) + self.shape.targeted.index(name)) + side
        total = self.totals[place]
        if expert is not None:
            total[expert].add_(part)
        else:
            self.totals[place] = part if total is None else total.to(wide(part)).add_(part)

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


def _of(weight: torch.Tensor, expert: int | None) -> torch.Tensor:
    """A segment's own weight: that of its routed expert, where weights are stacked."""
    return weight if expert is None else weight[expert]


def wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

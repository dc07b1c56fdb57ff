"""`olora`: a new LoRA for each task, its A kept orthogonal to all earlier A's, all of them summed.

Source: O-LoRA, arXiv 2310.14152. Increment t trains (A_t, B_t) with the earlier pairs frozen and speaking along, and

    loss + weight * sum over i < t, over rows j of A_i and k of A_t, of <A_i[j], A_t[k]>^2

in every adapted projection (of routed experts: in each of them by itself). Every task is served with the sum of all
pairs, W x + alpha / r * sum_i B_i A_i x, which is exactly one pair of rank t * r: the A's stacked, the B's side by
side. Nothing is merged into the backbone; a bundle names the experts it sums: {"adapter": the newest, "past.1": ...}.
So a step and a forward pass cost a rank that grows with the stream, a bank file does not. A known task that is learned
again gets a new pair like any other.
"""

from collections.abc import Mapping

import torch
from pydantic import Field

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan, pairs_of
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import (
    Bundle,
    Increment,
    Penalty,
    PlainLora,
    RetentionOptions,
    Study,
    past_of,
)
from pipeline.placement.learner import Learner
from pipeline.placement.state import Source


class Options(Section):
    """Options of `olora`."""

    lora: LoraOptions = LoraOptions()
    weight: float = Field(0.5, ge=0)  # of the penalty: lambda_1 of the authors' code


class OLora(PlainLora):
    """A fresh LoRA expert an increment; every task is served with the sum of all."""

    def __init__(self, options: Options) -> None:
        super().__init__(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="follow"))
        self.weight = options.weight

    def start(self, increment: Increment) -> dict[str, str | None]:
        return dict.fromkeys(self.roles)

    def past(self, increment: Increment, study: Study) -> list[tuple[str, float]]:
        latest = increment.latest
        return [(digest, 1.0) for digest in [*past_of(latest), *([latest["adapter"]] if latest else [])]]

    def penalties(self, learner: Learner, start: Source) -> Mapping[str, Penalty]:
        pairs = pairs_of(learner.experts)["adapter"]
        return {
            f"adapter/{path}.lora_A": orthogonality(self.weight, pair.past[0].float())
            for path, pair in pairs.items()
            if pair.past is not None
        }

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        return dict(new)


def orthogonality(weight: float, earlier: torch.Tensor) -> Penalty:
    """weight * |A_earlier A^T|^2: A is (..., R, in), the stacked earlier ones (..., P, in)."""
    return lambda value: weight * (earlier @ value.mT).square().sum()


def build(options: Options) -> OLora:
    return OLora(options)

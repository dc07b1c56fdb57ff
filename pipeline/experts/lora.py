"""LoRA experts: low-rank pairs on projections, and which projections of a backbone are adapted.

A *site* is a module whose projections can be adapted: a dense FFN, the routed experts of a block (one pair for each of
them), the always-on FFN of a block, an attention.

Legend: E routed experts, R LoRA rank.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn

from data_contracts.errors import UserError
from pipeline.backbones.families import ATTENTION_PROJECTIONS, PROJECTIONS, Family
from pipeline.config import Section
from pipeline.files import seed_of

SCORE_SPREAD = 0.01  # scores of sub-experts start uniform from 0 to this


class LoraOptions(Section):
    """Shape of the LoRA experts. `W x + (alpha / rank) B A x`."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    # a projection's name, or a pattern over its path such as `experts.*` or `model.layers.[0-9].mlp.up_proj`
    targets: tuple[str, ...] = Field(PROJECTIONS, min_length=1)


class LoraPair(nn.Module):
    """A (R, in) and B (out, R): the product B A is added to one frozen weight (out, in).

    For the routed experts of a block, (E, R, in) and (E, out, R): one pair an expert, those of this rank alone.

    Frozen pairs of earlier tasks may be added on top: sum_k w_k B_k A_k is one pair of all their ranks, with w_k in B.
    """

    def __init__(self, weight_shape: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        *experts, out_features, in_features = weight_shape
        self.lora_A = nn.Parameter(torch.zeros(*experts, rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_features, rank, dtype=dtype, device=device))
        self.past: tuple[torch.Tensor, torch.Tensor] | None = None  # (..., P, in), (..., out, P): no parameters

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of all that is added to the frozen weight: (..., P + R, in) and (..., out, P + R)."""
        if self.past is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.past[0], self.lora_A], dim=-2), torch.cat([self.past[1], self.lora_B], dim=-1)


class LoraExpert(nn.ModuleDict):
    """One LoRA expert of one site: a `LoraPair` for each targeted projection."""


@dataclass(frozen=True)
class Site:
    """A module whose projections can carry LoRA pairs, and what they are called."""

    path: str  # public: model.layers.3.mlp, ...mlp.experts, ...mlp.shared_mlp, ...self_attn
    projections: tuple[str, ...]


def sites(family: Family, model: nn.Module) -> Iterator[Site]:
    """Every site of a backbone, first layer first, the FFN of a layer before its attention."""
    attentions = dict(enumerate(family.attentions(model)))
    for index, (path, _, ffn) in enumerate(family.feed_forwards(model)):
        if family.is_routed(ffn):
            yield Site(f"{path}.{family.routed.experts}", PROJECTIONS)
            if family.routed.always_on:
                yield Site(f"{path}.{family.routed.always_on}", PROJECTIONS)
        else:
            yield Site(path, PROJECTIONS)
        name, attention = attentions[index]
        yield Site(name, tuple(p for p in ATTENTION_PROJECTIONS if hasattr(attention, p)))


def targeted_projections(family: Family, model: nn.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """Which projections of which site are adapted: {site path: [projection, ...]}, first layer first.

    Raises UserError for a pattern that matches nothing, naming what there is to match.
    """
    matched: dict[str, list[str]] = {}
    unused = set(targets)
    for site in sites(family, model):
        for projection in site.projections:
            full = f"{site.path}.{projection}"
            hits = {
                t for t in targets if t == full or fnmatch.fnmatchcase(full, f"*.{t}") or fnmatch.fnmatchcase(full, t)
            }
            if hits:
                unused -= hits
                matched.setdefault(site.path, []).append(projection)
    if unused:
        last = next(iter(family.feed_forwards(model)))[0].rpartition(".")[0]
        there = [f"{s.path}.{s.projections[0]}" for s in sites(family, model) if s.path.startswith(f"{last}.")]
        raise UserError(
            f"method.lora.targets: {', '.join(sorted(unused))} matches no projection; there are "
            f"{', '.join(PROJECTIONS)} in feed-forward networks and {', '.join(ATTENTION_PROJECTIONS)} in attention, "
            f"for example {', '.join(there)}"
        )
    return matched


def initial_value(name: str, shape: tuple[int, ...], seed: str, first_expert: int = 0) -> torch.Tensor:
    """The start value of a trainable tensor, fp32 on CPU: A is uniform as PEFT's Kaiming start, so are the scores of
    sub-experts (`score_...`, from 0 to `SCORE_SPREAD`); everything else is zero.

    Drawn from (seed, name, routed expert) alone, so that it depends on neither the world size nor the order of
    creation; a rank draws its own routed experts, of which `first_expert` is the first.
    """
    value = torch.zeros(shape)
    kind = name.rpartition(".")[2]
    if kind == "lora_A" or kind.startswith("score_"):
        bound = 1.0 / math.sqrt(shape[-1])  # kaiming_uniform with a = sqrt(5)
        low, high = (-bound, bound) if kind == "lora_A" else (0.0, SCORE_SPREAD)
        keys = [f"{seed}/{name}/{first_expert + e}" for e in range(shape[0])] if len(shape) == 3 else [f"{seed}/{name}"]
        for key, part in zip(keys, value if len(shape) == 3 else [value], strict=True):
            generator = torch.Generator().manual_seed(seed_of(key))
            part.uniform_(low, high, generator=generator)
    return value

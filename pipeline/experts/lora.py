"""A LoRA expert: low-rank pairs on the projections of one SwiGLU feed-forward network.

Legend: D model width, F FFN width, R LoRA rank.
"""

import fnmatch
import math
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import nn

from data_contracts.errors import UserError
from pipeline.backbones.families import PROJECTIONS, DenseFamily
from pipeline.config import Section
from pipeline.files import sha256_text


class LoraOptions(Section):
    """Shape of the LoRA experts. `W x + (alpha / rank) B A x`."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    # a projection's name, or a pattern over its path such as `model.layers.[0-9].mlp.up_proj`
    targets: tuple[str, ...] = Field(PROJECTIONS, min_length=1)


class LoraPair(nn.Module):
    """A (R, in) and B (out, R): the product B A is added to one frozen weight (out, in)."""

    def __init__(self, weight_shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        out_features, in_features = weight_shape
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))


class LoraExpert(nn.ModuleDict):
    """One LoRA expert of one FFN: a `LoraPair` for each targeted projection (keys of `PROJECTIONS`)."""


def targeted_projections(family: DenseFamily, model: nn.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """Which projections of which FFN are adapted: {FFN path: [projection, ...]}, first layer first.

    Raises UserError for a pattern that matches nothing, naming what there is to match.
    """
    matched: dict[str, list[str]] = {}
    unused = set(targets)
    for path, _, _ in family.feed_forwards(model):
        for projection in PROJECTIONS:
            full = f"{path}.{projection}"
            hits = {
                t for t in targets if t == full or fnmatch.fnmatchcase(full, f"*.{t}") or fnmatch.fnmatchcase(full, t)
            }
            if hits:
                unused -= hits
                matched.setdefault(path, []).append(projection)
    if unused:
        first = next(iter(family.feed_forwards(model)))[0]
        raise UserError(
            f"method.lora.targets: {', '.join(sorted(unused))} matches no projection; "
            f"there are {', '.join(PROJECTIONS)} in every layer, for example {first}.{PROJECTIONS[0]}"
        )
    return matched


def initial_value(name: str, shape: tuple[int, ...], seed: str) -> torch.Tensor:
    """The start value of a trainable tensor, fp32 on CPU: A is uniform as PEFT's Kaiming start, everything else is
    zero.

    Drawn from (seed, name) alone, so that it depends on neither the world size nor the order of creation.
    """
    if not name.endswith("lora_A"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int(sha256_text(f"{seed}/{name}")[:15], 16))
    bound = 1.0 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

"""What a task keeps of a pool of sub-experts, as named tensors: masks as bits, and values of what it claimed first.

For each adapted weight `path` and each of its factors `path.A`, `path.B` (blocks as sub_experts.py defines them):

    path.chosen     (..., k)             uint8    numbers of the chosen sub-experts, ascending
    path.weights    (..., k)             fp32     their weights
    path.A.mask     (..., k, N / 8)      uint8    one bit a parameter, rounded up to bytes: the task uses it
    path.A.new      (..., k, kept / 8)   uint8    one bit a used parameter, in order: this task claimed it
    path.A.values   (claimed,)           fp32     their values, in order

So a value is stored once, by the task that claimed it; whoever else uses it stores a bit, and reads the value there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_contracts.errors import UserError
from pipeline.experts.sub_experts import SparsePair
from pipeline.tensor_files import Experts, TensorFile

SIDES = ("A", "B")


@dataclass(frozen=True)
class Claim:
    """What one bank file says of one factor, of this rank's routed experts alone. On the CPU."""

    mask: torch.Tensor  # bool (..., K, N)
    new: torch.Tensor  # bool (..., K, N), part of the mask
    values: torch.Tensor  # (claimed here,) fp32, in the order of `new`
    claimed: int  # parameters claimed in all routed experts


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """Bool (..., N) -> uint8 (..., N / 8 rounded up), the first flag in the lowest bit."""
    return torch.from_numpy(np.packbits(flags.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (..., size / 8 rounded up) -> bool (..., size)."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=size, bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_))


def claim_tensors(
    path: str, side: str, mask: torch.Tensor, new: torch.Tensor, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The bank's tensors of one factor: bool masks and values of the chosen sub-experts, (..., k, N) each."""
    kept = int(mask.sum(dim=-1).flatten()[0])
    return {
        f"{path}.{side}.mask": pack_bits(mask),
        f"{path}.{side}.new": pack_bits(new[mask].view(*mask.shape[:-1], kept)),
        f"{path}.{side}.values": values[new].float().cpu(),
    }


def read_claim(source: TensorFile, path: str, side: str, pair: SparsePair, experts: Experts) -> Claim:
    """What a bank file says of one factor of a pair. Raises UserError where the pair has too few sub-experts for it."""
    number, size = pair.sub_experts.number, pair.shapes[SIDES.index(side)][-1]
    chosen = source.read(f"{path}.chosen", experts).long()
    if (highest := int(chosen.max())) >= number:
        raise UserError(
            f"method.sub_experts is {number}, but an earlier task chose number {highest + 1} of {path}; set it back: "
            "the pool may grow, not shrink"
        )
    mask = unpack_bits(source.read(f"{path}.{side}.mask", experts), size)
    every = unpack_bits(source.read(f"{path}.{side}.new"), int(mask.sum(dim=-1).flatten()[0]))
    own = every if experts is None else every[slice(*experts)]
    start = 0 if experts is None else int(every[: experts[0]].sum())
    values = source.read(f"{path}.{side}.values", (start, start + int(own.sum())))
    new = torch.zeros_like(mask)
    new[mask] = own.flatten()
    whole = (*mask.shape[:-2], number, size)
    where = chosen.unsqueeze(-1).expand(mask.shape)
    mask, new = (torch.zeros(whole, dtype=torch.bool).scatter_(-2, where, part) for part in (mask, new))
    return Claim(mask, new, values, int(every.sum()))


def masked_values(own: Claim, earlier: Sequence[Claim]) -> torch.Tensor:
    """The task's masked blocks (..., K, N), fp32: values from the files that claimed them, zero outside its mask.

    Raises UserError where a parameter of the mask is in none of the files.
    """
    values, known = torch.zeros(own.mask.shape), torch.zeros_like(own.mask)
    for claim in (*earlier, own):
        values[claim.new] = claim.values
        known |= claim.new
    if bool((own.mask & ~known).any()):
        raise UserError(
            "a bundle uses parameters that none of its files holds; run jobs/audit.py, and restore the manifest or the "
            "bank file that it names from a backup"
        )
    return values * own.mask


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors as they are stored, without names."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

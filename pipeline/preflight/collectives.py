"""The collectives of the run that is to come, once each with its sizes: are the results right, how long do they take.

Every element of a result is known beforehand and exact in bfloat16.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from pipeline.placement.distributed import World
from pipeline.placement.expert_parallel import ExpertParallel
from pipeline.preflight.sizes import Sizes

TIMES = 3  # measured, after one that opens the connections
LARGEST = 1 << 30  # bytes of one buffer, also where the run's is larger
SMALL = 1 << 16  # bytes: what is sent where this run sends nothing
_VALUES = 128  # different numbers, all exact in bfloat16


@dataclass(frozen=True)
class Measured:
    """One collective on one rank."""

    name: str
    bytes: int  # that the rank handed over (all-gather: received)
    seconds: float  # median
    right: bool
    note: str = ""


def measure(
    world: World, parallel: ExpertParallel | None, sizes: Sizes, dtype: torch.dtype, most: int = LARGEST
) -> list[Measured]:
    """All of them on every rank alike, with buffers of at most so many bytes. Collective."""
    group, size, rank = (parallel.group, parallel.size, parallel.rank) if parallel else (None, world.size, world.rank)
    share = f"a routed layer's token copies, expert-parallel {size}"
    runs = [
        ("all-reduce", sizes.gradients * sizes.element_bytes, "LoRA gradients", partial(all_reduce, world)),
        ("all-gather", sizes.gathered, "ZeRO-3's largest layer", partial(all_gather, world)),
        ("all-to-all", sizes.token_copies, share, partial(all_to_all, world, group, size, rank)),
    ]
    measured = []
    for name, wanted, note, make in runs:
        numel = max(1, min(wanted or SMALL, most) // sizes.element_bytes)
        note = f"{note}, cut" if wanted > most else note if wanted else "not used by this run"
        once = make(numel, dtype)
        timed = [once() for _ in range(TIMES + 1)]
        seconds = statistics.median(seconds for seconds, _ in timed[1:])
        right = all(good for _, good in timed)
        measured.append(Measured(name, numel * sizes.element_bytes, seconds, right, note))
    return measured


def all_reduce(world: World, numel: int, dtype: torch.dtype) -> Callable[[], tuple[float, bool]]:
    """Rank r hands over ones at every position i with i mod world = r: the sum is one everywhere."""
    places = torch.arange(numel, device=world.device) % world.size

    def once() -> tuple[float, bool]:
        data = (places == world.rank).to(dtype)
        seconds = _seconds(lambda: dist.all_reduce(data))
        return seconds, bool((data == 1).all())

    return once


def all_gather(world: World, numel: int, dtype: torch.dtype) -> Callable[[], tuple[float, bool]]:
    """Rank r's share is r everywhere (modulo the values used)."""
    share = max(1, numel // world.size)
    own = torch.full((share,), world.rank % _VALUES, dtype=dtype, device=world.device)
    expected = (torch.arange(world.size, device=world.device) % _VALUES).to(dtype).repeat_interleave(share)

    def once() -> tuple[float, bool]:
        whole = torch.empty(share * world.size, dtype=dtype, device=world.device)
        seconds = _seconds(lambda: dist.all_gather_into_tensor(whole, own))
        return seconds, torch.equal(whole, expected)

    return once


def all_to_all(
    world: World, group: Any, size: int, rank: int, numel: int, dtype: torch.dtype
) -> Callable[[], tuple[float, bool]]:
    """Rank i of a group of `size` sends i * size + j to rank j (modulo the values used)."""
    share = max(1, numel // size)
    others = torch.arange(size, device=world.device)
    sent = ((rank * size + others) % _VALUES).to(dtype).repeat_interleave(share)
    expected = ((others * size + rank) % _VALUES).to(dtype).repeat_interleave(share)

    def once() -> tuple[float, bool]:
        received = torch.empty_like(sent)
        seconds = _seconds(lambda: dist.all_to_all_single(received, sent, group=group))
        return seconds, torch.equal(received, expected)

    return once


def _seconds(work: Callable[[], Any]) -> float:
    """Wall time of a collective until its result is there."""
    accelerator = get_accelerator()
    accelerator.synchronize()
    begin = time.perf_counter()
    work()
    accelerator.synchronize()
    return time.perf_counter() - begin

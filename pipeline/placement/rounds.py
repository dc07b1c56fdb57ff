"""Deal forward passes to the ranks so that all of them run the same number, as ZeRO-3 needs."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.data.batching import cut
from pipeline.placement.distributed import World


def run_batches(
    world: World, lengths: Sequence[int], batch_tokens: int, work: Callable[[list[int]], Any]
) -> list[tuple[list[int], Any]]:
    """Run `work(rows)` on batches of rows of like length; every (rows, result), in batch order per rank, on every rank.

    The batches depend on the lengths alone; rank r takes every world-size-th of them from the r-th on. A rank without a
    batch left repeats the shortest row and drops the result. Collective.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = cut(longest_first, lengths, len(lengths), batch_tokens)
    own = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    done = [(rows, work(rows)) for rows in own]
    for _ in range(rounds - len(own)):
        work([longest_first[-1]])
    return [item for part in world.gather(done) for item in part]

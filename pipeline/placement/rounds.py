"""Deal forward passes to the ranks so that all of them run the same number, as ZeRO-3 needs."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.data.batching import cut
from pipeline.placement.distributed import World
from pipeline.watch.rank import report


def run_batches(
    world: World, lengths: Sequence[int], batch_tokens: int, work: Callable[[list[int]], Any]
) -> list[tuple[list[int], Any]]:
    """Run `work(rows)` on batches of rows of like length; every (rows, result), in batch order per rank, on every rank.

    The batches depend on the lengths and the world size alone; rank r takes every world-size-th of them from the r-th
    on. A rank without a batch left repeats the shortest row and drops the result. Collective.
    """
    done: list[tuple[list[int], Any]] = []
    each_batch(world, lengths, batch_tokens, work, lambda rows, result: done.append((rows, result)))
    return [item for part in world.gather(done) for item in part]


def each_batch(
    world: World,
    lengths: Sequence[int],
    batch_tokens: int,
    work: Callable[[list[int]], Any],
    keep: Callable[[list[int], Any], None],
) -> None:
    """The same, each result handed to `keep(rows, result)` on the rank that made it: nothing is gathered, every row
    counts once. Collective where `work` is.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = cut(longest_first, lengths, len(lengths), fair_budget(sum(lengths), batch_tokens, world.size))
    own = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    for rows in own:
        report()
        keep(rows, work(rows))
    for _ in range(rounds - len(own)):
        report()
        work([longest_first[-1]])


def fair_budget(tokens: int, batch_tokens: int, world_size: int) -> int:
    """The token budget, at most `batch_tokens`, that cuts `tokens` into about as many batches for every rank.

    With the whole budget, one batch might hold all rows, and one rank would do all the work.
    """
    rounds = -(-tokens // (world_size * batch_tokens))
    return min(batch_tokens, -(-tokens // (world_size * rounds)))

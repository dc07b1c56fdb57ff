"""Which rows a step learns from, and how they are cut for ranks and forward passes. Pure functions of seed, step and
lengths.

A global batch is a list of rows fixed by seed and step alone. It is cut into rank shares and into micro-batches of
rows of like length under a token budget. All ranks run the same number of micro-batches; a spare one has weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_contracts.errors import UserError
from pipeline.files import seed_of


def row_order(num_rows: int, epochs: int, seed: int) -> np.ndarray:
    """The row numbers in the order they are learned: `epochs` seeded permutations, one after another. (epochs *
    num_rows,)
    """
    drawn = [np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in range(epochs)]
    return np.concatenate(drawn)


def select_rows(num_rows: int, limit: int | None, seed: int, name: str) -> np.ndarray:
    """At most `limit` row numbers, ascending, drawn from (seed, name) alone."""
    if limit is None or limit >= num_rows:
        return np.arange(num_rows)
    generator = np.random.default_rng([seed, seed_of(name)])
    return np.sort(generator.permutation(num_rows)[:limit])


def num_steps(num_rows: int, epochs: int, batch_size: int) -> int:
    """Optimizer steps of an increment; the last global batch may be smaller."""
    return -(-num_rows * epochs // batch_size)


def global_batch(order: np.ndarray, step: int, batch_size: int) -> np.ndarray:
    """Rows of global batch `step` (from 0). Continuing at step k is continuing at row k * batch_size."""
    return order[step * batch_size : (step + 1) * batch_size]


@dataclass(frozen=True)
class MicroRows:
    """One micro-batch of a rank: places in the global batch. A spare one repeats a row with weight 0."""

    places: tuple[int, ...]
    weight: float


def rank_shares(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Places of a batch dealt to ranks, longest first and back and forth, so that ranks get like token counts."""
    by_length = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index, place in enumerate(by_length):
        lap, seat = divmod(index, world_size)
        shares[seat if lap % 2 == 0 else world_size - 1 - seat].append(place)
    return shares


def cut(share: Sequence[int], lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Cut places (longest first) into groups of at most `max_rows` whose padded size stays within `max_tokens`.

    Packed sequences never take more than the padded size.

    A row longer than the budget stands alone.
    """
    groups: list[list[int]] = []
    for place in share:
        if groups and len(groups[-1]) < max_rows and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def micro_batches(
    lengths: Sequence[int], rank: int, world_size: int, max_rows: int, max_tokens: int
) -> list[MicroRows]:
    """The forward passes of `rank` for one batch whose rows have `lengths` tokens.

    Every rank gets the same number of them. Without rows of its own a rank repeats the shortest with weight 0.
    """
    shares = [cut(share, lengths, max_rows, max_tokens) for share in rank_shares(lengths, world_size)]
    count = max(len(share) for share in shares)
    own = [MicroRows(tuple(places), 1.0) for places in shares[rank]]
    shortest = min(range(len(lengths)), key=lambda place: (lengths[place], place))
    return own + [MicroRows((shortest,), 0.0)] * (count - len(own))


def check_batch_sizes(batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise UserError, printing all numbers, unless the global batch divides over ranks and micro-batches."""
    share, rest = divmod(batch_size, world_size)
    if rest or share % min(micro_batch_size, share or 1):
        raise UserError(
            f"training.batch_size {batch_size} does not divide over {world_size} ranks x micro_batch_size "
            f"{micro_batch_size}; make it a multiple of {world_size * micro_batch_size} or lower micro_batch_size"
        )

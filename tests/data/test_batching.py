"""Global batches are fixed by seed and step alone; cutting them for ranks and passes loses and doubles no row."""

from collections import Counter

import numpy as np
import pytest

from data_contracts.errors import UserError
from pipeline.data.batching import (
    check_batch_sizes,
    cut,
    global_batch,
    micro_batches,
    num_steps,
    rank_shares,
    row_order,
    select_rows,
)
from pipeline.placement.distributed import World
from pipeline.placement.rounds import fair_budget, run_batches

WORLDS = (1, 2, 3)


def some_lengths(rows: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, rows).tolist()


def walk(lengths, epochs, batch_size, world_size, max_rows, max_tokens, seed=5, first_step=0):
    """Every (step, rank, micro-batch of row numbers, weight) of an increment."""
    order = row_order(len(lengths), epochs, seed)
    for step in range(first_step, num_steps(len(lengths), epochs, batch_size)):
        rows = global_batch(order, step, batch_size)
        batch_lengths = [lengths[row] for row in rows]
        for rank in range(world_size):
            for part in micro_batches(batch_lengths, rank, world_size, max_rows, max_tokens):
                yield step, rank, [int(rows[place]) for place in part.places], part.weight


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "max_rows", "max_tokens"),
    [(37, 3, 6, 4, 100), (37, 1, 6, 1, 10_000), (5, 2, 12, 3, 64), (24, 2, 6, 100, 30), (1, 4, 6, 2, 50)],
)
def test_every_row_is_learned_once_an_epoch(world_size, rows, epochs, batch_size, max_rows, max_tokens):
    lengths = some_lengths(rows)
    seen = Counter()
    for _, _, part, weight in walk(lengths, epochs, batch_size, world_size, max_rows, max_tokens):
        if weight:
            seen.update(part)
    assert seen == dict.fromkeys(range(rows), epochs)


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_pass_keeps_both_budgets_and_a_longer_row_stands_alone(world_size):
    lengths = some_lengths(60, seed=1)
    max_rows, max_tokens = 5, 48
    alone = 0
    for _, _, part, _ in walk(lengths, 2, 12, world_size, max_rows, max_tokens):
        size = len(part) * max(lengths[row] for row in part)
        assert len(part) <= max_rows and (size <= max_tokens or len(part) == 1)
        alone += len(part) == 1 and size > max_tokens
    assert alone >= 2


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_ranks_run_the_same_number_of_passes_and_spare_ones_weigh_nothing(world_size):
    lengths = [50, 3, 2, 2, 40, 1, 1]
    for size in range(1, len(lengths) + 1):  # fewer rows than ranks too
        cuts = [micro_batches(lengths[:size], rank, world_size, 2, 60) for rank in range(world_size)]
        assert len({len(passes) for passes in cuts}) == 1
        real = [place for passes in cuts for part in passes if part.weight for place in part.places]
        assert sorted(real) == list(range(size))
        spare = [part for passes in cuts for part in passes if not part.weight]
        assert all(len(part.places) == 1 and lengths[part.places[0]] == min(lengths[:size]) for part in spare)
        assert {part.weight for passes in cuts for part in passes} <= {0.0, 1.0}


def test_global_batches_do_not_depend_on_the_world_size():
    lengths = some_lengths(31, seed=2)
    batches = []
    for world_size in WORLDS:
        by_step: dict[int, list[int]] = {}
        for step, _, part, weight in walk(lengths, 2, 6, world_size, 4, 90):
            if weight:
                by_step.setdefault(step, []).extend(part)
        batches.append({step: sorted(rows) for step, rows in by_step.items()})
    assert batches[0] == batches[1] == batches[2]


def test_ranks_get_like_token_counts():
    lengths = some_lengths(96, seed=3)
    shares = [sum(lengths[place] for place in share) for share in rank_shares(lengths, 3)]
    assert max(shares) - min(shares) <= max(lengths)


@pytest.mark.parametrize("world_size", WORLDS)
def test_continuing_at_any_step_is_the_tail_of_the_unbroken_run(world_size):
    lengths = some_lengths(20, seed=4)
    whole = list(walk(lengths, 3, 6, world_size, 4, 80))
    for first in range(11):
        tail = list(walk(lengths, 3, 6, world_size, 4, 80, first_step=first))
        assert tail == [item for item in whole if item[0] >= first]
    assert num_steps(20, 3, 6) == 10 and tail == []


def test_the_order_is_whole_permutations_drawn_from_seed_and_epoch_alone():
    order = row_order(13, 4, seed=9)
    epochs = order.reshape(4, 13)
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert np.array_equal(row_order(13, 2, seed=9), order[:26])  # more epochs continue the same order
    assert not np.array_equal(row_order(13, 4, seed=10), order)


def test_a_limit_draws_rows_from_seed_and_name_alone():
    assert select_rows(7, None, 1, "t/train").tolist() == select_rows(7, 9, 1, "t/train").tolist() == list(range(7))
    drawn = select_rows(100, 10, 1, "t/train").tolist()
    assert len(set(drawn)) == 10 and drawn == sorted(drawn) and set(drawn) <= set(range(100))
    assert drawn == select_rows(100, 10, 1, "t/train").tolist()
    assert drawn != select_rows(100, 10, 2, "t/train").tolist()
    assert drawn != select_rows(100, 10, 1, "t/test").tolist()
    assert set(drawn) < set(select_rows(100, 20, 1, "t/train").tolist())  # a larger limit keeps what was drawn


def test_cut_is_greedy_over_rows_from_the_longest():
    assert cut([0, 1, 2, 3, 4], [9, 5, 4, 3, 2], max_rows=3, max_tokens=12) == [[0], [1, 2], [3, 4]]
    assert cut([0, 1, 2, 3], [4, 4, 4, 4], max_rows=3, max_tokens=100) == [[0, 1, 2], [3]]
    assert cut([], [], 3, 12) == []


@pytest.mark.parametrize(("batch", "micro", "world"), [(16, 8, 2), (16, 16, 2), (6, 4, 3), (1, 16, 1), (12, 2, 3)])
def test_batch_sizes_that_divide_are_taken(batch, micro, world):
    check_batch_sizes(batch, micro, world)


@pytest.mark.parametrize(("batch", "micro", "world"), [(16, 8, 3), (20, 8, 2), (1, 1, 2), (7, 4, 1)])
def test_batch_sizes_that_do_not_divide_are_refused_with_all_numbers(batch, micro, world):
    with pytest.raises(UserError) as told:
        check_batch_sizes(batch, micro, world)
    for number in (f"batch_size {batch}", f"{world} ranks", f"micro_batch_size {micro}", f"of {world * micro}"):
        assert number in str(told.value)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_evaluation_deals_every_row_once_and_every_rank_the_same_number_of_passes(world_size, rows):
    lengths = some_lengths(rows, seed=6)
    calls: list[list[list[int]]] = [[] for _ in range(world_size)]
    kept = []

    class Alone(World):
        """One of several ranks, asked one after another: gathers what it has itself."""

        def gather(self, value):
            return [value]

    for rank in range(world_size):
        done = run_batches(Alone(rank, world_size, None), lengths, 64, lambda part, rank=rank: calls[rank].append(part))
        kept += [row for part, _ in done for row in part]
    assert sorted(kept) == list(range(rows))
    assert len({len(made) for made in calls}) == 1
    for part in (part for made in calls for part in made):
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= 64


def test_rows_that_fit_one_batch_are_still_shared_by_the_ranks():
    assert fair_budget(3000, batch_tokens=4096, world_size=2) == 1500
    assert fair_budget(3000, batch_tokens=4096, world_size=1) == 3000
    assert fair_budget(9000, batch_tokens=4096, world_size=2) == 2250  # two rounds of two
    assert fair_budget(8192, batch_tokens=4096, world_size=2) == 4096

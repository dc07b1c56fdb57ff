"""The next micro-batch made ready by a thread: nothing changes but when it is made."""

import threading
import time

import numpy as np
import pytest
import torch

from pipeline.config import TrainingConfig
from pipeline.data.batching import global_batch, row_order
from pipeline.data.collate import MicroBatch
from pipeline.placement.distributed import World
from pipeline.training.prefetch import one_ahead, passes_of, read_batches

TENSORS = ("input_ids", "position_ids", "pool", "positions", "targets", "target_weight", "row_weight")


class Rows:
    """Rows as a `RowView` gives them: row n has the prompt n, n, ... (n + 2 tokens) and the answer n."""

    end_of_answer = 0
    prompt_lengths = np.arange(1, 12) + 2
    answer_lengths = np.full(11, 2)
    lengths = prompt_lengths + answer_lengths

    def tokens(self, rows):
        return [[int(row) + 1] * (int(row) + 3) for row in rows], [[int(row) + 1] for row in rows]


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_read_ahead_are_those_read_when_needed_in_the_same_order(rank):
    world, rows = World(rank, 2, torch.device("cpu")), Rows()
    settings = TrainingConfig(batch_size=4, micro_batch_size=2, micro_batch_tokens=24)
    order = row_order(11, 2, seed=3)

    def batches():
        for step in range(6):  # the last one has 2 rows
            yield from read_batches(world, settings, rows, global_batch(order, step, 4), step)

    plain, ahead = list(batches()), list(one_ahead(batches()))
    passes = [len(passes_of(world, settings, rows, global_batch(order, step, 4))) for step in range(6)]
    assert len(ahead) == len(plain) == sum(passes)
    for one, other in zip(plain, ahead, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)
        assert (one.places, one.step, one.global_rows) == (other.places, other.step, other.global_rows)
    own = [int(token) for b in ahead for token, w in zip(b.targets, b.target_weight, strict=True) if w and token]
    if rank == 0:  # of four rows, dealt longest first, back and forth, it has the longest and the shortest
        first = sorted(order[:4] + 1)
        assert sorted(own[:2]) == [first[0], first[3]]


def test_one_item_is_ready_before_it_is_asked_for_and_no_more():
    made = []

    def items():
        for number in range(5):
            made.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    source = one_ahead(items())
    assert next(source) == 0
    _wait(lambda: len(made) == 2)
    time.sleep(0.05)
    assert made == [(0, False), (1, False)]
    assert list(source) == [1, 2, 3, 4]


def test_an_exception_is_raised_where_its_item_is_asked_for():
    def items():
        yield 1
        yield 2
        raise ValueError("row 3 cannot be read")

    source = one_ahead(items())
    assert (next(source), next(source)) == (1, 2)
    with pytest.raises(ValueError, match="row 3"):
        next(source)
    assert list(source) == []


def test_the_thread_ends_with_its_reader():
    before = threading.active_count()
    source = one_ahead(iter(range(1000)))
    next(source)
    assert threading.active_count() == before + 1
    source.close()
    assert threading.active_count() == before
    dropped = one_ahead(iter(range(1000)))
    next(dropped)
    del dropped
    assert threading.active_count() == before
    assert list(one_ahead(())) == []


def test_a_batch_goes_to_a_device_whole_through_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    world = World(0, 1, torch.device("cpu"))
    batch = next(read_batches(world, TrainingConfig(batch_size=4), Rows(), np.array([5, 1, 7, 2]), 0))
    assert batch.to(torch.device("cpu")) is batch and not pinned
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, MicroBatch) and len(pinned) == len(TENSORS)
    for name in TENSORS:
        assert getattr(moved, name).device.type == "meta" and getattr(moved, name).shape == getattr(batch, name).shape
    assert (moved.places, moved.step, moved.global_rows) == (batch.places, batch.step, batch.global_rows)


def _wait(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")

"""Numbers that go wrong stop the increment at once, name what is needed to look into it, and leave a good state."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from data_contracts.errors import UserError
from pipeline.config import TrainingConfig
from pipeline.training import loop
from pipeline.training.failure import TrainingFailed, failure, went_wrong
from pipeline.training.stop import StopFlag

IDS = [f"r{number}" for number in range(8)]


class OneRank:
    """A world of one rank."""

    is_main, rank, size = True, 0, 1

    def sum(self, values):
        return list(values)

    def broadcast(self, value):
        return value

    def on_main(self, work, gathered=()):
        return work()

    def barrier(self):
        pass


class Rows:
    """Eight rows of one answer token each."""

    lengths = answer_lengths = np.ones(8)

    def __len__(self):
        return 8

    def row_ids(self, rows):
        return [IDS[row] for row in rows]


def train(monkeypatch, tmp_path, losses, norms, **settings):
    """Run the loop over four batches of two rows, two epochs' worth, whose losses and gradient norms are given; the
    steps that were saved and those that were logged.
    """
    saved, logged, at = [], [], [0]

    def batch(*_):
        at[0] += 1
        return loop.BatchSums((losses[at[0] - 1] * 2, 2.0), {})

    for name, stand_in in {
        "restore_state": lambda *_: None,
        "state_shapes": lambda *_: {},
        "stream_state": lambda *_: iter(()),
        "read_batches": lambda *_: iter(()),
        "one_ahead": lambda coming: SimpleNamespace(close=lambda: None),
        "run_global_batch": batch,
        "add_penalties": lambda *_: {},
        "routed_rate": lambda *_: 1.0,
        "save_inflight": lambda folder, done, shapes, tensors: saved.append(done.step),
    }.items():
        monkeypatch.setattr(loop, name, stand_in)
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[]),
        step=lambda: None,
        get_global_grad_norm=lambda: norms[at[0] - 1],
    )
    backbone = SimpleNamespace(config=SimpleNamespace(vocab_size=148))  # 5 nats blindly
    model = SimpleNamespace(train=lambda: None, backbone=backbone)
    learner = SimpleNamespace(world=OneRank(), engine=engine, model=model, parameters={})
    config = SimpleNamespace(training=TrainingConfig(save_every=2, batch_size=2, **settings))
    error = nullcontext()
    try:
        loop.train_rows(
            learner,
            SimpleNamespace(penalties=lambda *_: []),
            config,
            Rows(),
            None,
            seed=0,
            inflight=tmp_path,
            key="key",
            title="increment 3 reviews",
            stop=StopFlag(),
            on_step=lambda log: logged.append(log.step),
            batches=[np.array([first, first + 1]) for first in (0, 2, 4, 6)] * 2,
        )
    except TrainingFailed as raised:
        error = raised
    return error, saved, logged


@pytest.mark.parametrize(
    ("losses", "norms", "said"),
    [
        ([1.0] * 4 + [math.nan], [1.0] * 5, "the loss is nan"),
        ([1.0] * 4 + [math.inf], [1.0] * 5, "the loss is inf"),
        ([1.0] * 5, [1.0] * 4 + [math.nan], "the gradient is not finite"),
        ([1.0] * 5, [1.0] * 4 + [-1.0], "the gradient is not finite"),  # DeepSpeed's word for it
        ([1.0] * 4 + [15.1], [1.0] * 5, "the loss is 15.1, over 14.99"),  # 3 ln 148
    ],
)
def test_a_bad_step_names_step_rows_and_last_good_state_and_saves_nothing_of_itself(
    monkeypatch, tmp_path, losses, norms, said
):
    error, saved, logged = train(monkeypatch, tmp_path, losses, norms)
    assert isinstance(error, UserError)
    message = str(error)
    assert message.startswith(f"increment 3 reviews: {said}")
    assert "at step 5 of 8; the batch's rows are r0, r1; " in message
    assert "the last good state is the one saved after step 4; nothing was published" in message
    assert saved == [2, 4] and logged == [1, 2, 3, 4]


def test_a_gradient_that_is_lost_just_when_the_state_is_due_is_not_saved(monkeypatch, tmp_path):
    error, saved, _ = train(monkeypatch, tmp_path, [1.0] * 2, [1.0, math.inf])
    assert "at step 2 of 8; the batch's rows are r2, r3; the last good state is the champion" in str(error)
    assert saved == []


def test_a_high_loss_within_the_limit_or_without_one_trains_on(monkeypatch, tmp_path):
    assert train(monkeypatch, tmp_path, [14.9] * 8, [100.0] * 8)[1] == [2, 4, 6, 8]
    assert train(monkeypatch, tmp_path, [1e9] * 8, [1.0] * 8, max_loss_factor=None)[1] == [2, 4, 6, 8]
    assert train(monkeypatch, tmp_path, [5.1] * 8, [1.0] * 8, max_loss_factor=1.0)[1] == []


def test_the_limit_is_a_factor_of_what_blind_guessing_costs():
    assert went_wrong(2.99 * math.log(100), False, 3.0, 100) is None
    assert "over" in went_wrong(3.01 * math.log(100), False, 3.0, 100)
    assert went_wrong(1e30, False, None, 100) is None
    assert went_wrong(math.nan, False, None, 100) == "the loss is nan"


def test_a_batch_of_thousands_is_named_by_its_first_rows_and_their_number():
    message = failure("it failed", 1, 2, 0, [f"r{number}" for number in range(1000)])
    assert "r255 and 744 more" in message and "r256" not in message

"""Rows of several tasks in one global batch: which, how many, and what is read of them."""

import numpy as np
import pytest

from pipeline.data.batching import row_order
from pipeline.data.mixing import JoinedRows, plain_batches, rehearsal_batches


class Rows:
    """Rows as the loop reads them: row n of part `mark` is the prompt [mark, n] and an answer of n % 3 tokens."""

    def __init__(self, mark: int, count: int) -> None:
        self.mark, self.end_of_answer = mark, 0
        self.answer_lengths = np.array([n % 3 + 1 for n in range(count)])
        self.lengths = 2 + self.answer_lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, rows):
        return [[self.mark, int(row)] for row in rows], [[9] * (int(row) % 3) for row in rows]


PARTS = [Rows(1, 4), Rows(2, 3), Rows(3, 5)]


def test_joined_rows_are_numbered_through_and_read_in_any_order():
    joined = JoinedRows(PARTS, learn_earlier=True)
    assert len(joined) == 12 and joined.end_of_answer == 0
    rows = np.array([11, 0, 4, 6, 3, 7, 4])
    assert joined.sources(rows) == (2, 0, 1, 1, 0, 2, 1)
    prompts, answers = joined.tokens(rows)
    assert prompts == [[3, 4], [1, 0], [2, 0], [2, 2], [1, 3], [3, 0], [2, 0]]
    assert [len(answer) for answer in answers] == [1, 0, 0, 2, 0, 0, 0]
    assert joined.answer_lengths.tolist() == [1, 2, 3, 1, 1, 2, 3, 1, 2, 3, 1, 2]
    assert joined.lengths.tolist() == [2 + n for n in joined.answer_lengths]


def test_answers_that_are_not_learned_count_nothing_and_keep_their_length():
    joined = JoinedRows(PARTS, learn_earlier=False)
    assert joined.answer_lengths.tolist() == [1, 2, 3, 1] + [0] * 8
    assert joined.lengths.tolist() == JoinedRows(PARTS, learn_earlier=True).lengths.tolist()


def test_plain_batches_are_the_seeded_order_in_pieces():
    batches = plain_batches(7, 2, 4, seed=5)
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    assert np.array_equal(np.concatenate(batches), row_order(7, 2, 5))


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (0.1, [0, 1, 1, 1, 1, 0]),  # 8, 16, 24, 32, 40, 44 new rows: floors of 0.8, 1.6, 2.4, 3.2, 4.0, 4.4
        (0.5, [4, 4, 4, 4, 4, 2]),
        (1.0, [8, 8, 8, 8, 8, 4]),
        (0.01, [0] * 6),
        (2.5, [20, 20, 20, 20, 20, 10]),
    ],
)
def test_the_share_of_old_rows_holds_over_the_increment(share, counts):
    batches = rehearsal_batches([22, 6, 30], 2, 8, share, seed=3, increment=3)
    own = plain_batches(22, 2, 8, seed=3)
    assert [len(batch) - len(new) for batch, new in zip(batches, own, strict=True)] == counts
    for batch, new in zip(batches, own, strict=True):
        assert np.array_equal(batch[: len(new)], new)  # the new task learns what it would learn without old rows
        assert ((batch[len(new) :] >= 22) & (batch[len(new) :] < 58)).all()


def test_earlier_tasks_are_drawn_alike_whatever_their_size():
    batches = rehearsal_batches([400, 6, 300, 1], 5, 8, 1.5, seed=3, increment=4)
    old = np.concatenate([batch[8:] for batch in batches])
    assert len(old) == 3000
    parts = np.histogram(old, bins=[400, 406, 706, 707])[0]
    assert abs(parts - 1000).max() < 5 * (3000 * 2 / 9) ** 0.5  # standard errors
    assert len(set(old.tolist())) > 6 + 280 + 1 - 1


def test_old_rows_come_from_seed_increment_and_step_alone():
    def old(seed=3, increment=3, sizes=(22, 6, 30), batch=8):
        return [b[batch:].tolist() for b in rehearsal_batches(sizes, 1, batch, 1.0, seed, increment)[:2]]

    assert old() == old()
    assert old(seed=4) != old() and old(increment=4) != old() and old()[0] != old()[1]
    assert old(sizes=(32, 6, 30)) == [[row + 10 for row in rows] for rows in old()]  # not from the new task's rows


def test_before_the_first_earlier_task_nothing_is_mixed_in():
    batches = rehearsal_batches([22], 1, 8, 0.5, seed=3, increment=1)
    assert [b.tolist() for b in batches] == [b.tolist() for b in plain_batches(22, 1, 8, 3)]

"""Rows of several tasks learned together: the new task's, and those of earlier tasks that a method goes back to.

Joined rows are numbered through: the new task's first, then each earlier task's in turn. Which of them a global batch
holds is a pure function of seed and step.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.batching import global_batch, num_steps, row_order
from pipeline.data.tokens import RowView


class JoinedRows:
    """Rows of several tasks, read as the loop reads a `RowView`; `answer_lengths` counts what is learned of a row."""

    def __init__(self, parts: Sequence[RowView], learn_earlier: bool) -> None:
        """`parts` are the new task's rows and those of earlier tasks, whose answers are learned with
        `learn_earlier`.
        """
        self.parts = tuple(parts)
        self.end_of_answer = parts[0].end_of_answer
        self.lengths = np.concatenate([part.lengths for part in parts])  # (rows,) tokens
        learned = [part.answer_lengths * (learn_earlier or index == 0) for index, part in enumerate(parts)]
        self.answer_lengths = np.concatenate(learned)  # (rows,) tokens, 0 where the answer is not learned
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def sources(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Which part each row is of: 0 the new task, k the k-th earlier task."""
        return tuple(int(part) - 1 for part in np.searchsorted(self._starts, np.asarray(rows), side="right"))

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        """The rows' ids, as their tasks' data name them."""
        places = zip(rows, self.sources(rows), strict=True)
        return [self.parts[source].row_ids([int(row) - int(self._starts[source])])[0] for row, source in places]

    def tokens(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and answer token ids of the given rows."""
        prompts: list[list[int]] = [[] for _ in rows]
        answers: list[list[int]] = [[] for _ in rows]
        sources = self.sources(rows)
        for source in sorted(set(sources)):
            places = [place for place, other in enumerate(sources) if other == source]
            read = self.parts[source].tokens([int(rows[place]) - int(self._starts[source]) for place in places])
            for place, prompt, answer in zip(places, *read, strict=True):
                prompts[place], answers[place] = prompt, answer
        return prompts, answers


def plain_batches(num_rows: int, epochs: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each global batch: `epochs` seeded permutations of all rows, one after another."""
    order = row_order(num_rows, epochs, seed)
    return [global_batch(order, step, batch_size) for step in range(num_steps(num_rows, epochs, batch_size))]


def rehearsal_batches(
    sizes: Sequence[int], epochs: int, batch_size: int, share: float, seed: int, increment: int
) -> list[np.ndarray]:
    """The new task's batches, each with rows of earlier tasks behind its own: `share` of them for every new row.

    `sizes` are the rows of the new task and of each earlier one. Batch s gets floor(share * rows up to and with s) -
    floor(share * rows before s) old rows, so that the share holds over the increment whatever the batch size. Each is
    drawn from (seed, increment, step) alone: an earlier task, all alike, then one of its rows.
    """
    batches, seen = [], 0
    starts = np.cumsum(sizes)
    for step, own in enumerate(plain_batches(sizes[0], epochs, batch_size, seed)):
        count = _whole(share * (seen + len(own))) - _whole(share * seen) if len(sizes) > 1 else 0
        seen += len(own)
        draw = np.random.default_rng([seed, increment, step])
        tasks = draw.integers(1, max(2, len(sizes)), count)
        rows = [starts[task - 1] + draw.integers(sizes[task]) for task in tasks]
        batches.append(np.concatenate([own, np.array(rows, dtype=own.dtype)]))
    return batches


def _whole(value: float) -> int:
    return int(np.floor(value + 1e-9))  # 0.1 * 30 is a hair below 3

"""What is read from finished cells: METHODS section 5 on their matrices, and paired bootstraps over their rows.

A cell's last row of R is measured on more rows than those above it. What compares two rows of R (backward transfer,
forgetting, transfer) is taken on the rows that both were measured on, answered in the same batches where the cell has
`answers_again`; cells of before 2026-11-24 have not, and theirs are read out of the last row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation import matrix

Record = dict[str, Any]
Unit = tuple[int, Mapping[str, np.ndarray]]  # seed of the rows, and by task a value a row
DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which `LEVEL` of its bootstrap draws lie."""

    mean: float
    low: float
    high: float


def row_scores(record: Record, increment: int, task: str) -> np.ndarray:
    """Scores of the test rows that an increment (from 0) measured, in the order of their ids."""
    return _scores(record, increment, task, record["answers"][increment][task])


def scores_ahead(record: Record, task: str) -> np.ndarray:
    """Scores of a task's test rows before it was learned."""
    return _scores(record, 0, task, record["answers_ahead"][task])


def scores_again(record: Record, task: str) -> np.ndarray:
    """Scores after the last increment of the rows that the increments before it measured."""
    if task in record.get("answers_again", {}):
        return _scores(record, 0, task, record["answers_again"][task])
    return np.asarray(last_on(record, 0, task, row_scores(record, len(record["R"]) - 1, task)))


def _scores(record: Record, increment: int, task: str, answers: str | list[int]) -> np.ndarray:
    if isinstance(answers, list):
        return np.array(answers) / 1000
    references = last_on(record, increment, task, record["references"][task])
    return np.array([a == b for a, b in zip(answers, references, strict=True)], dtype=float)


def last_on(record: Record, increment: int, task: str, values: Any) -> Any:
    """Of values of the last increment's rows, those of the rows that `increment` measured; text stays text."""
    mask = record["stream_rows"].get(task)
    if mask is None or increment == len(record["R"]) - 1:
        return values
    kept = [value for value, one in zip(values, mask, strict=True) if one == "1"]
    return "".join(kept) if isinstance(values, str) else np.array(kept)


def paired_matrix(record: Record) -> matrix.Matrix:
    """R with its last row measured on the rows of those above; the task learned last keeps all of its rows."""
    last = len(record["R"]) - 1
    rows = [list(row) for row in record["R"]]
    for place, task in enumerate(record["tasks"][:-1]):
        rows[last][place] = float(scores_again(record, task).mean())
    return rows


def figures(record: Record, zero_shot: Record | None = None, per_task: Record | None = None) -> dict[str, float | None]:
    """ACC, BWT on test and on validation, mean forgetting; FWT and transfer where the cells they refer to are there."""
    R, validation = paired_matrix(record), record["R_validation"]
    last = len(R)
    return {
        "acc": matrix.acc(record["R"]),
        "bwt": matrix.bwt(R, last),
        "validation_acc": matrix.acc(validation),
        "validation_bwt": matrix.bwt(validation, last),
        "forgetting": sum(matrix.forgetting(R)) / last,
        "fwt": None if zero_shot is None else forward_transfer(record, zero_shot),
        "transfer": None if per_task is None else matrix.transfer(R, alone(record, per_task)),
    }


def alone(record: Record, per_task: Record) -> list[float]:
    """The scores of LoRAs trained alone, in the record's order of tasks, on the rows of the record's diagonal."""
    *earlier, newest = record["tasks"]
    scores = [scores_again(per_task, task) for task in earlier]
    return [float(own.mean()) for own in (*scores, row_scores(per_task, len(per_task["R"]) - 1, newest))]


def whole_matrix(record: Record) -> matrix.Matrix:
    """`paired_matrix` with the score of each task before it was learned, where it was asked."""
    rows = paired_matrix(record)
    for place, task in enumerate(record["tasks"][1:]):
        if "answers_ahead" in record:
            rows[place][place + 1] = float(scores_ahead(record, task).mean())
    return rows


def forward_transfer(record: Record, zero_shot: Record) -> float | None:
    """FWT: each task but the first before it was learned, against the bare backbone on the same rows; None where the
    cell was not asked."""
    tasks = record["tasks"]
    if "answers_ahead" not in record:
        return None
    bare = [float(scores_again(zero_shot, task).mean()) for task in tasks]
    return matrix.fwt(whole_matrix(record), bare)


def difference(first: Record, second: Record) -> Unit:
    """Row by row the first's score less the second's after the last task. Raises ValueError for other rows."""
    if any(first["deciding"]["data"][name] != digest for name, digest in second["deciding"]["data"].items()):
        raise ValueError(f"{first['setting']} and {second['setting']} were measured on different rows")
    end = len(first["R"]) - 1
    rows = {task: row_scores(first, end, task) - row_scores(second, end, task) for task in first["tasks"]}
    return first["deciding"]["seed"], rows


def decided_difference(first: Record, second: Record) -> Unit:
    """Row by row whether the first decides it alone, less whether the second does; ValueError as `difference`."""
    seed, _ = difference(first, second)
    flags = [
        {task: np.array(list(r["decided"][task]), dtype=float) for task in first["tasks"]} for r in (first, second)
    ]
    return seed, {task: flags[0][task] - flags[1][task] for task in first["tasks"]}


def backward(record: Record) -> Unit:
    """Row by row an earlier task's score after the last task less its score when it was learned."""
    rows = {
        task: scores_again(record, task) - row_scores(record, place, task)
        for place, task in enumerate(record["tasks"][:-1])
    }
    return record["deciding"]["seed"], rows


def bootstrap(units: Sequence[Unit], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over units, of means over tasks, of means over rows, with a percentile interval.

    Rows and units (an order with a seed) are drawn with replacement. Units with the same seed have the same rows of a
    task, so they get the same draw of them.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[int, str, int], np.ndarray] = {}
    means = np.zeros((len(units), draws))
    for place, (rows_seed, tasks) in enumerate(units):
        for task, values in tasks.items():
            key = rows_seed, task, len(values)
            if key not in drawn:
                drawn[key] = generator.integers(0, len(values), (draws, len(values)), dtype=np.int32)
            means[place] += values[drawn[key]].mean(axis=1) / len(tasks)
    chosen = generator.integers(0, len(units), (draws, len(units)))
    samples = np.take_along_axis(means.T, chosen, axis=1).mean(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    mean = float(np.mean([np.mean([values.mean() for values in tasks.values()]) for _, tasks in units]))
    return Interval(mean, float(low), float(high))


def macro_f1(record: Record, task: str) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN) after the last task; classes as in the contract."""
    answers, references = record["answers"][-1][task], record["references"][task]
    scores = []
    for name in sorted(set(answers) | set(references)):
        hits = sum(a == b == name for a, b in zip(answers, references, strict=True))
        scores.append(2 * hits / (answers.count(name) + references.count(name)))
    return sum(scores) / len(scores)

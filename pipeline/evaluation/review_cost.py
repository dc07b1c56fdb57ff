"""Review cost: which rows may be decided without a person, at what precision (METHODS section 5). Pure functions.

A class decides the rows it is the highest-scoring class of, from its threshold on. The threshold is the lowest score
with which the class's precision on validation reaches the target; a class that never reaches it decides nothing.
**Stripping rate**: the share of rows that are decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REVIEW = "review.json"  # an increment's thresholds and review cost, by task
_BLOCK = 2**22  # rows drawn at a time


@dataclass(frozen=True)
class ScoredRows:
    """Rows with the class each was given, its score, and whether that was right."""

    answers: np.ndarray  # (rows,) str
    scores: np.ndarray  # (rows,) of the answer, higher is surer
    right: np.ndarray  # (rows,) bool

    @classmethod
    def of(cls, answers: Sequence[str], scores: Sequence[float], references: Sequence[str]) -> "ScoredRows":
        """From answers, their scores and what they should have been."""
        given = np.asarray(answers, dtype=object)
        return cls(given, np.asarray(scores, dtype=np.float64), given == np.asarray(references, dtype=object))


@dataclass(frozen=True)
class ReviewCost:
    """What thresholds do on some rows: the share decided, and the share of right answers among those (None: none was
    decided).
    """

    rows: int
    stripping_rate: float
    precision: float | None


Thresholds = Mapping[str, float | None]  # by class; None decides nothing


def choose_thresholds(rows: ScoredRows, classes: Sequence[str], target_precision: float) -> dict[str, float | None]:
    """For each class the lowest score from which its answers are right often enough on these rows; None where there is
    none. Rows of equal score are decided together.
    """
    return {name: _threshold(rows, rows.answers == name, target_precision) for name in classes}


def _threshold(rows: ScoredRows, given: np.ndarray, target_precision: float) -> float | None:
    order = np.argsort(-rows.scores[given], kind="stable")
    scores, right = rows.scores[given][order], rows.right[given][order]
    last_of_equals = np.append(scores[1:] != scores[:-1], True) if len(scores) else np.zeros(0, dtype=bool)
    precision = np.cumsum(right) / np.arange(1, len(scores) + 1)
    reached = np.flatnonzero(last_of_equals & (precision >= target_precision))
    return float(scores[reached[-1]]) if len(reached) else None


def decided(answers: Sequence[str], scores: Sequence[float], thresholds: Thresholds) -> np.ndarray:
    """(rows,) True where the answer's score is at its class's threshold or above."""
    floors = np.array([np.inf if (floor := thresholds.get(name)) is None else floor for name in answers], dtype=float)
    return np.asarray(scores, dtype=np.float64) >= floors


def review_cost(rows: ScoredRows, thresholds: Thresholds) -> ReviewCost:
    """Stripping rate and realised precision of thresholds on rows (at least one)."""
    alone = decided(rows.answers, rows.scores, thresholds)
    precision = float(rows.right[alone].mean()) if alone.any() else None
    return ReviewCost(len(alone), float(alone.mean()), precision)


def review_record(
    validation: ScoredRows, test: ScoredRows, classes: Sequence[str], target_precision: float, bundle: str
) -> dict[str, Any]:
    """A task's entry in review.json: thresholds chosen on validation, what they do there and on test, and the digest of
    the bundle they belong to.
    """
    thresholds = choose_thresholds(validation, classes, target_precision)
    return {
        "bundle": bundle,
        "target_precision": target_precision,
        "thresholds": thresholds,
        "validation": vars(review_cost(validation, thresholds)),
        "test": vars(review_cost(test, thresholds)),
    }


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, seed: int = 17, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(after) - mean(before), both (rows,) over the same rows, which are drawn together with
    replacement.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    generator, rows = np.random.default_rng(seed), len(difference)
    means: list[np.ndarray] = []
    block = max(1, _BLOCK // rows)
    for start in range(0, draws, block):
        drawn = generator.integers(0, rows, size=(min(block, draws - start), rows))
        means.append(difference[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

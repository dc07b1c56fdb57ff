"""Thresholds, stripping rate and the paired bootstrap, on rows small enough to do by hand (METHODS section 5)."""

import numpy as np
import pytest

from pipeline.evaluation.review_cost import (
    ReviewCost,
    ScoredRows,
    choose_thresholds,
    decided,
    paired_bootstrap,
    review_cost,
    review_record,
)


def rows(*told: tuple[str, float, str]) -> ScoredRows:
    """(answer, score, reference) a row."""
    return ScoredRows.of(*zip(*told, strict=True))


# of class a, surest first: right, right, wrong, right, wrong: precision 1, 1, 2/3, 3/4, 3/5
# of class b: wrong, right: precision 0, 1/2
VALIDATION = rows(
    ("a", 0.9, "a"),
    ("b", 0.7, "a"),
    ("a", 0.8, "a"),
    ("a", 0.5, "b"),
    ("a", 0.6, "a"),
    ("a", 0.7, "b"),
    ("b", 0.6, "b"),
)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1.0, {"a": 0.8, "b": None}),
        (0.75, {"a": 0.6, "b": None}),  # reached again after it was lost: the lowest score counts
        (0.7, {"a": 0.6, "b": None}),
        (0.6, {"a": 0.5, "b": None}),
        (0.5, {"a": 0.5, "b": 0.6}),
    ],
)
def test_a_threshold_is_the_lowest_score_whose_precision_reaches_the_target(target, expected):
    assert choose_thresholds(VALIDATION, ["a", "b"], target) == expected


def test_a_class_that_never_reaches_the_target_or_is_never_answered_decides_nothing():
    thresholds = choose_thresholds(VALIDATION, ["a", "b", "c"], 0.9)
    assert thresholds == {"a": 0.8, "b": None, "c": None}
    assert decided(["b", "c", "a", "other"], [1.0, 1.0, 0.8, 1.0], thresholds).tolist() == [False, False, True, False]


def test_rows_of_equal_score_are_decided_together():
    # at 0.9 two rows, one right: precision 1/2, though the first of them alone would have 1
    equal = rows(("a", 0.9, "a"), ("a", 0.9, "b"), ("a", 0.4, "b"))
    assert choose_thresholds(equal, ["a"], 0.6) == {"a": None}
    assert choose_thresholds(equal, ["a"], 0.5) == {"a": 0.9}


def test_review_cost_is_the_share_decided_and_the_precision_realised():
    test = rows(("a", 0.9, "b"), ("a", 0.6, "a"), ("a", 0.59, "a"), ("b", 0.99, "b"))
    assert review_cost(test, {"a": 0.6, "b": None}) == ReviewCost(4, 0.5, 0.5)
    assert review_cost(test, {"a": None, "b": None}) == ReviewCost(4, 0.0, None)


def test_the_record_keeps_what_was_chosen_on_validation_and_what_it_does_on_test():
    test = rows(("a", 0.9, "b"), ("a", 0.6, "a"), ("a", 0.59, "a"), ("b", 0.99, "b"))
    record = review_record(VALIDATION, test, ["a", "b"], 0.75, "digest")
    assert record["thresholds"] == {"a": 0.6, "b": None} and record["bundle"] == "digest"
    assert record["validation"] == {"rows": 7, "stripping_rate": 4 / 7, "precision": 0.75}
    assert record["test"] == {"rows": 4, "stripping_rate": 0.5, "precision": 0.5}


def test_the_bootstrap_interval_of_a_constant_difference_is_that_difference():
    before = np.array([0.0, 1.0, 0.0, 1.0])
    assert paired_bootstrap(before, before) == (0.0, 0.0)
    assert paired_bootstrap(before, before + 0.25) == (0.25, 0.25)


def test_the_bootstrap_pairs_rows_and_matches_the_normal_interval_on_many():
    # difference +1 for 300 rows, -1 for 100, 0 for 600: mean 0.2, variance 0.4 - 0.04, error sqrt(0.36 / 1000)
    before = np.concatenate([np.zeros(300), np.ones(100), np.ones(600)])
    after = np.concatenate([np.ones(300), np.zeros(100), np.ones(600)])
    low, high = paired_bootstrap(before, after)
    assert (low, high) == pytest.approx((0.2 - 1.96 * 0.01897, 0.2 + 1.96 * 0.01897), abs=0.003)
    assert paired_bootstrap(before, after) == (low, high)  # drawn by seed
    assert paired_bootstrap(after, before) == pytest.approx((-high, -low), abs=1e-12)

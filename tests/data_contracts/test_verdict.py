"""The verdict: sums that hold, and words an owner understands."""

import json
import pickle
from pathlib import Path

import pytest

from data_contracts.contract import TaskContract
from data_contracts.verdict import REASONS, DataRejected, SplitCounts, TokenLengths, explain, judge

CONTRACT = TaskContract.model_validate(
    {
        "task": "reviews",
        "version": "2.1.0",
        "owner": "o",
        "description": "d",
        "kind": "classification",
        "language": "en",
        "source": {"format": "csv", "train": ["a"], "validation": ["b"], "test": ["c"]},
        "columns": {"text": "text", "answer": "label"},
        "prompt": "{text}",
        "labels": {"bad": " bad", "good": " good"},
        "metric": "accuracy",
        "limits": {"max_rejected_fraction": 0.1, "min_rows": {"train": 3, "validation": 1, "test": 1}},
        "licence": "l",
        "sensitivity": "public",
    }
)


def split(rows_in: int, kept: int, rejected: dict, labels: dict | None = None) -> SplitCounts:
    tokens = TokenLengths(3, 5, 9, 11)
    labels = labels or {"bad": kept - 1, "good": 1}
    return SplitCounts(rows_in, kept, rejected, {"rule:max_length:text": 1}, 0, labels, tokens)


def test_data_within_its_limits_passes():
    verdict = judge(CONTRACT, {"train": split(20, 18, {"null": 2}), "test": split(5, 5, {})}, {}, {})
    assert verdict.passed
    assert (verdict.rows_in, verdict.kept, verdict.rejected) == (25, 23, {"null": 2})
    assert "PASS: 23 of 25 rows are ready" in verdict.render()


def test_too_many_rejected_rows_fail_with_their_counts():
    verdict = judge(CONTRACT, {"train": split(20, 17, {"null": 1, "leak": 2})}, {"train in test": 2}, {})
    assert not verdict.passed
    assert "3 of 20 rows were rejected (15.0%; 2 leak, 1 null), and the contract allows 10.0%" in verdict.problems[0]
    error = DataRejected(verdict)
    assert str(error).startswith("task reviews: 3 of 20 rows were rejected")
    assert "\n" not in str(error)


def test_too_few_rows_fail_by_split():
    verdict = judge(CONTRACT, {"train": split(2, 2, {}), "test": split(1, 1, {})}, {}, {})
    assert len(verdict.problems) == 1
    assert verdict.problems[0].startswith("train has 2 usable rows and needs 3: ")


def test_a_label_never_seen_is_a_warning_only():
    verdict = judge(CONTRACT, {"train": split(5, 5, {}, {"bad": 5, "good": 0})}, {}, {})
    assert verdict.passed
    assert verdict.warnings == ["no row of train has the label 'good'; check the label's spelling, or add rows"]


def test_counts_that_do_not_add_up_cannot_be_stated():
    with pytest.raises(AssertionError):
        split(10, 8, {"null": 1})


def test_the_text_tells_everything_in_plain_words():
    examples = {"leak": ["a.csv line 4", "a.csv line 9"]}
    text = judge(CONTRACT, {"train": split(20, 18, {"leak": 2})}, {"train in test": 2}, examples).render()
    for piece in (
        "Task reviews, contract version 2.1.0",
        "2  the text is also in a split used for judging the model [leak]; first: a.csv line 4; a.csv line 9",
        "1  text is longer than the contract's rule allows [rule:max_length:text]",
        "bad 17 (94%), good 1 (6%)",
        "shortest 3, half below 5, 95% below 9, longest 11",
        "Leaks: 2 train in test",
    ):
        assert piece in text, text


def test_every_reason_has_words():
    codes = [*REASONS, "rule:regex:a:b", *(f"rule:{c}:x" for c in ("min_length", "max_value", "allowed_values"))]
    assert all(explain(code) and explain(code) != code for code in codes)
    assert explain("rule:regex:a:b").startswith("a:b ")


def test_the_verdict_is_plain_json():
    verdict = judge(CONTRACT, {"train": split(20, 18, {"null": 2})}, {}, {})
    content = json.loads(json.dumps(verdict.to_dict()))
    assert content["passed"] is True
    assert content["splits"]["train"]["rejected"] == {"null": 2}
    assert content["splits"]["train"]["tokens"] == {"min": 3, "median": 5, "p95": 9, "max": 11}


def test_a_rejection_travels_between_processes():
    error = DataRejected(judge(CONTRACT, {"train": split(20, 8, {"null": 12})}, {}, {}), Path("rejected.parquet"))
    arrived = pickle.loads(pickle.dumps(error))
    assert str(arrived) == str(error) and "rejected.parquet" in str(error)
    assert arrived.verdict == error.verdict

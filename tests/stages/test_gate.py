"""The gate is a pure function of scores and rules."""

import pytest

from pipeline.config import GateConfig
from pipeline.stages.gate import gate

CHAMPION = {"a": 0.80, "b": 0.60}


def judge(rules: dict, row: dict, task: str = "c", champion: dict = CHAMPION):
    return gate(GateConfig(**({"max_regression": None} | rules)), task, row, champion)


def test_without_rules_everything_is_promoted():
    verdict = judge({}, {"a": 0.0, "b": 0.0, "c": 0.0})
    assert verdict.promoted and verdict.reasons == ()


@pytest.mark.parametrize(("a", "promoted"), [(0.90, True), (0.80, True), (0.771, True), (0.769, False), (0.0, False)])
def test_an_earlier_task_may_lose_up_to_max_regression(a, promoted):
    assert judge({"max_regression": 0.03}, {"a": a, "b": 0.6, "c": 0.1}).promoted is promoted


@pytest.mark.parametrize(
    ("before", "after", "limit"), [(0.8, 0.75, 0.05), (0.8, 0.78, 0.02), (0.9, 0.6, 0.3), (0.3, 0.2, 0.1)]
)
def test_a_loss_of_just_the_limit_is_allowed_whatever_the_rounding(before, after, limit):
    # 0.8 - 0.75 is more than 0.05 in floats
    assert judge({"max_regression": limit}, {"a": after, "c": 1.0}, champion={"a": before}).promoted
    assert not judge({"max_regression": limit}, {"a": after - 0.001, "c": 1.0}, champion={"a": before}).promoted


def test_zero_allows_no_loss_at_all():
    assert judge({"max_regression": 0.0}, {"a": 0.8, "b": 0.6, "c": 0.5}).promoted
    assert not judge({"max_regression": 0.0}, {"a": 0.8, "b": 0.6 - 1 / 1000, "c": 0.5}).promoted


def test_every_broken_rule_has_its_sentence_with_the_numbers():
    verdict = judge({"max_regression": 0.1, "min_metric": 0.5}, {"a": 0.6, "b": 0.3, "c": 0.45})
    assert verdict.reasons == (
        "a fell by 0.2000 (from 0.8000 to 0.6000), more than gate.max_regression 0.1",
        "b fell by 0.3000 (from 0.6000 to 0.3000), more than gate.max_regression 0.1",
        "c scored 0.4500, less than gate.min_metric 0.5",
    )
    assert verdict.to_dict()["promoted"] is False and verdict.to_dict()["reasons"] == list(verdict.reasons)
    assert verdict.numbers["changes"] == pytest.approx({"a": -0.2, "b": -0.3})
    assert (verdict.numbers["max_regression"], verdict.numbers["min_metric"]) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("rule", "promoted"),
    [
        (0.5, True),
        (0.51, False),
        ({"c": 0.51}, False),
        ({"c": 0.49}, True),
        ({"a": 0.99}, True),
        ({}, True),
        (None, True),
    ],
)
def test_min_metric_judges_the_new_task_alone(rule, promoted):
    assert judge({"min_metric": rule}, {"a": 0.1, "b": 0.1, "c": 0.5}).promoted is promoted


def test_a_task_the_champion_never_measured_cannot_regress():
    assert judge({"max_regression": 0.0}, {"c": 0.2}, champion={}).promoted
    assert judge({"max_regression": 0.0}, {"z": 0.0, "c": 0.2}).promoted


def test_a_task_learned_again_is_judged_by_min_metric_not_against_its_old_data():
    verdict = judge({"max_regression": 0.02, "min_metric": 0.5}, {"a": 0.55, "b": 0.6}, task="a")
    assert verdict.promoted and set(verdict.numbers["changes"]) == {"b"}
    assert not judge({"min_metric": 0.5}, {"a": 0.45, "b": 0.6}, task="a").promoted

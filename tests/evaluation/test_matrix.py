"""The numbers read from R, on a matrix worked out by hand."""

import pytest

from pipeline.evaluation.matrix import (
    acc,
    bwt,
    forgetting,
    fwt,
    op,
    render_table,
    sampled_acc,
    sampled_bwt,
    sampled_columns,
    sampled_forgetting,
    transfer,
)

# Three tasks; the cells right of the diagonal are evaluated too, as in a benchmark.
R = [
    [0.8, 0.3, 0.4],
    [0.7, 0.9, 0.5],
    [0.75, 0.6, 1.0],
]
LOWER = [[0.8, None, None], [0.7, 0.9, None], [0.75, 0.6, 1.0]]


def test_acc_is_the_mean_of_the_last_row():
    assert acc(R) == pytest.approx((0.75 + 0.6 + 1.0) / 3)


def test_op_is_the_mean_over_the_tasks_learned_so_far():
    assert op(R, 1) == pytest.approx(0.8)
    assert op(LOWER, 2) == pytest.approx((0.7 + 0.9) / 2)


def test_acc_of_an_unfinished_stream_is_over_its_learned_tasks():
    assert acc(LOWER[:2]) == pytest.approx((0.7 + 0.9) / 2)


def test_bwt_is_the_mean_change_since_each_task_was_learned():
    assert bwt(LOWER, 2) == pytest.approx(0.7 - 0.8)
    assert bwt(LOWER, 3) == pytest.approx(((0.75 - 0.8) + (0.6 - 0.9)) / 2)
    assert bwt(LOWER, 1) is None


def test_bwt_is_exactly_zero_when_no_score_moved():
    assert bwt([[0.1, None], [0.1, 0.7]], 2) == 0.0


def test_fwt_is_the_gain_over_the_backbone_before_a_task_is_learned():
    assert fwt(R, [0.33, 0.25, 0.35]) == pytest.approx(((0.3 - 0.25) + (0.5 - 0.35)) / 2)
    assert fwt([[0.8]], [0.3]) is None


def test_transfer_is_the_gain_over_a_lora_trained_alone():
    assert transfer(LOWER, [0.8, 0.8, 0.9]) == pytest.approx((0.0 + 0.1 + 0.1) / 3)


def test_forgetting_is_the_fall_from_the_best_score():
    assert forgetting(LOWER) == pytest.approx([0.05, 0.3, 0.0])
    assert forgetting([[0.5, None], [0.6, 0.7]]) == [0.0, 0.0]


def test_a_score_that_was_not_evaluated_is_named_and_never_averaged_over():
    with pytest.raises(ValueError, match="no score on task 2 after increment 1"):
        fwt(LOWER, [0.3, 0.3, 0.3])
    with pytest.raises(ValueError, match="no score on task 1 after increment 2"):
        acc([[0.8, None], [None, 0.9]])


# Four tasks of which an increment scores two earlier ones at most. The last one scored a, b and d; a was better once.
SAMPLED = {
    "a": {"a": 0.8},
    "b": {"a": 0.9, "b": 0.6},
    "c": {"b": 0.7, "c": 0.5, "d": 0.1},  # right of the diagonal: d was learned before under another contract
    "d": {"a": 0.7, "b": 0.7, "d": 0.4},
}


def test_sampled_figures_are_over_the_tasks_scored_last():
    columns = sampled_columns(SAMPLED)
    assert columns == {"a": [0.8, 0.9, 0.7], "b": [0.6, 0.7, 0.7], "d": [0.4]}
    assert sampled_acc(columns) == pytest.approx((0.7 + 0.7 + 0.4) / 3)
    assert sampled_bwt(columns) == pytest.approx(((0.7 - 0.8) + (0.7 - 0.6)) / 2)
    assert sampled_forgetting(columns) == pytest.approx([0.2, 0.0, 0.0])
    assert sampled_bwt(sampled_columns({"a": {"a": 0.8}})) is None
    assert sampled_bwt(sampled_columns({"a": {"a": 0.8}, "b": {"b": 0.3}})) is None


def test_sampled_figures_of_a_whole_matrix_are_the_plain_ones():
    names = ["a", "b", "c"]
    rows = {name: dict(zip(names, R[t], strict=True)) for t, name in enumerate(names)}
    columns = sampled_columns(rows)
    assert sampled_acc(columns) == pytest.approx(acc(R))
    assert sampled_bwt(columns) == pytest.approx(bwt(R, 3))
    assert sampled_forgetting(columns) == pytest.approx(forgetting(R))


def test_table_shows_every_score_in_points_with_row_means_and_baselines_below():
    table = render_table(["red", "blue"], [[0.5, None], [0.255, 1.0]], {"zero_shot": {"red": 0.1}})
    lines = [line.split() for line in table.splitlines() if not line.startswith("-")]
    assert lines == [
        ["score", "x", "100", "red", "blue", "mean"],
        ["after", "1", "red", "50.0", "-", "50.0"],
        ["after", "2", "blue", "25.5", "100.0", "62.7"],
        ["zero_shot", "10.0", "-", "10.0"],
    ]
    ends = {len(line) for line in table.splitlines()}
    assert len(ends) == 1, "columns are aligned"


def test_table_takes_names_for_increments_that_learn_a_task_again():
    table = render_table(["red"], [[0.5], [0.6]], row_names=["1 red", "2 red v2"])
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["50.0", "60.0"]
    assert "2 red v2" in table

"""What is read from cells, on cells worked out by hand, and the bootstrap against a loop."""

import random
import statistics as plain

import numpy as np
import pytest

from pipeline.benchmarks.quality import statistics
from pipeline.benchmarks.quality.report import (
    as_markdown,
    difference_table,
    figure_table,
    growth_table,
    inferred_table,
    review_difference_table,
    review_table,
)
from tests.benchmarks.quality_cells import NUMBERS, cell

# `one` and `two` after the last task: right on none of `two`'s stream rows; right everywhere
ZERO_SHOT = cell("zero_shot", "any", answers=[{"one": "11"}, {"one": "1111", "two": "1010"}], R=[[0, None], [0.5, 0]])
PER_TASK = cell("per_task", "any", answers=[{"one": "00"}, {"one": "0101", "two": "0101"}], R=[[1, None], [1, 1]])


def test_rows_of_R_are_compared_on_the_rows_that_both_measured():
    assert statistics.paired_matrix(cell("moe_cl")) == [[1.0, None], [0.5, 0.5]]
    assert statistics.whole_matrix(cell("moe_cl")) == [[1.0, 0.5], [0.5, 0.5]]  # `two` before it was learned


def test_figures_of_a_cell_are_those_worked_out_by_hand():
    figures = statistics.figures(cell("moe_cl"), ZERO_SHOT, PER_TASK)
    assert figures == {
        "acc": 0.625,  # (0.75 + 0.5) / 2, on all rows
        "bwt": -0.5,  # 0.5 - 1.0
        "validation_acc": 0.5,
        "validation_bwt": 0.25,
        "forgetting": 0.25,  # (0.5 + 0) / 2
        "fwt": 0.5,  # `two` before it was learned 0.5, the backbone on those rows 0
        "transfer": -0.25,  # ((1.0 - 1.0) + (0.5 - 1.0)) / 2
    }


def test_rows_of_R_are_compared_in_the_batches_they_were_answered_in_where_the_cell_has_them():
    # the last, larger evaluation has `one`'s stream rows (1 and 3) half right; in the stream's own batches both are
    bare = cell("zero_shot", answers=[{"one": "00"}, {"one": "0111", "two": "0000"}], answers_again={"one": "00"})
    assert statistics.paired_matrix(bare) == [[1.0, None], [1.0, 0.5]]
    assert statistics.backward(bare)[1]["one"].tolist() == [0.0, 0.0]
    assert statistics.figures(bare)["bwt"] == 0 and statistics.figures(bare)["acc"] == 0.625
    # `two`, before it was learned, was answered as 00: 1 of 2 right; the backbone in the same batches, 2 of 2
    again = {**ZERO_SHOT, "answers_again": {"one": "11", "two": "10"}}
    assert statistics.figures(cell("moe_cl"), again)["fwt"] == -0.5
    # LoRAs alone: `one` in the stream's batches 1 of 2 right, where the larger evaluation has none; `two` on all rows
    alone = {**PER_TASK, "answers": [{}, {"one": "1010", "two": "0101"}], "answers_again": {"one": "01", "two": "10"}}
    assert statistics.alone(cell("moe_cl"), alone) == [0.5, 1.0]


def test_a_cell_without_answers_ahead_has_no_forward_transfer():
    older = cell("moe_cl")
    del older["answers_ahead"]
    assert statistics.figures(older, ZERO_SHOT)["fwt"] is None


def test_scores_of_generated_answers_are_thousandths():
    answers = [{"one": [500, 0]}, {"one": [1000, 250, 0, 250], "two": [1, 2, 3, 4]}]
    generated = cell("moe_cl", answers=answers, answers_ahead={"two": [0, 500]}, references={})
    assert statistics.row_scores(generated, 1, "one").tolist() == [1.0, 0.25, 0.0, 0.25]
    seed, rows = statistics.backward(generated)
    assert statistics.scores_ahead(generated, "two").tolist() == [0.0, 0.5]
    assert seed == 17 and rows["one"].tolist() == [0.5, 0.0]  # rows 1 and 3: 1.0 - 0.5, 0.0 - 0.0


def test_macro_f1_is_the_mean_over_classes():
    # a: 1 hit, 1 answered, 2 there; b: 2 hits, 3 answered, 2 there
    assert statistics.macro_f1(cell("moe_cl"), "one") == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_the_bootstrap_agrees_with_a_loop_over_draws():
    """The loop draws rows once for units that share them, then units, with Python's own generator."""
    draw = random.Random(3)
    tasks = {"one": 40, "two": 25}
    units = [
        (
            17,
            {
                task: np.array([draw.choice([-1.0, 0.0, 0.0, 1.0]) + shift for _ in range(n)])
                for task, n in tasks.items()
            },
        )
        for shift in (0.0, 0.1, 0.3)
    ]
    samples = []
    for _ in range(4000):
        rows = {task: [draw.randrange(n) for _ in range(n)] for task, n in tasks.items()}
        chosen = [draw.randrange(3) for _ in range(3)]
        values = [plain.fmean(plain.fmean(units[u][1][t][row] for row in rows[t]) for t in tasks) for u in chosen]
        samples.append(plain.fmean(values))
    cuts = plain.quantiles(samples, n=40)
    interval = statistics.bootstrap(units, draws=4000)
    assert interval.mean == pytest.approx(plain.fmean(v.mean() for _, rows in units for v in rows.values()))
    assert interval.low == pytest.approx(cuts[0], abs=0.02) and interval.high == pytest.approx(cuts[-1], abs=0.02)


def test_units_with_the_same_rows_get_the_same_draw():
    values = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0] * 20)
    alone = statistics.bootstrap([(17, {"one": values})], draws=2000)
    # two orders with the same rows and the same differences say no more than one; other rows would
    assert statistics.bootstrap([(17, {"one": values})] * 2, draws=2000) == alone
    apart = statistics.bootstrap([(17, {"one": values}), (18, {"one": values})], draws=2000)
    assert apart.high - apart.low < alone.high - alone.low


def test_cells_of_other_rows_are_not_compared():
    other = cell("sequential", deciding={"seed": 17, "data": {"one": "d1", "two": "other"}})
    with pytest.raises(ValueError, match="different rows"):
        statistics.difference(cell("moe_cl"), other)


def test_the_table_shows_means_with_least_and_most_over_orders():
    second = cell("moe_cl", "O2", R=[[1.0, None], [0.75, 1.0]], wall_seconds=110.0)
    records = [ZERO_SHOT, PER_TASK, cell("moe_cl"), second]
    line = next(line for line in figure_table(records).splitlines() if line.startswith("| moe_cl |"))
    shown = [part.strip() for part in line.strip("|").split("|")]
    # ACC 62.5 and 87.5; BWT -50 both; transfer -25 and 0; 2 x 4 rows a task
    assert shown[:4] == ["moe_cl", "O1 O2", "75.0 [62.5, 87.5]", "-50.0 [-50.0, -50.0]"]
    assert shown[6] == "-12.5 [-25.0, +0.0]"
    assert shown[-3:] == ["1,000", "8.0", "100"]


def test_a_method_without_an_order_stands_against_the_first_and_against_every_order():
    records = [PER_TASK, cell("moe_cl"), cell("moe_cl", "O2"), cell("sequential", "O1"), cell("replay_10", "O3")]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in difference_table(records).splitlines()]
    # moe_cl is right on 3 of 4 and 2 of 4 rows, per_task on all: ((0.75 - 1) + (0.5 - 1)) / 2
    assert lines[2][:4] == ["per_task", "O1", "8", "-37.50"]
    assert lines[3][:4] == ["per_task", "O1 O2", "8", "-37.50"]
    assert lines[4] == ["sequential", "O1", "8", "+0.00", "+0.00 to +0.00"]
    assert len(lines) == 5, "no order in common with replay_10"


def test_what_is_kept_after_each_increment_is_a_line_a_setting():
    records = [PER_TASK, cell("moe_cl"), cell("moe_cl", "O2", served_bytes=[1, 1])]
    assert growth_table(records).splitlines()[2:] == ["| per_task | 4.0 | 8.0 |", "| moe_cl | 4.0 | 8.0 |"]


def test_rows_decided_alone_are_compared_row_by_row():
    def reviewed(setting: str, decided: dict[str, str], precision: float | None):
        test = {"rows": 4, "precision": precision}
        entries = {
            t: {"target_precision": 0.9, "test": {**test, "stripping_rate": d.count("1") / 4}}
            for t, d in decided.items()
        }
        return cell(setting, review=entries, decided=decided)

    records = [
        reviewed("sequential", {"one": "0001", "two": "0000"}, None),
        reviewed("moe_cl", {"one": "0111", "two": "1000"}, 0.75),
    ]
    shares = [[part.strip() for part in line.strip("|").split("|")] for line in review_table(records).splitlines()]
    assert shares[2] == ["sequential", "25.0, -", "0.0, -", "12.5"]
    assert shares[3] == ["moe_cl", "75.0, 75.0", "25.0, 75.0", "50.0"]
    line = review_difference_table(records).splitlines()[2]
    assert line.startswith("| sequential | O1 | +37.50 |")  # of 4 rows two more, and one more
    assert review_table([cell("moe_cl")]) == review_difference_table([cell("moe_cl")]) == ""


def test_scores_without_the_tasks_name_stand_beside_those_with_it():
    table = inferred_table([cell("sequential"), cell("moe_cl", R_inferred=[[1.0, None], [0.5, 0.5]])])
    assert table.splitlines()[2:] == ["| moe_cl | O1 | 62.50 | 50.00 | -12.50 |"]
    assert inferred_table([cell("sequential")]) == ""


def test_a_report_says_what_was_measured_before_any_number():
    text = as_markdown("mtl5", [ZERO_SHOT, cell("moe_cl")], NUMBERS)
    assert text.index("16 training, 8 validation and 20 test rows, 6 of which") < text.index("| moe_cl |")
    assert "No cell is finished yet" in as_markdown("mtl5", [], NUMBERS)

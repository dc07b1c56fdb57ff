"""The suites, the methods and the rows of `jobs/benchmark.py quality`."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts import TaskContract
from data_contracts.errors import UserError
from pipeline.benchmarks.quality.cells import Cell, Setting, read_cell, settings_of, write_cell
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.sampling import ROW_FORMS, draw, sample_task
from pipeline.benchmarks.quality.suites import SUITES, Task, contract_of


def rows_of(counts: dict[str, int]) -> list[dict[str, str]]:
    """Rows with so many of each label."""
    return [
        {"id": f"{label}{n}", "text": f"{label} {n}", "label": label} for label in counts for n in range(counts[label])
    ]


def options_of(**changes) -> QualityOptions:
    return QualityOptions(**{"suite": "mtl5", "data": "D", "backbone": "B", "out": "O", **changes})


@pytest.mark.parametrize("setting", settings_of(), ids=lambda setting: setting.name)
def test_every_setting_is_a_method_with_options_it_knows(setting):
    setting.check()
    assert setting.rate_of in (None, *(other.name for other in settings_of() if not other.rate_of))


@pytest.mark.parametrize(
    ("suite", "folder"), [(name, folder) for name, suite in SUITES.items() for folder in suite.tasks]
)
def test_every_task_of_a_suite_has_a_valid_contract(suite, folder):
    task = SUITES[suite].tasks[folder]
    contract = TaskContract.model_validate(contract_of(task, sorted(task.answers or ("x", "y")), 128))
    assert contract.limits.too_long == "truncate" and contract.prompt.endswith((":", "："))


def test_mtl5s_orders_are_the_papers():
    assert SUITES["mtl5"].orders == {
        "O1": ("dbpedia", "amazon", "yahoo", "agnews"),
        "O2": ("dbpedia", "amazon", "agnews", "yahoo"),
        "O3": ("yahoo", "amazon", "agnews", "dbpedia"),
    }
    for suite in SUITES.values():
        assert all(len(set(order)) == len(order) and set(order) <= set(suite.tasks) for order in suite.orders.values())


def test_a_draw_keeps_the_labels_shares_by_largest_remainders():
    rows = rows_of({"a": 60, "b": 30, "c": 10})
    # of 7: 4.2, 2.1, 0.7, so the one row that is left over goes to c
    assert Counter(row["label"] for row in draw(rows, 7, "seed", True)) == {"a": 4, "b": 2, "c": 1}
    assert Counter(row["label"] for row in draw(rows, 10, "seed", True)) == {"a": 6, "b": 3, "c": 1}


def test_a_draw_depends_on_the_seed_and_not_on_the_order_of_the_file():
    rows = rows_of({"a": 30, "b": 30})
    assert draw(rows, 10, "1", True) == draw(rows[::-1], 10, "1", True) != draw(rows, 10, "2", True)
    assert len(draw(rows, 100, "1", True)) == 60 and len(draw(rows, 5, "1", False)) == 5


def test_validation_rows_are_held_out_of_train_where_there_is_no_file(tmp_path):
    (tmp_path / "rte").mkdir()
    for split, count in (("train", 20), ("test", 6)):
        rows = [{**row, "id": f"{split}-{row['id']}"} for row in rows_of({"a": count, "b": count})]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rte" / f"{split}.parquet")
    sample = sample_task(options_of(data=str(tmp_path), validation_rows=10), 17, Task("rte", "{text}:"))
    train, validation = ({row["id"] for row in sample.splits[split]} for split in ("train", "validation"))
    assert len(train) == 30 and len(validation) == 10 and not train & validation
    assert sample.labels == ["a", "b"]
    with pytest.raises(UserError, match="has no cb"):
        sample_task(options_of(data=str(tmp_path)), 17, Task("cb", "{text}:"))


def test_two_tasks_of_one_source_have_different_rows_of_every_split(tmp_path):
    (tmp_path / "tweets").mkdir()
    for split, count in (("train", 9), ("validation", 4), ("test", 5)):
        rows = [{**row, "id": f"{split}-{row['id']}"} for row in rows_of({"a": count, "b": count})]
        pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "tweets" / f"{split}.parquet")
    options = options_of(suite="sentiment8", data=str(tmp_path))
    tasks = [SUITES["sentiment8"].tasks[f"tweets_{half}"] for half in (1, 2)]
    halves = [sample_task(options, 17, task).splits for task in tasks]
    for split, count in (("train", 18), ("validation", 8), ("test", 10)):
        first, second = ({row["id"] for row in half[split]} for half in halves)
        assert len(first) == len(second) == count / 2 and len(first | second) == count
    assert [task.name for task in tasks] == ["tweets_1", "tweets_2"]
    with pytest.raises(UserError, match="has no editorials/train"):
        sample_task(options, 17, SUITES["sentiment8"].tasks["editorials_2"])


def test_a_trace_prompt_is_the_contracts_first_and_last_line_around_the_text():
    prompt = "Solve the following math problem.\nQuestion:\nTwo and two?\nAnswer:"
    row = ROW_FORMS["trace"]({"id": "1", "prompt": prompt, "answer": "4"})
    assert SUITES["trace"].tasks["NumGLUE-cm"].prompt.format(text=row["text"]) == prompt and row["label"] == "4"
    lettered = ROW_FORMS["trace_letter"]({"id": "1", "prompt": prompt, "answer": "B\nBecause it is."})
    assert lettered["label"] == "B"


def test_multirc_keeps_its_question_whole():
    text = "paragraph: Long.\nquestion: Who?\ncandidate answer: Me"
    row = ROW_FORMS["multirc"]({"id": "1", "text": text, "label": "True"})
    assert row["text"] == "paragraph: Long." and row["question"] == "question: Who?\ncandidate answer: Me"


def a_cell(**changes) -> Cell:
    made = {"suite": "mtl5", "setting": settings_of(["moe_cl"])[0], "order": "O1", "tasks": (), "seed": 17}
    made |= {"learning_rate": 1e-3, "options": options_of(), "samples": {}, "backbone": "sha"}
    return Cell(**{**made, **changes})


def test_a_cell_is_known_by_what_decides_its_numbers():
    same = [a_cell(options=options_of(ranks=2, threads=1, out="P", work_dir="W", data="E", methods=("moe_cl",)))]
    others = [
        a_cell(seed=18),
        a_cell(learning_rate=2e-3),
        a_cell(backbone="other"),
        a_cell(setting=settings_of(["moe_cl_pin"])[0]),
        a_cell(options=options_of(train_rows=199)),
        a_cell(options=options_of(test_rows_stream=99)),
        a_cell(options=options_of(max_tokens=100)),
    ]
    assert {cell.digest for cell in same} == {a_cell().digest}
    assert len({cell.digest for cell in [a_cell(), *others]}) == 1 + len(others)


def test_a_cells_file_is_stable_json_and_another_file_is_refused(tmp_path):
    record = {"format": 1, "R": [[0.5, None], [0.25, 1.0]], "answers": [{"one": "01" * 100}], "name": "日本"}
    write_cell(tmp_path / "a.json", record)
    write_cell(tmp_path / "b.json", dict(reversed(record.items())))
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text() and json.loads(text) == record == read_cell(tmp_path / "a.json")
    assert "  [0.5, null],\n  [0.25, 1.0]\n" in text
    (tmp_path / "c.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="not a cell of this benchmark"):
        read_cell(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"suite": "glue"}, "--suite glue"),
        ({"train_rows": 0}, "--train-rows is 0"),
        ({"ranks": 3}, "evenly over 3 ranks"),
        ({"choose": True, "learning_rates": (1, 2, 3, 4, 5)}, "1 to 4"),
        ({"max_tokens": 8}, "--max-tokens is 8"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        options_of(**changes)


def test_a_setting_that_no_method_understands_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"odd: unknown key 'method\.share'"):
        Setting("odd", {"name": "sequential", "share": 1}).check()
    with pytest.raises(UserError, match=r"odd: method\.name is 'magic'"):
        Setting("odd", {"name": "magic"}).check()


def test_a_method_that_is_not_in_the_table_is_named():
    with pytest.raises(UserError, match="--methods nobody: choose from zero_shot"):
        settings_of(["nobody"])

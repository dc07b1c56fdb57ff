"""jobs/predict.py and jobs/evaluate.py on two ranks and on one: published experts give the published answers again."""

import csv
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.jobs.launch import Case, run, run_many
from tests.jobs.many import digests
from tests.jobs.streams import TASKS

pytestmark = pytest.mark.timeout(1200)  # set-up learns a stream
COLUMNS = ["row_id", "answer", "score", "label_scores", "bundle", "reason"]
# what is wrong with each bad row of the new data, and the reason code it must get; nothing is dropped
BAD = {
    "blank": ({"id": "blank", "text": " \t "}, "empty_text"),
    "null": ({"id": "null", "text": None}, "null"),
    "long": ({"id": "long", "text": "word " * 200}, "too_long"),
}
BAD_JSON = {
    "absent": ({"id": "absent"}, "null"),
    "number": ({"id": "number", "text": 7}, "wrong_type"),
}


@pytest.fixture(scope="module")
def data(learned, tmp_path_factory) -> dict[str, Path]:
    """New rows: the test splits without their answers in three formats, and bad rows among seven good ones."""
    folder = tmp_path_factory.mktemp("new")
    files = {}
    for task, suffix in zip(TASKS, (".parquet", ".csv", ".jsonl"), strict=True):
        table = pq.read_table(learned.inputs.root / task / "test.parquet").drop_columns(["label"])
        files[task] = folder / f"{task}{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, files[task])
        elif suffix == ".csv":
            pyarrow.csv.write_csv(table, files[task])
        else:
            write_lines(files[task], table.to_pylist())
    good = pq.read_table(learned.inputs.root / "first" / "test.parquet").drop_columns(["label"]).to_pylist()[:7]
    bad = [row for row, _ in BAD.values()]
    files["bad.parquet"] = folder / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([*good[:3], *bad, *good[3:]]), files["bad.parquet"])
    files["bad.jsonl"] = folder / "bad.jsonl"
    write_lines(files["bad.jsonl"], [*bad, *good, *(row for row, _ in BAD_JSON.values())])
    with open(files["bad.jsonl"], "ab") as file:
        file.write(b'{"id": "cut", "text": "An open\n{"id": "latin", "text": "caf\xe9"}\n')
    files["without_ids"] = folder / "without_ids.csv"
    with open(files["without_ids"], "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in good)])
    files["without_text"] = folder / "without_text.csv"
    files["without_text"].write_text("id,body\n1,Hello there\n")
    return files


@pytest.fixture(scope="module")
def results(learned, data, tmp_path_factory) -> dict:
    """All commands in one launch of two ranks; {name: what became of it}, and the folder of their outputs as `out`."""
    assert learned.second.code == 0, learned.second.text
    out = tmp_path_factory.mktemp("answers")
    work_dir = ("--work-dir", learned.work_dir)

    def predict(task: str, source: Path | str, target: str, *more: str) -> Case:
        return Case("predict", [*work_dir, "--task", task, "--data", source, "--out", out / target, *more])

    cases = {
        "first": predict("first", data["first"], "first.parquet"),
        "second": predict("second", data["second"], "second.csv"),
        "third": predict("third", data["third"], "third.jsonl"),
        "bad.parquet": predict("first", data["bad.parquet"], "bad.parquet.parquet"),
        "bad.jsonl": predict("first", data["bad.jsonl"], "bad.jsonl.parquet"),
        "without_ids": predict("first", data["without_ids"], "without_ids.parquet"),
        "then": predict("first", data["first"], "then.parquet", "--increment", "1"),
        "row": Case("evaluate", work_dir),
        "row_1": Case("evaluate", [*work_dir, "--increment", "1"]),
        "cell": Case("evaluate", [*work_dir, "--task", "second"]),
        "too_early": predict("second", data["second"], "no.parquet", "--increment", "1"),
        "no_increment": predict("first", data["first"], "no.parquet", "--increment", "9"),
        "no_task": predict("fourth", data["first"], "no.parquet"),
        "no_file": predict("first", "nowhere.csv", "no.parquet"),
        "no_column": predict("first", data["without_text"], "no.parquet"),
        "no_format": predict("first", data["first"], "no.txt"),
        "no_work_dir": Case("evaluate", ["--work-dir", out / "empty"]),
        "no_cell": Case("evaluate", [*work_dir, "--task", "fourth"]),
    }
    before = digests(learned.work_dir)
    done = run_many(list(cases.values()), tmp_path_factory.mktemp("predict") / "out", ranks=2)
    return {**dict(zip(cases, done, strict=True)), "out": out, "before": before}


def write_lines(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def published(learned, folder: str, task: str) -> dict[str, dict]:
    """Rows of an increment's predictions file by row id."""
    table = pq.read_table(learned.work_dir / "increments" / folder / "predictions" / f"{task}.parquet")
    return {row["row_id"]: row for row in table.to_pylist()}


def bundle_of(learned, task: str) -> str:
    """sha256 of a task's bundle in the champion file, as canonical JSON."""
    bundle = json.loads((learned.work_dir / "champion.json").read_text())["bundles"][task]
    return hashlib.sha256(json.dumps(bundle, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- the same answers


def test_parquet_rows_get_the_published_answers_and_scores_to_the_bit(learned, results):
    assert results["first"].code == 0, results["first"].text
    assert "20 rows in, 20 answered, not answered: none" in results["first"].stdout
    table = pq.read_table(results["out"] / "first.parquet")
    assert table.column_names == COLUMNS
    expected = published(learned, "0003-third", "first")
    assert table["row_id"].to_pylist() == list(expected)
    for row in table.to_pylist():
        then = expected[row["row_id"]]
        for column in ("answer", "score", "label_scores"):
            assert row[column] == then[column]
        assert row["bundle"] == bundle_of(learned, "first") and row["reason"] is None


def test_csv_and_jsonl_rows_get_the_published_answers_and_scores(learned, results):
    answers = {
        "second": pyarrow.csv.read_csv(results["out"] / "second.csv").to_pylist(),
        "third": [json.loads(line) for line in (results["out"] / "third.jsonl").read_text().splitlines()],
    }
    for task, rows in answers.items():
        assert results[task].code == 0, results[task].text
        expected = published(learned, "0003-third", task)
        assert {row["row_id"]: row["answer"] for row in rows} == {n: row["answer"] for n, row in expected.items()}
        for row in rows:
            assert row["score"] == pytest.approx(expected[row["row_id"]]["score"], abs=1e-6)
            assert row["bundle"] == bundle_of(learned, task)


def test_an_earlier_increment_answers_as_it_did(learned, results):
    assert results["then"].code == 0, results["then"].text
    expected = published(learned, "0001-first", "first")
    for row in pq.read_table(results["out"] / "then.parquet").to_pylist():
        then = expected[row["row_id"]]
        assert (row["answer"], row["label_scores"]) == (then["answer"], then["label_scores"])


def test_one_process_without_the_launcher_gives_the_same(learned, data, tmp_path):
    done = run(
        "jobs/predict.py",
        *("--work-dir", learned.work_dir, "--task", "third", "--data", data["third"], "--out", tmp_path / "a.parquet"),
    )
    assert done.code == 0, done.text
    assert done.stderr == ""
    expected = published(learned, "0003-third", "third")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["row_id"] for row in rows] == list(expected)
    for row in rows:
        then = expected[row["row_id"]]
        assert row["answer"] == then["answer"]
        assert row["label_scores"] == pytest.approx(then["label_scores"], rel=1e-6, abs=1e-6)


# ---- no row is lost


@pytest.mark.parametrize("name", ["bad.parquet", "bad.jsonl"])
def test_rows_that_cannot_be_answered_keep_their_place_and_say_why(learned, results, name):
    reasons = {row_id: reason for row_id, (_, reason) in BAD.items()}
    if name == "bad.jsonl":
        reasons |= {row_id: reason for row_id, (_, reason) in BAD_JSON.items()}
    done = results[name]
    assert done.code == 0, done.text
    rows = pq.read_table(results["out"] / f"{name}.parquet").to_pylist()
    bad = [row for row in rows if row["reason"]]
    assert {row["row_id"]: row["reason"] for row in bad if row["row_id"]} == reasons
    unreadable = [row["reason"] for row in bad if not row["row_id"]]
    assert unreadable == ([] if name == "bad.parquet" else ["malformed", "invalid_utf8"])
    assert all((row["answer"], row["score"], row["label_scores"]) == (None, None, None) for row in bad)
    assert len(rows) == 7 + len(reasons) + len(unreadable)
    if name == "bad.parquet":
        assert [row["row_id"] for row in rows][3:6] == list(BAD)
    assert f"{len(rows)} rows in, 7 answered, not answered: " in done.stdout
    expected = published(learned, "0003-third", "first")
    good = [row for row in rows if not row["reason"]]
    assert [row["row_id"] for row in good] == list(expected)[:7]
    for row in good:
        assert row["answer"] == expected[row["row_id"]]["answer"]
        assert row["score"] == pytest.approx(expected[row["row_id"]]["score"], abs=1e-6)
        # log-probabilities near -20 have a last place of 2e-6 in float32
        assert row["label_scores"] == pytest.approx(expected[row["row_id"]]["label_scores"], rel=1e-6, abs=1e-6)


def test_rows_without_an_id_column_are_numbered(learned, results):
    assert results["without_ids"].code == 0, results["without_ids"].text
    rows = pq.read_table(results["out"] / "without_ids.parquet").to_pylist()
    expected = list(published(learned, "0003-third", "first").values())[:7]
    assert [row["row_id"] for row in rows] == [str(line) for line in range(2, 9)]  # the lines of the CSV file
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]


# ---- rows of R again


def cells(text: str) -> dict[str, tuple[str, str]]:
    """{task: (score now, score as recorded)} from what jobs/evaluate.py prints."""
    return {task: (now, then) for task, now, then in re.findall(r"^ +(\w+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    ("name", "number", "tasks"), [("row", 2, TASKS), ("row_1", 0, ("first",)), ("cell", 2, ("second",))]
)
def test_a_row_computed_again_from_the_bank_is_the_recorded_one(learned, results, name, number, tasks):
    assert results[name].code == 0, results[name].text
    row = learned.manifests[number]["row"]
    # 20 test rows: scores are multiples of 0.05, so two decimals of a percentage are exact
    assert cells(results[name].stdout) == {task: (f"{100 * row[task]:.2f}",) * 2 for task in tasks}


def test_reading_changes_nothing_that_was_published(learned, results):
    assert results["before"] == digests(learned.work_dir)


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("too_early", "task 'second' is not learned"),
        ("no_increment", "no increment 9"),
        ("no_task", "task 'fourth' is not learned"),
        ("no_file", "nowhere.csv"),
        ("no_column", "no column 'text'"),
        ("no_format", "must end in .parquet, .jsonl, .csv"),
        ("no_work_dir", "no published increment"),
        ("no_cell", "task 'fourth' is not learned"),
    ],
)
def test_a_mistake_ends_with_exit_2_and_one_sentence(results, name, says):
    done = results[name]
    assert [done.code, *(other.code for other in done.others)] == [2, 2], done.text
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.text
    assert not list(results["out"].glob("no.*"))

"""jobs/predict.py and jobs/evaluate.py on two ranks and on one: published experts give the published answers again."""

import hashlib
import json
import re

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.jobs.many import digests
from tests.jobs.new_rows import BAD, BAD_JSON
from tests.jobs.streams import TASKS

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own
COLUMNS = ["row_id", "answer", "score", "label_scores", "bundle", "reason"]


def recorded(learned, folder: str, task: str) -> dict[str, dict]:
    """Rows of an increment's predictions file by row id."""
    table = pq.read_table(learned.work_dir / "increments" / folder / "predictions" / f"{task}.parquet")
    return {row["row_id"]: row for row in table.to_pylist()}


def bundle_of(learned, task: str) -> str:
    """sha256 of a task's bundle in the champion file, as canonical JSON."""
    bundle = json.loads((learned.work_dir / "champion.json").read_text())["bundles"][task]
    return hashlib.sha256(json.dumps(bundle, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- the same answers


def test_parquet_rows_get_the_published_answers_and_scores_to_the_bit(learned, on_two_ranks):
    assert on_two_ranks.done["first"].code == 0, on_two_ranks.done["first"].text
    assert "20 rows in, 20 answered, not answered: none" in on_two_ranks.done["first"].stdout
    table = pq.read_table(on_two_ranks.answers / "first.parquet")
    assert table.column_names == COLUMNS
    expected = recorded(learned, "0003-third", "first")
    assert table["row_id"].to_pylist() == list(expected)
    for row in table.to_pylist():
        then = expected[row["row_id"]]
        for column in ("answer", "score", "label_scores"):
            assert row[column] == then[column]
        assert row["bundle"] == bundle_of(learned, "first") and row["reason"] is None


def test_csv_and_jsonl_rows_get_the_published_answers_and_scores(learned, on_two_ranks):
    answers = {
        "second": pyarrow.csv.read_csv(on_two_ranks.answers / "second.csv").to_pylist(),
        "third": [json.loads(line) for line in (on_two_ranks.answers / "third.jsonl").read_text().splitlines()],
    }
    for task, rows in answers.items():
        assert on_two_ranks.done[task].code == 0, on_two_ranks.done[task].text
        expected = recorded(learned, "0003-third", task)
        assert {row["row_id"]: row["answer"] for row in rows} == {n: row["answer"] for n, row in expected.items()}
        for row in rows:
            assert row["score"] == pytest.approx(expected[row["row_id"]]["score"], abs=1e-6)
            assert row["bundle"] == bundle_of(learned, task)


def test_an_earlier_increment_answers_as_it_did(learned, on_two_ranks):
    assert on_two_ranks.done["then"].code == 0, on_two_ranks.done["then"].text
    expected = recorded(learned, "0001-first", "first")
    for row in pq.read_table(on_two_ranks.answers / "then.parquet").to_pylist():
        then = expected[row["row_id"]]
        assert (row["answer"], row["label_scores"]) == (then["answer"], then["label_scores"])


def test_one_process_without_the_launcher_gives_the_same(learned, on_one_rank):
    done, answers = on_one_rank.alone, on_one_rank.answers
    assert done.code == 0, done.text
    expected = recorded(learned, "0003-third", "third")
    rows = pq.read_table(answers).to_pylist()
    assert [row["row_id"] for row in rows] == list(expected)
    for row in rows:
        then = expected[row["row_id"]]
        assert row["answer"] == then["answer"]
        assert row["label_scores"] == pytest.approx(then["label_scores"], rel=1e-6, abs=1e-6)


# ---- no row is lost


@pytest.mark.parametrize("name", ["bad.parquet", "bad.jsonl"])
def test_rows_that_cannot_be_answered_keep_their_place_and_say_why(learned, on_two_ranks, name):
    reasons = {row_id: reason for row_id, (_, reason) in BAD.items()}
    if name == "bad.jsonl":
        reasons |= {row_id: reason for row_id, (_, reason) in BAD_JSON.items()}
    done = on_two_ranks.done[name]
    assert done.code == 0, done.text
    rows = pq.read_table(on_two_ranks.answers / f"{name}.parquet").to_pylist()
    bad = [row for row in rows if row["reason"]]
    assert {row["row_id"]: row["reason"] for row in bad if row["row_id"]} == reasons
    unreadable = [row["reason"] for row in bad if not row["row_id"]]
    assert unreadable == ([] if name == "bad.parquet" else ["malformed", "invalid_utf8"])
    assert all((row["answer"], row["score"], row["label_scores"]) == (None, None, None) for row in bad)
    assert len(rows) == 7 + len(reasons) + len(unreadable)
    if name == "bad.parquet":
        assert [row["row_id"] for row in rows][3:6] == list(BAD)
    assert f"{len(rows)} rows in, 7 answered, not answered: " in done.stdout
    expected = recorded(learned, "0003-third", "first")
    good = [row for row in rows if not row["reason"]]
    assert [row["row_id"] for row in good] == list(expected)[:7]
    for row in good:
        assert row["answer"] == expected[row["row_id"]]["answer"]
        assert row["score"] == pytest.approx(expected[row["row_id"]]["score"], abs=1e-6)
        # log-probabilities near -20 have a last place of 2e-6 in float32
        assert row["label_scores"] == pytest.approx(expected[row["row_id"]]["label_scores"], rel=1e-6, abs=1e-6)


def test_rows_without_an_id_column_are_numbered(learned, on_two_ranks):
    assert on_two_ranks.done["without_ids"].code == 0, on_two_ranks.done["without_ids"].text
    rows = pq.read_table(on_two_ranks.answers / "without_ids.parquet").to_pylist()
    expected = list(recorded(learned, "0003-third", "first").values())[:7]
    assert [row["row_id"] for row in rows] == [str(line) for line in range(2, 9)]  # the lines of the CSV file
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]


# ---- rows of R again


def cells(text: str) -> dict[str, tuple[str, str]]:
    """{task: (score now, score as recorded)} from what jobs/evaluate.py prints."""
    return {task: (now, then) for task, now, then in re.findall(r"^ +(\w+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    ("name", "number", "tasks"), [("row", 2, TASKS), ("row_1", 0, ("first",)), ("cell", 2, ("second",))]
)
def test_a_row_computed_again_from_the_bank_is_the_recorded_one(learned, on_two_ranks, name, number, tasks):
    assert on_two_ranks.done[name].code == 0, on_two_ranks.done[name].text
    row = learned.manifests[number]["row"]
    # 20 test rows: scores are multiples of 0.05, so two decimals of a percentage are exact
    assert cells(on_two_ranks.done[name].stdout) == {task: (f"{100 * row[task]:.2f}",) * 2 for task in tasks}


def test_reading_changes_nothing_that_was_recorded(learned, on_two_ranks):
    assert on_two_ranks.before == digests(learned.work_dir)


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
def test_a_mistake_ends_with_exit_2_and_one_sentence(on_two_ranks, name, says):
    done = on_two_ranks.done[name]
    assert [done.code, *(other.code for other in done.others)] == [2, 2], done.text
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.text
    assert not list(on_two_ranks.answers.glob("no.*"))

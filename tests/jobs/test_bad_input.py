"""Bad input to jobs/continual.py: exit 2, one readable sentence on stderr, nothing published."""

import pyarrow.parquet as pq
import pytest

from tests.jobs.mistakes import MISTAKES
from tests.jobs.streams import published

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_exit_2_and_one_sentence(on_one_rank, name):
    done = on_one_rank.done[name]
    assert done.code == 2, done.text
    assert len(done.stderr.splitlines()) == 1, done.text
    assert done.stderr.startswith("continual: ")
    assert [part for part in MISTAKES[name].says if part not in done.stderr] == [], done.stderr
    assert "== increment" not in done.stdout, done.text


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_publishes_nothing(on_one_rank, name):
    left = on_one_rank.done[name].files
    assert published(left) == on_one_rank.before[name]
    if not on_one_rank.before[name]:
        made_before = {"quarantine", "prepared", "tracking.json"}  # the last: an id of the folder, for MLflow
        assert {file.partition("/")[0] for file in left} <= made_before, sorted(left)


def test_rejected_rows_are_in_the_quarantine_with_file_line_and_reason(on_one_rank):
    names = [name for name in on_one_rank.done["too_many_bad_rows"].files if name.startswith("quarantine/")]
    assert len(names) == 1
    rows = pq.read_table(on_one_rank.places["too_many_bad_rows"].work_dir / names[0]).to_pylist()
    assert [(row["file"], row["line"], row["split"], row["reason"]) for row in rows] == [
        ("alone/train.parquet", 1, "train", "empty_text"),
        ("alone/train.parquet", 2, "train", "empty_text"),
        ("alone/train.parquet", 3, "train", "empty_text"),
        ("alone/train.parquet", 4, "train", "unknown_label"),
        ("alone/train.parquet", 5, "train", "unknown_label"),
    ]


def test_only_data_that_was_read_leaves_a_quarantine(on_one_rank):
    with_quarantine = [
        n for n, done in on_one_rank.done.items() if any(f.startswith("quarantine/") for f in done.files)
    ]
    assert with_quarantine == ["too_many_bad_rows"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("divides", "batch_size 6 does not divide over 2 ranks x micro_batch_size 2"), ("bad_rows", "5 of 24 rows")],
)
def test_two_ranks_say_one_sentence_and_all_exit_2(on_two_ranks, name, says):
    done = on_two_ranks.done[name]
    assert [done.code, *(other.code for other in done.others)] == [2, 2], done.text
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.text
    assert done.others[0].stderr == ""
    assert published(done.files) == {}

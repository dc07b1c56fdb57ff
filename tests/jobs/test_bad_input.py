"""Bad input to jobs/continual.py: exit 2, one readable sentence on stderr, nothing published."""

import pyarrow.parquet as pq
import pytest

from tests.jobs import mistakes_in_models, mistakes_in_streams, mistakes_in_tasks  # noqa: F401 (each registers its own)
from tests.jobs.launch import Done, run_many
from tests.jobs.many import digests
from tests.jobs.mistakes import MISTAKES, Place

pytestmark = pytest.mark.timeout(1200)  # set-up learns a stream first; every launch has its own, shorter limit
PUBLISHED = ("champion.json", "increments/", "bank/")


@pytest.fixture(scope="module")
def places(learned, tmp_path_factory) -> dict[str, Place]:
    """A folder for each mistake."""
    assert learned.second.code == 0, learned.second.text
    return {name: Place(tmp_path_factory.mktemp(name), learned) for name in MISTAKES}


@pytest.fixture(scope="module")
def before(places) -> dict[str, tuple[list[str], dict[str, str]]]:
    """For each mistake, the command's arguments and what is published in its work_dir before it runs."""
    built = {name: mistake.build(places[name]) for name, mistake in MISTAKES.items()}
    return {name: (arguments, published(digests(places[name].work_dir))) for name, arguments in built.items()}


@pytest.fixture(scope="module")
def outcomes(places, before, tmp_path_factory) -> dict[str, Done]:
    """What became of each mistake; one process for all of them."""
    cases = [places[name].case(arguments)[1] for name, (arguments, _) in before.items()]
    return dict(zip(before, run_many(cases, tmp_path_factory.mktemp("bad") / "out"), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_exit_2_and_one_sentence(outcomes, name):
    done = outcomes[name]
    assert done.code == 2, done.text
    assert len(done.stderr.splitlines()) == 1, done.text
    assert done.stderr.startswith("continual: ")
    assert [part for part in MISTAKES[name].says if part not in done.stderr] == [], done.stderr
    assert "== increment" not in done.stdout, done.text


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_publishes_nothing(outcomes, before, name):
    left = outcomes[name].files
    assert published(left) == before[name][1]
    if not before[name][1]:
        assert {file.partition("/")[0] for file in left} <= {"quarantine", "prepared"}, sorted(left)


def test_rejected_rows_are_in_the_quarantine_with_file_line_and_reason(outcomes, places):
    names = [name for name in outcomes["too_many_bad_rows"].files if name.startswith("quarantine/")]
    assert len(names) == 1
    rows = pq.read_table(places["too_many_bad_rows"].work_dir / names[0]).to_pylist()
    assert [(row["file"], row["line"], row["split"], row["reason"]) for row in rows] == [
        ("alone/train.parquet", 1, "train", "empty_text"),
        ("alone/train.parquet", 2, "train", "empty_text"),
        ("alone/train.parquet", 3, "train", "empty_text"),
        ("alone/train.parquet", 4, "train", "unknown_label"),
        ("alone/train.parquet", 5, "train", "unknown_label"),
    ]


def test_only_data_that_was_read_leaves_a_quarantine(outcomes):
    with_quarantine = [n for n, done in outcomes.items() if any(f.startswith("quarantine/") for f in done.files)]
    assert with_quarantine == ["too_many_bad_rows"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("divides", "batch_size 6 does not divide over 2 ranks x micro_batch_size 2"), ("bad_rows", "5 of 24 rows")],
)
def test_two_ranks_say_one_sentence_and_all_exit_2(on_two_ranks, name, says):
    _, done = on_two_ranks[name]
    assert [done.code, *(other.code for other in done.others)] == [2, 2], done.text
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.text
    assert done.others[0].stderr == ""
    assert published(done.files) == {}


def published(files: dict[str, str]) -> dict[str, str]:
    """Of a work_dir's files, those that make up what is served."""
    return {name: digest for name, digest in files.items() if name.startswith(PUBLISHED)}

"""Runs of three increments on two ranks, killed and continued: nothing lost, repeated or torn, to the bit.

One setting, a handful of kills, EP 2 -> 1. `make proof-faults` has both backbones, both dtypes, every moment of
publishing and 2 -> 1 -> 4 ranks.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.launch import Outcome
from tests.faults.plans import kind_of
from tests.faults.runs import account
from tests.faults.streams import TASKS, Inputs
from tests.helpers import make_task

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # a first test waits for all launches
# the champion that stands after each kill: 0 none, 1 that of the first increment, ...
STANDING = {
    "state 3 file": 0,
    "bank file": 1,
    "os.rename /inflight/publish-2": 1,
    "os.rename /.champion.json": 2,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `tests/faults/driver.py --short` found."""
    out = tmp_path_factory.mktemp("faults") / "found.json"
    command = [sys.executable, "-m", "tests.faults.driver", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=840, check=False)
    assert out.is_file(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def broken(found):
    """The one run that was killed."""
    (run,) = found["runs"]
    return run


def test_a_run_killed_four_times_on_2_ranks_ends_as_the_unbroken_one_to_the_bit(broken):
    assert len(broken["strikes"]) == 4 and broken["not_reached"] == 0
    assert broken["differing"] == [] and broken["end"] == ""


def test_no_row_is_lost_or_repeated(broken):
    assert (broken["lost"], broken["repeated"]) == (0, 0)


def test_after_each_kill_the_old_champion_stands_whole_or_the_new_one(broken):
    for strike, (place, standing) in zip(broken["strikes"], STANDING.items(), strict=True):
        assert place in f"{strike['point']['place']} {strike['point']['detail']}"
        assert (strike["published"], strike["torn"]) == (standing, [])


def test_one_killed_rank_ends_the_other_one_too(broken):
    assert {strike["how"] for strike in broken["strikes"]} == {"rank", "ranks", "group"}
    for strike in broken["strikes"]:
        assert strike["code"] != 0 and strike["left"] == [] and strike["seconds_to_end"] < 60


def test_an_increment_stopped_at_ep_2_on_2_ranks_goes_on_at_ep_1_on_1_with_the_same_losses(found):
    (world,) = found["worlds"]
    assert world["plan"]["ranks"] == [2, 1] and world["codes"] == [75, 0]
    assert world["begun"] == [0, 2]  # it goes on at the next global batch
    assert world["loss_difference"] <= 1e-4
    assert (world["lost"], world["repeated"], world["problems"]) == (0, 0, [])


def test_a_damaged_state_is_refused_on_2_ranks_in_one_sentence_and_left_alone(found):
    code, *lines = found["worlds"][0]["refused"].splitlines()
    assert code == "exit 2" and not any("Traceback" in line for line in lines)
    (said,) = [line for line in lines if line.startswith("continual: ")]
    assert "state.safetensors: was altered since it was written; restore it from a backup" in said


def test_the_harness_tells_lost_rows_from_repeated_ones(tmp_path):
    for task in TASKS:
        make_task(tmp_path / "data", task, rows={"train": 2, "validation": 1, "test": 1})
    a, b = "train-1", "train-2"

    def begins(number: int, step: int) -> dict:
        return {"kind": "begins", "title": f"increment {number} {TASKS[number - 1]}", "step": step}

    def rows(step: int, *ids: str) -> dict:
        return {"kind": "rows", "step": step, "ids": list(ids)}

    def saves(step: int) -> dict:
        return {"kind": "point", "place": f"state {step} file", "detail": "os.rename /inflight/.state"}

    def launched(*ranks: list[dict]) -> Outcome:
        return Outcome(0, False, 0.0, 0.0, [], list(ranks), "")

    def counted(*launches: Outcome) -> tuple[int, int]:
        return account(launches, Inputs(tmp_path), TASKS[:1])

    whole = launched([begins(1, 0), rows(0, a), rows(1, b)], [begins(1, 0), rows(0, b), rows(1, a)])
    assert counted(whole) == (0, 0)
    killed = launched([begins(1, 0), rows(0, a), saves(1), rows(1, b)], [begins(1, 0), rows(0, b)])
    assert counted(killed, launched([begins(1, 1), rows(1, b)], [begins(1, 1), rows(1, a)])) == (0, 0)
    assert counted(killed, launched([begins(1, 2)], [begins(1, 2)])) == (2, 0)  # behind a step that was never saved
    unsaved = launched([begins(1, 0), rows(0, a)], [begins(1, 0), rows(0, b)])
    assert counted(unsaved, launched([begins(1, 1), rows(1, b)], [begins(1, 1), rows(1, a)])) == (2, 0)
    assert counted(killed, launched([begins(1, 1), rows(1, b, a)], [begins(1, 1), rows(1, a)])) == (0, 1)
    assert counted(launched([begins(1, 0), rows(0, a, a), rows(1, a)], [begins(1, 0)])) == (2, 1)


def test_places_are_counted_by_kind():
    kinds = {"publish file": "publish file", "state 3 file": "state file", "after step 2": "optimizer step"}
    kinds |= {"step 1": "optimizer step", "before train": "stage edge", "after register": "stage edge"}
    assert {place: kind_of(place) for place in kinds} == kinds

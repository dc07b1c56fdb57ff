"""Published experts and running increments are free of the world size and of the expert-parallel degree.

Figures are of 12 routed experts, fp32: EP 4 on 4 ranks, EP 2 on 2 and 4, EP 1 on 1 and 4.
"""

import itertools

import pytest
import torch

from tests.distributed.learning import TASKS
from tests.distributed.test_equality import CHANGE, LOSS, column, gap
from tests.distributed.worlds import Case
from tests.moe.worlds import FRESH, GOES_ON, PROTOTYPE, STEPS, STOP_AFTER

pytestmark = pytest.mark.timeout(900)  # a first test waits for up to three launches
SCORE = 5e-7  # of a label's score, which is a sum over up to six tokens: 1e-5 where it is 20
ROUNDING = 1e-5  # the same against fp64


@pytest.fixture(scope="module")
def served(moe_worlds):
    """Label scores {EP: (increment, task) -> (rows, labels)} of the experts that EP 4 published."""
    scores = {}
    for ep in (1, 2, 4):
        notes = moe_worlds.case("four", f"scores-ep{ep}").notes
        assert len(notes) == 4 and all(note["scores"] == notes[0]["scores"] for note in notes)
        scores[ep] = {
            (int(number), task): torch.tensor(rows, dtype=torch.float64)
            for number, by_task in notes[0]["scores"].items()
            for task, rows in by_task.items()
        }
    return scores


def test_experts_published_at_ep_4_score_the_same_at_ep_1_and_2(served):
    for one, other in itertools.combinations(served, 2):
        assert served[one].keys() == served[other].keys() and len(served[one]) == 6
        for what, scores in served[one].items():
            assert scores.shape == (6, 3)
            assert ((scores - served[other][what]).abs() <= SCORE * scores.abs()).all(), (one, other, what)
    # and the increments score differently
    assert (served[1][1, "first"] - served[1][2, "first"]).abs().min() > 1e-3


def test_published_experts_score_as_in_the_naive_single_process(naive, moe_worlds, served):
    case = moe_worlds.case("four", "ep4-zero3")
    for number in (FRESH, PROTOTYPE):
        oracle = naive.oracle("hunyuan", case.tensors(number, "final"))
        task = naive.tasks("hunyuan")[TASKS[number]]
        rows = naive.rows("hunyuan", number, "test")
        prompts, _ = rows.tokens(range(len(rows)))
        expected = oracle.label_scores(prompts, task.label_ids)
        found = served[4][number, TASKS[number]]
        assert ((found - expected).abs() <= ROUNDING * expected.abs()).all()


def test_increment_1_at_ep_2_and_increment_2_at_ep_4_equal_all_at_ep_1(moe_worlds):
    """EP 4 started increment 2 from the very experts that EP 2 published; EP 1 from its own."""
    first, second = moe_worlds.case("pair", "ep2-zero3"), moe_worlds.case("four", "ep4-zero3")
    alone = moe_worlds.case("single", "ep1-alone")
    for name, value in first.tensors(FRESH, "final").items():
        if name.startswith(("shared/", "gate/")):
            assert torch.equal(second.tensors(PROTOTYPE, "start")[name], value)
    for case, number in ((first, FRESH), (second, PROTOTYPE)):
        assert len(column(case, number, "loss")) == STEPS
        for term in ("loss", "grad_norm", "adversary") if number == PROTOTYPE else ("loss", "grad_norm"):
            assert gap(column(case, number, term), column(alone, number, term)) < LOSS
        assert_same_learning(case, alone, number)


def test_a_run_stopped_at_ep_2_on_2_ranks_goes_on_at_ep_4_on_4(moe_worlds):
    stopped, continued = moe_worlds.case("pair", "ep2-stopped"), moe_worlds.case("four", "ep4-continued")
    unbroken = moe_worlds.case("pair", "ep2-zero3")
    assert [len(case.notes) for case in (stopped, continued)] == [2, 4]
    for note in stopped.notes:
        assert f"stopped at step {STOP_AFTER} of {STEPS}" in note["stopped"] and note["increments"] == {}
    assert continued.increment(PROTOTYPE)["continuations"] == 1
    for term in ("loss", "grad_norm", "adversary"):
        found = column(continued, PROTOTYPE, term)
        assert len(found) == STEPS - STOP_AFTER
        assert gap(found, column(unbroken, PROTOTYPE, term)[STOP_AFTER:]) < LOSS
    assert_same_learning(continued, unbroken, PROTOTYPE)


@pytest.mark.parametrize("place", (("pair", "ep2-zero3"), ("four", "ep4-zero3")), ids=str)
def test_a_pinned_task_scores_the_same_bits_after_later_increments(moe_worlds, place):
    case = moe_worlds.case(*place)
    first, second, third = (case.increment(number)["pinned"] for number in (FRESH, PROTOTYPE, GOES_ON))
    assert len(first) == 6 and first == second == third
    bundles = [case.records[str(number)]["bundle"] for number in (FRESH, PROTOTYPE, GOES_ON)]
    for component in ("shared", "dedicated", "gate"):
        assert len({bundle[component] for bundle in bundles}) == 3


def assert_same_learning(found: Case, expected: Case, number: int) -> None:
    """Every tensor ended where it should, within `CHANGE` of the way it went."""
    start, final = (expected.tensors(number, kind) for kind in ("start", "final"))
    other = found.tensors(number, "final")
    assert start.keys() == other.keys() == final.keys() and start
    for name in start:
        assert torch.dist(other[name], final[name]) <= CHANGE * torch.dist(final[name], start[name]), name

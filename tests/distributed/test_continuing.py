"""A stopped run goes on as if it had never stopped: same bits on the same number of ranks, within rounding on another.

The stop is asked of the last rank alone, during step 3 of 5, in an increment with discriminator and prototypes. Another
launch goes on from the in-flight file.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.worlds import PROTOTYPE, STEPS, STOP_AFTER

NUMBER = PROTOTYPE
ROUGH = ("zero2-bf16-dropout", "zero3-bf16-dropout")
ONE_RANK = {"zero3 x1": ("single", "zero3-continued"), "zero2 x1": ("single", "zero2-continued")}


@pytest.mark.parametrize("name", ["zero3", *ROUGH])
def test_one_asked_rank_stops_all_ranks_after_the_same_step(worlds, name):
    stopped = worlds.case("pair_a", f"{name}-stopped")
    assert len(stopped.notes) == 2
    for note in stopped.notes:
        assert f"stopped at step {STOP_AFTER} of {STEPS}" in note["stopped"]
        assert note["increments"] == {}


@pytest.mark.parametrize("name", ROUGH)
def test_continued_run_equals_unbroken_run_to_the_bit(worlds, name):
    unbroken, continued = worlds.case("pair_a", f"{name}-unbroken"), worlds.case("pair_b", f"{name}-continued")
    for rank in range(2):
        before, after = (case.increment(NUMBER, rank) for case in (unbroken, continued))
        assert (before["continuations"], after["continuations"]) == (0, 1)
        assert len(before["steps"]) == STEPS
        assert after["steps"] == before["steps"][STOP_AFTER:]
    expected, found = unbroken.tensors(NUMBER, "final"), continued.tensors(NUMBER, "final")
    assert expected.keys() == found.keys() and len(expected) == 45
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ROUGH)
def test_continued_run_has_the_moments_of_the_unbroken_one(worlds, name):
    worlds.case("pair_b", f"{name}-continued")
    unbroken, continued = (
        load_file(worlds.folder / "work" / f"{kind}-{name}" / "inflight" / "state.safetensors")
        for kind in ("unbroken", "stopped")
    )
    assert unbroken.keys() == continued.keys() and len(unbroken) == 3 * 45
    assert all(torch.equal(continued[tensor], unbroken[tensor]) for tensor in unbroken)
    assert all(unbroken[tensor].any() for tensor in unbroken)


@pytest.mark.parametrize("name", ROUGH)
def test_dropout_and_bf16_were_on(worlds, name):
    smooth = [step["loss"] for step in worlds.case("pair_a", "zero3").increment(NUMBER)["steps"]]
    rough = [step["loss"] for step in worlds.case("pair_a", f"{name}-unbroken").increment(NUMBER)["steps"]]
    assert all(1e-4 < abs(a - b) < 1 for a, b in zip(smooth, rough, strict=True))


@pytest.mark.parametrize("world", ONE_RANK)
def test_a_run_stopped_on_two_ranks_goes_on_on_one(worlds, world):
    unbroken, continued = worlds.case("pair_a", "zero3"), worlds.case(*ONE_RANK[world])
    assert len(continued.notes) == 1
    expected, found = unbroken.increment(NUMBER)["steps"][STOP_AFTER:], continued.increment(NUMBER)["steps"]
    assert len(found) == STEPS - STOP_AFTER
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys() and {"loss", "adversary", "grad_norm"} <= before.keys()
        assert all(abs(before[name] - after[name]) < 1e-5 for name in before)
    start = unbroken.tensors(NUMBER, "start")
    whole, other = unbroken.tensors(NUMBER, "final"), continued.tensors(NUMBER, "final")
    for name in start:
        assert torch.dist(other[name], whole[name]) < 1e-3 * torch.dist(whole[name], start[name]), name

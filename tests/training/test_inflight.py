"""The running increment on disk: what is saved comes back to the bit, for the same inputs only, whole or not at all."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open

from pipeline.placement.state import TrainableState
from pipeline.training.inflight import load_inflight, save_inflight


def state(seed: int, steps: int = 7) -> TrainableState:
    torch.manual_seed(seed)
    names = ("shared/model.layers.0.mlp.up_proj.lora_A", "gate/model.layers.0.mlp.gate.weight", "discriminator/x.bias")

    def draw() -> dict[str, torch.Tensor]:
        return {name: torch.randn(4) if "/x." in name else torch.randn(3, 5) for name in names}

    return TrainableState(draw(), {"exp_avg": draw(), "exp_avg_sq": draw()}, steps)


def assert_same(first: TrainableState, second: TrainableState) -> None:
    assert first.optimizer_steps == second.optimizer_steps
    for ours, theirs in (
        (first.values, second.values),
        (first.moments["exp_avg"], second.moments["exp_avg"]),
        (first.moments["exp_avg_sq"], second.moments["exp_avg_sq"]),
    ):
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    saved = state(1)
    saved.values["gate/model.layers.0.mlp.gate.weight"][0, 0] = 1e-42  # a denormal
    save_inflight(tmp_path / "inflight", "key", 7, saved, 2)
    loaded = load_inflight(tmp_path / "inflight", "key")
    assert (loaded.step, loaded.continuations) == (7, 2)
    assert_same(loaded.state, saved)


def test_a_state_of_other_inputs_is_never_continued(tmp_path):
    save_inflight(tmp_path, "key", 7, state(1), 0)
    assert load_inflight(tmp_path, "other") is None
    assert load_inflight(tmp_path / "nothing", "key") is None
    save_inflight(tmp_path, "other", 3, state(2), 0)  # the increment at hand takes the place
    assert load_inflight(tmp_path, "key") is None
    assert load_inflight(tmp_path, "other").step == 3


def test_a_newer_state_replaces_the_older_one_in_one_file(tmp_path):
    save_inflight(tmp_path, "key", 7, state(1), 0)
    save_inflight(tmp_path, "key", 9, state(2, steps=9), 1)
    loaded = load_inflight(tmp_path, "key")
    assert (loaded.step, loaded.continuations) == (9, 1)
    assert_same(loaded.state, state(2, steps=9))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_while_writing_leaves_the_older_state(tmp_path, event):
    save_inflight(tmp_path, "key", 7, state(1), 0)
    newer = state(2)
    child = os.fork()
    if child == 0:  # dies as it opens the temporary file, or just before the rename
        sys.addaudithook(lambda name, _: os._exit(9) if name == event else None)
        save_inflight(tmp_path, "key", 9, newer, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    loaded = load_inflight(tmp_path, "key")
    assert loaded.step == 7
    assert_same(loaded.state, state(1))


def test_the_file_knows_nothing_of_world_size_or_place(tmp_path):
    save_inflight(tmp_path, "key", 7, state(1), 2)
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["perennial"])
        names = set(file.keys())
    assert note == {"key": "key", "step": 7, "optimizer_steps": 7, "continuations": 2}
    assert names == {f"{kind}/{name}" for kind in ("value", "exp_avg", "exp_avg_sq") for name in state(1).values}

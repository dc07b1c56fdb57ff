"""The running increment on disk: what is saved comes back to the bit, for the same inputs only, whole or not at all."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open

from pipeline.training.inflight import Progressed, load_inflight, open_inflight, save_inflight

NAMES = ("shared/model.layers.0.mlp.up_proj.lora_A", "gate/model.layers.0.mlp.gate.weight", "discriminator/x.bias")
KINDS = ("exp_avg", "exp_avg_sq", "value")


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"{kind}/{n}": torch.randn(4) if "/x." in n else torch.randn(3, 5) for kind in KINDS for n in sorted(NAMES)}


def save(folder, key: str, step: int, tensors: dict[str, torch.Tensor], continuations: int) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    save_inflight(folder, Progressed(key, step, continuations), shapes, iter(tensors.items()))


def assert_holds(folder, tensors: dict[str, torch.Tensor]) -> None:
    values, moments = open_inflight(folder)
    for kind, file in {**moments, "value": values}.items():
        assert sorted(file.names()) == sorted(NAMES)
        for name in NAMES:
            assert torch.equal(file.read(name), tensors[f"{kind}/{name}"])


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    saved = state(1)
    saved["value/gate/model.layers.0.mlp.gate.weight"][0, 0] = 1e-42  # a denormal
    save(tmp_path / "inflight", "key", 7, saved, 2)
    assert load_inflight(tmp_path / "inflight", "key") == Progressed("key", 7, 2)
    assert_holds(tmp_path / "inflight", saved)


def test_a_rank_reads_its_own_routed_experts_alone(tmp_path):
    save(tmp_path, "key", 7, state(1), 0)
    values, moments = open_inflight(tmp_path)
    name = "shared/model.layers.0.mlp.up_proj.lora_A"
    assert torch.equal(values.read(name, (1, 3)), state(1)[f"value/{name}"][1:3])
    assert torch.equal(moments["exp_avg"].read(name, (0, 1)), state(1)[f"exp_avg/{name}"][:1])


def test_a_state_of_other_inputs_is_never_continued(tmp_path):
    save(tmp_path, "key", 7, state(1), 0)
    assert load_inflight(tmp_path, "other") is None
    assert load_inflight(tmp_path / "nothing", "key") is None
    save(tmp_path, "other", 3, state(2), 0)  # the increment at hand takes the place
    assert load_inflight(tmp_path, "key") is None
    assert load_inflight(tmp_path, "other").step == 3


def test_a_newer_state_replaces_the_older_one_in_one_file(tmp_path):
    save(tmp_path, "key", 7, state(1), 0)
    save(tmp_path, "key", 9, state(2), 1)
    assert load_inflight(tmp_path, "key") == Progressed("key", 9, 1)
    assert_holds(tmp_path, state(2))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_while_writing_leaves_the_older_state(tmp_path, event):
    save(tmp_path, "key", 7, state(1), 0)
    newer = state(2)
    child = os.fork()
    if child == 0:  # dies as it opens the temporary file, or just before the rename
        sys.addaudithook(lambda name, _: os._exit(9) if name == event else None)
        save(tmp_path, "key", 9, newer, 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert load_inflight(tmp_path, "key").step == 7
    assert_holds(tmp_path, state(1))


def test_the_file_knows_nothing_of_world_size_or_place(tmp_path):
    save(tmp_path, "key", 7, state(1), 2)
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["perennial"])
        names = set(file.keys())
    assert note == {"key": "key", "step": 7, "continuations": 2}
    assert names == {f"{kind}/{name}" for kind in KINDS for name in NAMES}

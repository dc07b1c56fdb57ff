"""The running increment on disk: what is saved comes back to the bit, for the same inputs only, whole or not at all."""

import json
import os
import random
import re
import sys
from hashlib import sha256

import pytest
import torch
from safetensors import safe_open

from data_contracts.errors import UserError
from pipeline.training.inflight import Progressed, load_inflight, open_inflight, remove_published, save_inflight

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
    assert note.pop("sha256") == sealed_digest(path)
    assert note == {"key": "key", "step": 7, "continuations": 2, "rows": 0}
    assert names == {f"{kind}/{name}" for kind in KINDS for name in NAMES}


def sealed_digest(path) -> str:
    """sha256 of the file's bytes with zeros for the digest in its header."""
    blank = re.sub(rb'(sha256\\":\\")[0-9a-f]{64}', rb"\g<1>" + b"0" * 64, path.read_bytes(), count=1)
    return sha256(blank).hexdigest()


def test_the_rows_consumed_so_far_come_back(tmp_path):
    tensors = {"value/a": torch.ones(3)}
    save_inflight(tmp_path, Progressed("key", 3, 1, 24), {"value/a": (3,)}, tensors.items())
    assert load_inflight(tmp_path, "key") == Progressed("key", 3, 1, 24)


def test_a_flipped_byte_anywhere_is_refused_with_the_remedy_and_the_file_stays(tmp_path):
    save(tmp_path, "key", 7, state(1), 0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(5)
    places = {*draw.sample(range(header), 60), *draw.sample(range(header, len(whole)), 60), 0, 7, 8, len(whole) - 1}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError) as refused:
            load_inflight(tmp_path, "key")
        said = str(refused.value)
        assert str(path) in said and "move it away" in said and len(said.splitlines()) == 1
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    assert load_inflight(tmp_path, "key").step == 7


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["empty", "no header", "a huge header", "a list", "no note", "deep"],
)
def test_what_is_no_state_at_all_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is no in-flight state of this version; restore it from a backup"):
        load_inflight(tmp_path, "key")


def test_each_shortened_state_is_refused(tmp_path):
    save(tmp_path, "key", 7, state(1), 0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="move it away"):
            load_inflight(tmp_path, "key")


def test_a_state_whose_increment_was_published_goes_and_no_other(tmp_path):
    folder = tmp_path / "inflight"
    remove_published(folder, "key")  # nothing there
    save(folder, "key", 7, state(1), 0)
    remove_published(folder, "other")
    assert load_inflight(folder, "key").step == 7
    remove_published(folder, "key")
    assert not folder.exists()
    (folder / "publish-1").mkdir(parents=True)  # what a kill leaves that falls while the folder is removed
    remove_published(folder, "")
    assert not folder.exists()

"""The bank: same tensors, same file; nothing is believed that was not re-hashed."""

import hashlib
import json
import os
import struct
import sys

import pytest
import torch

from data_contracts.errors import UserError
from pipeline.experts.bank import Bank

TENSORS = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}


def test_a_file_is_the_safetensors_layout_written_by_hand(tmp_path):
    header = (
        b'{"__metadata__":{"perennial":"{\\"rank\\":8,\\"role\\":\\"gate\\"}"},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0)

    bank = Bank(tmp_path)
    sha = bank.put({"w": torch.tensor([1.5, -2.0])}, {"role": "gate", "rank": 8})

    assert sha == hashlib.sha256(expected).hexdigest()
    assert (tmp_path / f"{sha}.safetensors").read_bytes() == expected
    assert os.listdir(tmp_path) == [f"{sha}.safetensors"]


def test_order_of_names_and_of_metadata_does_not_change_the_file(tmp_path):
    bank = Bank(tmp_path)
    first = bank.put(TENSORS, {"x": 1, "y": [2, 3]})
    second = bank.put(dict(reversed(TENSORS.items())), {"y": [2, 3], "x": 1})
    assert first == second
    assert len(os.listdir(tmp_path)) == 1


def test_any_other_value_name_dtype_shape_or_metadata_gives_another_file(tmp_path):
    bank = Bank(tmp_path)
    variants = [
        bank.put(TENSORS, {"x": 1}),
        bank.put(TENSORS, {"x": 2}),
        bank.put(TENSORS),
        bank.put(TENSORS | {"a": torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)}),
        bank.put(TENSORS | {"a": torch.ones(3, dtype=torch.float16)}),
        bank.put(TENSORS | {"b": TENSORS["b"].reshape(3, 2)}),
        bank.put({"c": TENSORS["b"], "a": TENSORS["a"]}),
    ]
    assert len(set(variants)) == len(variants)


def test_what_is_put_comes_back_bit_for_bit(tmp_path):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "transposed": base.t(),
        "row": base[1],
        "same_memory": base[1],
        "bf16": torch.tensor([1e-3, float("-inf")], dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.tensor([0.1])),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
    }
    bank = Bank(tmp_path / "not" / "yet" / "there")
    sha = bank.put(tensors, {"role": "shared"})

    found = bank.get(sha)

    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name
    assert bank.metadata(sha) == {"role": "shared"}
    assert bank.metadata(bank.put(tensors)) == {}
    assert bank.has(sha)
    assert not bank.has("0" * 64)


def test_one_changed_byte_anywhere_is_refused_by_file_name_and_remedy(tmp_path):
    bank = Bank(tmp_path)
    sha = bank.put({"w": torch.tensor([1.5, -2.0])}, {"role": "gate"})
    path = tmp_path / f"{sha}.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        for read in (bank.get, bank.metadata, bank.verify):
            with pytest.raises(UserError, match=f"{sha}.safetensors: this bank file was altered.*restore it"):
                read(sha)
    for cut in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="altered"):
            bank.get(sha)


def test_a_missing_file_is_refused_by_name_and_remedy(tmp_path):
    bank = Bank(tmp_path)
    for read in (bank.get, bank.metadata, bank.verify):
        with pytest.raises(UserError, match=f"{'0' * 64}.safetensors: this bank file is missing; restore it"):
            read("0" * 64)


@pytest.mark.parametrize(
    "name", ["../" + "0" * 61, "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", "", "/etc/passwd", None, 7]
)
def test_only_64_hex_digits_name_a_file(tmp_path, name):
    bank = Bank(tmp_path)
    for use in (bank.get, bank.metadata, bank.verify, bank.has, bank.path):
        with pytest.raises(UserError, match="not a sha256"):
            use(name)


def test_a_file_in_place_is_reused_when_whole_and_never_overwritten_when_altered(tmp_path):
    bank = Bank(tmp_path)
    sha = bank.put(TENSORS)
    path = tmp_path / f"{sha}.safetensors"
    before = path.stat()
    assert bank.put(TENSORS) == sha
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="altered"):
        bank.put(TENSORS)
    assert path.read_bytes() == b"something else"


def test_no_tensors_are_no_file(tmp_path):
    with pytest.raises(ValueError, match="no tensors"):
        Bank(tmp_path).put({})
    assert os.listdir(tmp_path) == []


def test_metadata_is_one_key_of_canonical_json(tmp_path):
    bank = Bank(tmp_path)
    sha = bank.put(TENSORS, {"z": 1, "a": {"y": "é", "b": [1.5, None]}})
    data = (tmp_path / f"{sha}.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"perennial": '{"a":{"b":[1.5,null],"y":"é"},"z":1}'}


def test_digests_lists_what_the_file_names_claim(tmp_path):
    bank = Bank(tmp_path)
    shas = {bank.put({"w": torch.tensor([float(i)])}) for i in range(3)}
    (tmp_path / "notes.txt").write_text("no bank file")
    (tmp_path / "short.safetensors").write_text("no bank file")
    assert bank.digests() == sorted(shas)


def test_a_kill_before_the_rename_leaves_nothing_under_the_digest(tmp_path):
    bank = Bank(tmp_path / "bank")
    sha = Bank(tmp_path / "other").put(TENSORS)
    child = os.fork()
    if child == 0:
        sys.addaudithook(lambda event, _: os._exit(9) if event == "os.rename" else None)
        bank.put(TENSORS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not bank.has(sha)
    assert [name.endswith(".tmp") for name in os.listdir(bank.root)] == [True]
    assert bank.digests() == []
    assert bank.put(TENSORS) == sha
    assert torch.equal(bank.get(sha)["b"], TENSORS["b"])

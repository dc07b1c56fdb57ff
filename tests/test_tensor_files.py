"""Files written tensor by tensor are those that safetensors writes, and are read by slices."""

import pytest
import torch
from safetensors.torch import save

from pipeline.files import sha256_bytes
from pipeline.tensor_files import TensorFile, write_tensors

TENSORS = {
    "a/model.layers.10.up.lora_A": torch.randn(3, 7),
    "a/model.layers.2.up.lora_A": torch.randn(4, 3, 5),
    "b": torch.randn(1),
    "é": torch.randn(2, 2),
}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [None, '{"task":"größe","n":1}'])
def test_the_bytes_and_the_digest_are_those_of_safetensors(tmp_path, metadata):
    digest = write_tensors(tmp_path / "file", shapes(TENSORS), sorted(TENSORS.items()), metadata)
    expected = save(TENSORS, metadata={"perennial": metadata} if metadata else None)
    assert (tmp_path / "file").read_bytes() == expected
    assert digest == sha256_bytes(expected)
    assert TensorFile(tmp_path / "file").metadata() == metadata


def test_what_was_not_announced_next_is_refused(tmp_path):
    for given in (list(TENSORS.items())[::-1], sorted(TENSORS.items())[:2], [("b", torch.zeros(2))]):
        with pytest.raises(ValueError, match="announced"):
            write_tensors(tmp_path / "file", shapes(TENSORS), given, None)


def test_routed_experts_are_read_by_rows_and_names_below_a_prefix(tmp_path):
    write_tensors(tmp_path / "file", shapes(TENSORS), sorted(TENSORS.items()), None)
    file = TensorFile(tmp_path / "file").below("a/")
    assert file.names() == ["model.layers.10.up.lora_A", "model.layers.2.up.lora_A"]
    whole = TENSORS["a/model.layers.2.up.lora_A"]
    assert torch.equal(file.read("model.layers.2.up.lora_A", (1, 3)), whole[1:3])
    assert torch.equal(file.read("model.layers.2.up.lora_A"), whole)

"""safetensors files written one tensor at a time, and read by slices: no process holds more than it must.

The bytes are those that `safetensors.torch.save` writes for the same fp32 tensors and metadata, so a digest does not
depend on which of the two wrote a file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

METADATA_KEY = "perennial"  # the one key: safetensors writes several in random order
Experts = tuple[int, int] | None  # routed experts [first, stop) of a tensor's first dimension; None: the whole tensor


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]], metadata: str | None
) -> str:
    """Write fp32 tensors as they come, which must be in the order of their names; returns the sha256 of the file.

    `metadata` is the one value kept under `METADATA_KEY`. The file is synced but not renamed: `path` is a temporary
    one. Raises ValueError where a tensor is not the one announced.
    """
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: metadata}} if metadata is not None else {}
    offset = 0
    for name in sorted(shapes):
        size = 4 * int(torch.Size(shapes[name]).numel())
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    expected = iter(sorted(shapes))
    with open(path, "wb") as file:

        def put(data) -> None:
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name, tensor in tensors:
            if name != next(expected, None) or tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(f"{path}: {name} {tuple(tensor.shape)} is not the tensor that was announced next")
            put(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{path}: {missing} was announced and did not come")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class TensorFile:
    """Reads tensors, or the routed experts of a rank, from a safetensors file; nothing else of the file is read."""

    def __init__(self, path: Path | str, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix  # of the names in the file
        self._file = safe_open(path, framework="pt")

    def read(self, name: str, experts: Experts = None) -> torch.Tensor:
        """The tensor, or its rows [first, stop), on the CPU. Raises KeyError for a name that is not there."""
        if experts is None:
            return self._file.get_tensor(self.prefix + name)
        return self._file.get_slice(self.prefix + name)[experts[0] : experts[1]]

    def names(self) -> list[str]:
        """The names below the prefix."""
        names = self._file.keys()
        return [name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)]

    def below(self, prefix: str) -> "TensorFile":
        """The same file, whose names begin with `prefix`."""
        return TensorFile(self.path, self.prefix + prefix)

    def metadata(self) -> str | None:
        """The value under `METADATA_KEY`."""
        return (self._file.metadata() or {}).get(METADATA_KEY)

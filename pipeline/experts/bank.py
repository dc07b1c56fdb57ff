"""The bank: a content-addressed store of published tensors, one immutable safetensors file per digest.

    <root>/<sha256 of the file's bytes>.safetensors

Equal tensors and metadata always give equal bytes, hence one file: safetensors orders tensors by dtype and name,
and the metadata is one key (several would be written in random order) that holds canonical JSON. Nothing is ever
overwritten.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from data_contracts.errors import UserError
from pipeline.files import canonical_json, fsync_dir, sha256_bytes, sha256_file, writing
from pipeline.tensor_files import METADATA_KEY, TensorFile, write_tensors

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Bank:
    """Puts tensors into a folder under their digest and gives them back, verified."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def put(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> str:
        """Store named tensors (any device, shape and dtype) with JSON metadata; returns the sha256 of the file's bytes.

        A file that is there already is verified and reused. A kill at any moment leaves no file under the digest's
        name or the whole one. Raises ValueError for no tensors at all, UserError when the file in place, or the one
        just written, is damaged, or the disk refuses.
        """
        if not tensors:
            raise ValueError("the bank was given no tensors to publish")
        data = file_bytes(tensors, metadata or {})
        sha = sha256_bytes(data)
        path = self.path(sha)
        if path.exists():
            self.verify(sha)
            return sha
        with self._temporary() as temporary:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._keep(temporary, sha)
        return sha

    def put_stream(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterable[tuple[str, torch.Tensor]],
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """`put` for fp32 tensors that come one at a time, in the order of their names: no more than one is held."""
        if not shapes:
            raise ValueError("the bank was given no tensors to publish")
        with self._temporary() as temporary:
            sha = write_tensors(temporary, shapes, tensors, canonical_json(dict(metadata)) if metadata else None)
            self._keep(temporary, sha)
        return sha

    def take(self, sha: str, blocks: Iterable[bytes]) -> None:
        """Store a bank file that comes from elsewhere, a block at a time; nothing where it is there already.

        Raises UserError where the blocks are not what `sha` names, and whatever drawing them raises.
        """
        if self.path(sha).exists():
            self.verify(sha)
            return
        with self._temporary() as temporary:
            with open(temporary, "wb") as file:
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
            self._keep(temporary, sha)

    def open(self, sha: str) -> TensorFile:
        """The file of `sha` for reading by slices; `verify` it first, since its bytes are not hashed here."""
        return TensorFile(self.path(sha))

    def get(self, sha: str) -> dict[str, torch.Tensor]:
        """The tensors stored under `sha`, on the CPU. The bytes are hashed before they are parsed.

        Raises UserError naming the file and the remedy when it is missing or altered.
        """
        return load(self._verified_bytes(sha))

    def metadata(self, sha: str) -> dict[str, Any]:
        """The metadata stored under `sha`, of verified bytes. Raises UserError as `get` does."""
        data = self._verified_bytes(sha)
        header_size = int.from_bytes(data[:8], "little")  # the safetensors format: u64 size, JSON header, tensors
        header = json.loads(data[8 : 8 + header_size])
        return json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))

    def has(self, sha: str) -> bool:
        """Whether a file stands under `sha`; its bytes are not read."""
        return self.path(sha).is_file()

    def verify(self, sha: str) -> None:
        """Re-hash the file of `sha` block by block. Raises UserError when it is missing or altered."""
        path = self.path(sha)
        try:
            found = sha256_file(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        _check(path, sha, found)

    def digests(self) -> list[str]:
        """The digests that the bank's file names claim, sorted; whether the bytes agree is `verify`'s to say."""
        names = (path.stem for path in self.root.glob("*.safetensors"))
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    def path(self, sha: str) -> Path:
        """Where the file of `sha` stands. Raises UserError unless it is 64 hex digits: it could name any path."""
        if not isinstance(sha, str) or not _DIGEST.fullmatch(sha):
            raise UserError(
                f"{self.root}: {sha!r} is not a sha256 in 64 lower-case hex digits; the file that names it is damaged"
            )
        return self.root / f"{sha}.safetensors"

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A name for a file that is being written; afterwards nothing stands there. Raises UserError where the disk
        refuses.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = self.root / f".{secrets.token_hex(8)}.tmp"
            try:
                yield temporary
            finally:
                with suppress(OSError):  # a failing disk's first error is the one to tell; the next job removes it
                    temporary.unlink(missing_ok=True)

    def _keep(self, temporary: Path, sha: str) -> None:
        """Give a file that was written and synced its name, once it reads back as what was written."""
        path = self.path(sha)
        if path.exists():
            self.verify(sha)
            return
        if sha256_file(temporary) != sha:
            raise UserError(f"{path}: what was written reads back differently; check the disk, then run again")
        os.replace(temporary, path)
        fsync_dir(self.root)

    def _verified_bytes(self, sha: str) -> bytes:
        path = self.path(sha)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        _check(path, sha, sha256_bytes(data))
        return data


def file_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A bank file's content: a pure function of the tensors' names, dtypes, shapes and values and of the metadata."""
    # Each tensor is cloned: safetensors refuses tensors that share memory, and views keep storage nobody asked for.
    whole = {
        name: tensors[name].detach().to("cpu").clone(memory_format=torch.contiguous_format) for name in sorted(tensors)
    }
    return save(whole, metadata={METADATA_KEY: canonical_json(dict(metadata))} if metadata else None)


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"{path}: this bank file is missing; restore it from a backup of the bank (jobs/audit.py lists all)"
        )
    return UserError(f"{path}: this bank file cannot be read ({error.strerror}); check its permissions and the disk")


def _check(path: Path, sha: str, found: str) -> None:
    if found != sha:
        raise UserError(
            f"{path}: this bank file was altered (its bytes hash to {found[:12]}...); "
            "restore it from a backup of the bank (jobs/audit.py lists all)"
        )

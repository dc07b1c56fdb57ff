"""Objects below a URI with the two operations that safe publishing needs: create if there is none, replace if it is
still the one that was read. On S3 these are conditional requests (If-None-Match: *, If-Match), in a folder a hard link
and a lock.

Names are relative, with `/`. Every method raises UserError naming the place for what the store refuses or cannot reach.
"""

import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from data_contracts.credentials import refuse_password
from data_contracts.errors import UserError
from data_contracts.remote import remote_errors, told
from pipeline.files import atomic_file, fsync_dir, sha256_bytes, write_atomic

BLOCK_BYTES = 16 << 20  # of a file held in memory at a time; the size of an S3 upload's parts
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")  # S3: another conditional write is under way
_TRIES = 5


class Objects(Protocol):
    """The objects below one URI."""

    uri: str

    def read(self, name: str) -> tuple[bytes, str] | None:
        """An object's bytes and version; None where there is none."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """An object's bytes, a block at a time."""

    def create(self, name: str, blocks: Iterable[bytes]) -> bool:
        """Store an object, whole or not at all; False, storing nothing, where one has the name. What `blocks` raises
        leaves none.
        """

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        """Replace an object atomically, if it still has this version (None: if there is none); False where not."""

    def write(self, name: str, data: bytes) -> None:
        """Store an object, whatever was there."""

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes by name of every object below a folder."""

    def remove(self, name: str) -> None:
        """Remove an object; nothing where there is none."""


def open_objects(uri: str) -> Objects:
    """The objects below a URI or a folder. Raises UserError for a file system without the two operations, one whose
    package is not installed, and a URI with a password.
    """
    refuse_password(uri, "store.uri")
    protocol, separator, path = uri.partition("://")
    if not separator or protocol in ("file", "local"):
        return LocalObjects(Path(path if separator else uri).expanduser().resolve())
    if protocol in ("s3", "s3a"):
        return S3Objects(uri.rstrip("/"))
    raise UserError(
        f"store.uri {uri}: of {protocol}:// neither conditional creation nor compare-and-swap is known here, so that "
        "two writers could overwrite each other; name an s3:// prefix or a folder"
    )


class LocalObjects:
    """Objects as files of a folder, on a file system with hard links and flock."""

    def __init__(self, root: Path):
        self.root, self.uri = root, str(root)

    def read(self, name: str) -> tuple[bytes, str] | None:
        with self._says():
            try:
                data = (self.root / name).read_bytes()
            except FileNotFoundError:
                return None
        return data, sha256_bytes(data)

    def blocks(self, name: str) -> Iterator[bytes]:
        with self._says(), open(self.root / name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def create(self, name: str, blocks: Iterable[bytes]) -> bool:
        path = self.root / name
        beside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        with self._says():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomic_file(beside) as file:
                    for block in blocks:
                        file.write(block)
                os.link(beside, path)  # atomic, and refused where the name is taken
            except FileExistsError:
                return False
            finally:
                beside.unlink(missing_ok=True)
            fsync_dir(path.parent)
        return True

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        with self._says():
            self.root.mkdir(parents=True, exist_ok=True)
            with open(self.root / f".{name}.lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held for a file's reading and writing
                found = self.read(name)
                if (found[1] if found else None) != version:
                    return False
                write_atomic(self.root / name, data)
        return True

    def write(self, name: str, data: bytes) -> None:
        with self._says():
            write_atomic(self.root / name, data)

    def size(self, name: str) -> int | None:
        with self._says():
            try:
                return (self.root / name).stat().st_size
            except FileNotFoundError:
                return None

    def sizes(self, folder: str) -> dict[str, int]:
        with self._says():
            files = [path for path in (self.root / folder).rglob("*") if path.is_file()]
            return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in files}

    def remove(self, name: str) -> None:
        with self._says():
            (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def _says(self) -> Iterator[None]:
        with _refusals(self.uri):
            yield


class S3Objects:
    """Objects below an S3 prefix. Address and credentials come from the environment (AWS_ENDPOINT_URL, AWS_PROFILE,
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...).
    """

    def __init__(self, uri: str):
        self.uri = uri
        with _refusals(uri):
            try:
                self._fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
            except ImportError as error:
                raise UserError(f"{uri}: {told(error)}; pip install 'perennial[s3]' brings what s3:// needs") from error
        self._fs.retries = 2  # of s3fs, each of which botocore repeats by itself: a server that hangs is given up
        self._bucket, _, self._prefix = path.partition("/")
        if not self._bucket:
            raise UserError(f"store.uri {uri}: names no bucket; write s3://bucket/prefix")

    def read(self, name: str) -> tuple[bytes, str] | None:
        with _refusals(self.uri):
            try:
                found = self._call("get_object", name)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
            return fsspec.asyn.sync(self._fs.loop, found["Body"].read), found["ETag"]

    def blocks(self, name: str) -> Iterator[bytes]:
        with (
            _refusals(f"{self.uri}/{name}"),
            self._fs.open(f"{self._bucket}/{self._key(name)}", "rb", block_size=BLOCK_BYTES) as file,
        ):
            while block := file.read(BLOCK_BYTES):
                yield block

    def create(self, name: str, blocks: Iterable[bytes]) -> bool:
        with _refusals(self.uri):
            parts = _joined(blocks, BLOCK_BYTES)
            first, second = next(parts, b""), next(parts, None)
            if second is None:
                return self._conditional(lambda: self._call("put_object", name, Body=first, IfNoneMatch="*"))
            upload = self._call("create_multipart_upload", name)["UploadId"]
            try:
                done: list[dict[str, Any]] = []
                for part in itertools.chain((first, second), parts):
                    number = len(done) + 1
                    sent = self._call("upload_part", name, Body=part, UploadId=upload, PartNumber=number)
                    sums = {key: value for key, value in sent.items() if key.startswith("Checksum")}
                    done.append({"PartNumber": number, "ETag": sent["ETag"]} | sums)
                whole = {"UploadId": upload, "MultipartUpload": {"Parts": done}, "IfNoneMatch": "*"}
                created = self._conditional(lambda: self._call("complete_multipart_upload", name, **whole))
            except BaseException:
                self._abort(name, upload)
                raise
            if not created:
                self._abort(name, upload)
            return created

    def replace(self, name: str, data: bytes, version: str | None) -> bool:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with _refusals(self.uri):
            return self._conditional(lambda: self._call("put_object", name, Body=data, **condition))

    def write(self, name: str, data: bytes) -> None:
        with _refusals(self.uri):
            self._call("put_object", name, Body=data)

    def size(self, name: str) -> int | None:
        with _refusals(self.uri):
            try:
                return self._call("head_object", name)["ContentLength"]
            except FileNotFoundError:
                return None

    def sizes(self, folder: str) -> dict[str, int]:
        prefix = f"{self._bucket}/{self._key('')}"
        with _refusals(self.uri):
            found = self._fs.find(f"{prefix}{folder}".rstrip("/"), detail=True)
        return {path.removeprefix(prefix): info["size"] for path, info in found.items()}

    def remove(self, name: str) -> None:
        with _refusals(self.uri):
            self._call("delete_object", name)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _call(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        return self._fs.call_s3(method, Bucket=self._bucket, Key=self._key(name), **arguments)

    def _conditional(self, request: Callable[[], Any]) -> bool:
        """Make a conditional request; whether its condition held. One that met another on its way is made again."""
        for attempt in range(_TRIES):
            try:
                request()
            except remote_errors() as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412") or isinstance(error, FileExistsError):
                    return False
                if code == "NoSuchKey":  # there is no version that could match
                    return False
                if code not in _CONFLICTS or attempt + 1 == _TRIES:
                    raise
                time.sleep(0.1 * 2**attempt)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _abort(self, name: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", name, UploadId=upload)
        except remote_errors():
            pass  # the first error is the one to tell; the bucket's own rule ends what is left


def _code(error: BaseException) -> str:
    """S3's error code behind an exception of s3fs."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _joined(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in blocks of `size`, the last one smaller."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


@contextmanager
def _refusals(place: str) -> Iterator[None]:
    """Raise what a store refuses inside the block as a UserError that names the place and the remedy."""
    try:
        yield
    except remote_errors() as error:
        remedy = "check the address, the network and the credentials in the environment"
        if _code(error) == "NoSuchBucket":
            remedy = "make the bucket or correct its name"
        elif isinstance(error, FileNotFoundError):
            remedy = "jobs/audit.py names what is missing"
        raise UserError(
            f"{place}: the store refuses or cannot be reached ({told(error)}); {remedy}, then run the same command "
            "again (what was published stands)"
        ) from error

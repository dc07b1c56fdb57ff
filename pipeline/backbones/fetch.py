"""A backbone behind a URI as a local folder: fetched once per host, verified, and found again by the next start.

    <cache>/backbones/<sha256 of URI and listing>/...        the folder, whole or not there
    <cache>/backbones/<sha256 of URI and listing>.lock       held by the process that fetches it

<cache> is pipeline/cache.py's folder. The listing is the name, size and version (ETag, or time of change) of every file
that a backbone is made of, as the store gives it now: another backbone under the same URI is another folder.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from data_contracts.errors import UserError
from data_contracts.remote import remote_errors, told
from pipeline.cache import cache_folder
from pipeline.files import atomic_file, canonical_json, fsync_dir, sha256_file, sha256_text, writing
from pipeline.watch import rank as watch

SUFFIXES = frozenset({".safetensors", ".json", ".model", ".txt", ".jinja"})  # nothing else of a folder is read
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
_BLOCK_BYTES = 16 << 20


def local_backbone(path: str) -> str:
    """The folder itself, or for a URI its copy on this host. Safe for several ranks of a host at once.

    Raises UserError where the URI cannot be read, holds no backbone or changes while it is read, and where the cache
    cannot be written.
    """
    return _fetched(path, os.getpid()) if "://" in path else path


def backbone_bytes(path: str) -> int:
    """What a backbone's files hold, in bytes; of a URI as its listing says. Raises UserError where a URI cannot be
    read; a folder that is not there holds nothing.
    """
    if "://" in path:
        return sum(size for size, _ in _listing(path).values())
    folder = Path(path)
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0


@functools.lru_cache(maxsize=4)
def _fetched(uri: str, process: int) -> str:
    listing = _listing(uri)
    key = sha256_text(canonical_json([uri, os.environ.get("AWS_ENDPOINT_URL", ""), listing]))
    root = cache_folder() / "backbones"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        folder = root / key
        with _alone(root / f"{key}.lock", uri):
            if not _is_whole(folder, listing):
                _fetch(uri, listing, folder)
    return str(folder)


def read_config_text(uri: str) -> str:
    """The text of a config.json behind a URI: of the file itself, or of the folder with one. Raises UserError."""
    name = uri if uri.endswith(".json") else f"{uri.rstrip('/')}/config.json"
    try:
        with fsspec.open(name, "rt", encoding="utf-8") as file:
            return file.read()
    except (*remote_errors(), ImportError, ValueError) as error:
        raise _unreadable(name, error) from error


def _listing(uri: str) -> dict[str, list]:
    """[bytes, version] by name of the backbone's files."""
    try:
        file_system, path = fsspec.core.url_to_fs(uri)
        file_system.invalidate_cache()
        found = file_system.ls(path, detail=True)
    except (*remote_errors(), ImportError, ValueError) as error:
        raise _unreadable(uri, error) from error
    files = {info["name"].rsplit("/", 1)[-1]: info for info in found if info["type"] == "file"}
    listing = {
        name: [info["size"], next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")]
        for name, info in sorted(files.items())
        if os.path.splitext(name)[1] in SUFFIXES
    }
    if "config.json" not in listing:
        raise UserError(f"backbone.path '{uri}' holds no config.json; name the folder of a backbone")
    return listing


def _is_whole(folder: Path, listing: dict[str, list]) -> bool:
    """Whether a folder holds the listed files in their sizes. What they hold the backbone's digest says."""
    try:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    except OSError:
        return False
    return sizes == {name: size for name, (size, _) in listing.items()}


def _fetch(uri: str, listing: dict[str, list], folder: Path) -> None:
    """Fetch the listed files beside the folder, read them back, give it its name."""
    beside = folder.with_name(f"{folder.name}.part")
    for path in (beside, folder):
        shutil.rmtree(path, ignore_errors=True)
    beside.mkdir()
    for name in listing:
        digest = hashlib.sha256()
        with atomic_file(beside / name) as file:
            for block in _blocks(uri, name):
                digest.update(block)
                file.write(block)
        size = (beside / name).stat().st_size
        if size != listing[name][0]:
            raise UserError(f"{uri}/{name}: {listing[name][0]} bytes were to come and {size} came; run it again")
        if sha256_file(beside / name) != digest.hexdigest():
            raise UserError(f"{beside / name}: what was written reads back differently; check the disk, then run again")
    if _listing(uri) != listing:
        raise UserError(f"backbone.path '{uri}' was changed while it was read; run it again")
    os.replace(beside, folder)
    fsync_dir(folder.parent)


def _blocks(uri: str, name: str) -> Iterator[bytes]:
    try:
        with fsspec.open(f"{uri.rstrip('/')}/{name}", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                watch.report(f"fetching {name} of the backbone")
                yield block
    except remote_errors() as error:
        raise _unreadable(f"{uri}/{name}", error) from error


@contextmanager
def _alone(lock: Path, uri: str) -> Iterator[None]:
    """One process of this host at a time; the others wait, saying so to the watchdog."""
    with open(lock, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                watch.report(f"waiting until {uri} is fetched by another process of this host")
                time.sleep(0.2)
        yield


def _unreadable(uri: str, error: BaseException) -> UserError:
    return UserError(
        f"backbone.path '{uri}' cannot be read ({told(error)}); check the URI, the network and the credentials in the "
        "environment"
    )

"""A store: the published work of one stream, shared by the machines that take turns at learning it.

    <uri>/bank/<sha256>.safetensors                  a bank file
    <uri>/increments/<sha256 of its manifest>/...    an entry of the chain: manifest.json, its files, run.json
    <uri>/champion.json                              the pointer: the champion, and who is removing objects, if anyone
    <uri>/store.json                                 says that this is a store, and is what conditions are tried on

All but the pointer (and run.json, which is outside the chain) is created once and never replaced, under a name that its
bytes give it. The pointer moves by compare-and-swap after everything it leads to stands, so that a writer killed
anywhere leaves the old champion or the new one, and of two writers after the same head one is refused.

Removing is the one thing that could take away what another writer is about to point to. So it happens under a fence:
the pointer is marked first, which refuses every writer that has read it before, and no writer moves it until the mark
is taken off, with a count that makes it differ from what it was.
"""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from data_contracts.errors import UserError
from pipeline.config import describe
from pipeline.files import canonical_json, sha256_bytes
from pipeline.lock import told
from pipeline.store.objects import BLOCK_BYTES, Objects, open_objects
from pipeline.tracking.chain import INCREMENTS, digests_of
from pipeline.tracking.champion import CHAMPION, Champion
from pipeline.tracking.manifest import MANIFEST, RUN, Entry, Manifest, parse_manifest
from pipeline.watch import rank as watch

MARKER = "store.json"
_MARKER_BYTES = b'{"format":1}'
REPAIR = "remove that object from the store and run jobs/bank.py --work-dir W sync where a whole work_dir is left"
_TRIES = 3  # of moving the pointer while others remove objects


@dataclass(frozen=True)
class Pointer:
    """champion.json of a store as it was read."""

    champion: Champion | None = None  # None: nothing is published
    sweeps: int = 0  # how often objects were removed
    sweeping: Mapping[str, object] | None = None  # who is removing objects now
    version: str | None = None  # by which it is replaced; None: there is none yet

    @property
    def head(self) -> str | None:
        """sha256 of the newest manifest."""
        return self.champion.head if self.champion else None

    def to_bytes(self) -> bytes:
        """The object's content: canonical JSON in UTF-8, without the version."""
        rest = {"format": 1, "sweeps": self.sweeps} | ({"sweeping": dict(self.sweeping)} if self.sweeping else {})
        champion = self.champion.to_bytes() if self.champion else b"null"
        return b'{"champion":' + champion + b"," + canonical_json(rest).encode()[1:]


@dataclass(frozen=True)
class Source:
    """Where the bytes of an object stand on this machine, and what they must be."""

    path: Path
    sha256: str


Upload = tuple[Mapping[str, Source], str, Path]  # an entry's objects, its manifest's sha256, its run.json


class Store:
    """The published work below one URI. Every method raises UserError where the store refuses or cannot be reached."""

    def __init__(self, objects: Objects):
        self.objects, self.uri = objects, objects.uri
        self._stands: set[str] = set()  # names of the objects that this process has stored or compared
        self._conditions_hold = False
        self._parsed: tuple[bytes, Pointer] | None = None

    def pointer(self) -> Pointer:
        """The pointer as it is now. Raises UserError where it is damaged."""
        found = self.objects.read(CHAMPION)
        if found is None:
            return Pointer()
        data, version = found
        if self._parsed is None or self._parsed[0] != data:  # a process that publishes on need not parse its own again
            self._parsed = (data, self._parse(data))
        return replace(self._parsed[1], version=version)

    def _parse(self, data: bytes) -> Pointer:
        where = f"{self.uri}/{CHAMPION}"
        try:
            raw = json.loads(data)
            champion = raw["champion"] if raw["champion"] is None else Champion.model_validate(raw["champion"])
            pointer = Pointer(champion, raw["sweeps"], raw.get("sweeping"))
            same = pointer.to_bytes() == data
        except ValidationError as error:
            raise UserError(f"{where}: not a valid pointer ({describe(error)}); {REPAIR}") from error
        except (ValueError, TypeError, KeyError, RecursionError):
            same = False
        if not same:
            raise UserError(f"{where}: not in the form it was written in; {REPAIR}")
        return pointer

    def manifest(self, sha: str) -> Entry:
        """The entry of the chain that a sha256 names, verified."""
        name = f"{INCREMENTS}/{sha}/{MANIFEST}"
        found = self.objects.read(name)
        data = found[0] if found else b""
        if sha256_bytes(data) != sha:
            what = "was altered" if found else "is missing"
            raise UserError(f"{self.uri}/{name}: {what}; {REPAIR}")
        return parse_manifest(data, f"{self.uri}/{name}")

    def after(self, known: Container[str], head: str | None) -> tuple[list[Entry], str | None]:
        """The entries from a pointer's head back to one that is `known`, newest first, and that one's sha256."""
        entries, sha = [], head
        while sha is not None and sha not in known:
            entries.append(self.manifest(sha))
            sha = entries[-1].parent
        return entries, sha

    def verified(self, name: str, sha: str) -> Iterator[bytes]:
        """An object's bytes a block at a time; at their end a UserError where they are not what `sha` names."""
        digest = hashlib.sha256()
        for block in self.objects.blocks(name):
            watch.report()
            digest.update(block)
            yield block
        if digest.hexdigest() != sha:
            raise UserError(
                f"{self.uri}/{name}: this object was altered (its bytes hash to {digest.hexdigest()[:12]}...); {REPAIR}"
            )

    def upload(self, objects: Mapping[str, Source]) -> None:
        """Store objects that are not there yet; those that are must hold the same bytes."""
        self.check_conditions()
        for name, source in objects.items():
            watch.report()
            size = self.objects.size(name)
            if size is None and self.objects.create(name, hashed_blocks(source)):
                self._stands.add(name)
            elif name not in self._stands:
                for _ in self.verified(name, source.sha256):
                    pass
                self._stands.add(name)

    def publish(self, work_dir: Path, folder: Path, entry: Entry, before: Champion | None, after: Champion) -> None:
        """Store an entry that follows the champion `before`, its files in `folder` and its tensors in the bank of
        `work_dir`; then move the pointer to `after`.

        Raises UserError where another job has published meanwhile; the pointer is then as that one left it.
        """
        stand = digests_in(before)
        new = {
            name: source
            for name, source in objects_of(entry, work_dir, folder).items()
            if not (name.startswith("bank/") and source.sha256 in stand)
        }
        self.move([(new, entry.sha256, folder / RUN)], before.head if before else None, after)

    def move(self, entries: Iterable[Upload], before: str | None, to: Champion) -> None:
        """Store the objects of entries, each with its manifest's sha256 and its run.json; then move the pointer from
        the head `before` to a champion. Nothing where it is there already.
        """
        entries = list(entries)
        for _ in range(_TRIES):
            pointer = self.pointer()
            if pointer.champion == to:
                return
            self._refuse_other_head(pointer, before)
            self.refuse_sweeping(pointer)
            for objects, sha, run in entries:
                self.upload(objects)
                if run.is_file():
                    self.objects.write(f"{INCREMENTS}/{sha}/{RUN}", run.read_bytes())
            if self._replace(pointer, Pointer(to, pointer.sweeps)):
                return
        raise UserError(f"{self.uri}: objects are being removed there again and again; run the same command again")

    def sweep(self, head: str, chosen: Callable[[], list[str]], take_over: bool = False) -> list[str]:
        """Remove the objects that `chosen` names, once no other writer can come to need them; returns the names.

        Raises UserError where the head is not `head` any more, or another job is removing objects; `take_over` goes on
        where such a job was killed.
        """
        self.check_conditions()
        pointer = self.pointer()
        self._refuse_other_head(pointer, head)
        if not take_over:
            self.refuse_sweeping(pointer)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "command": "removing objects"}
        holder["token"] = secrets.token_hex(8)  # two containers may have one name and one process number
        if not self._replace(pointer, replace(pointer, sweeping=holder)):
            raise UserError(f"{self.uri}: another job has moved its pointer meanwhile; run the same command again")
        try:
            names = sorted(chosen())
            for name in names:
                watch.report()
                self.objects.remove(name)
                self._stands.discard(name)
        finally:
            marked = self.pointer()
            if marked.sweeping == holder:  # nobody has taken over
                self._replace(marked, Pointer(pointer.champion, pointer.sweeps + 1))
        return names

    def names(self) -> dict[str, int]:
        """Bytes by name of all objects but the pointer and the marker."""
        return self.objects.sizes("bank") | self.objects.sizes(INCREMENTS)

    def check_conditions(self) -> None:
        """Raise UserError where the server takes conditional writes and does not keep to their conditions."""
        if self._conditions_hold:
            return
        self.objects.create(MARKER, [_MARKER_BYTES])
        found = self.objects.read(MARKER)
        if found is None or found[0] != _MARKER_BYTES:
            raise UserError(f"{self.uri}/{MARKER}: is not a store of this format; name another place as store.uri")
        foreign = '"' + 32 * "0" + '"'
        if self.objects.create(MARKER, [_MARKER_BYTES]) or self.objects.replace(MARKER, _MARKER_BYTES, foreign):
            raise UserError(
                f"{self.uri}: the server does not keep to the conditions of a write (If-None-Match, If-Match), so that "
                "two writers could overwrite each other; name a store on a server that does, such as Amazon S3"
            )
        self._conditions_hold = True

    def refuse_sweeping(self, pointer: Pointer) -> None:
        """Raise UserError where a job is removing objects: what it removes could be needed for publishing."""
        if pointer.sweeping:
            raise UserError(
                f"{self.uri}: a job is removing objects there ({told(dict(pointer.sweeping))}); wait for its end, or "
                "if it was killed finish it with jobs/bank.py --work-dir W --break-lock gc --delete"
            )

    def _replace(self, pointer: Pointer, new: Pointer) -> bool:
        data = new.to_bytes()
        if not self.objects.replace(CHAMPION, data, pointer.version):
            # a request whose answer was lost is made again and then refused, though it was ours that succeeded
            found = self.objects.read(CHAMPION)
            return found is not None and found[0] == data
        self._parsed = (data, new)
        return True

    def _refuse_other_head(self, pointer: Pointer, head: str | None) -> None:
        if pointer.head == head:
            return
        what = "nothing is published there any more"
        if pointer.head is not None:
            newest = self.manifest(pointer.head)
            who = newest.task if isinstance(newest, Manifest) else newest.name
            what = f"another job published increment {newest.increment} ({who}) there meanwhile"
        raise UserError(f"{self.uri}: {what}; run the same command again: it goes on from there")


@lru_cache(maxsize=4)
def _opened(uri: str, process: int) -> Store:
    return Store(open_objects(uri))


def open_store(uri: str) -> Store:
    """The store at a URI, one object of a process: its connections and what it knows are kept."""
    return _opened(uri, os.getpid())


def objects_of(entry: Entry, work_dir: Path, folder: Path, withdrawn: Container[str] = ()) -> dict[str, Source]:
    """By name in a store, all that an entry must have there and where it stands on this machine: bank files below
    `work_dir`, the entry's own files in `folder`. `withdrawn` holds bank digests and names below increments/.
    """
    shas = sorted({sha for sha in digests_of(entry) if sha not in withdrawn})
    objects = {f"bank/{sha}.safetensors": Source(work_dir / "bank" / f"{sha}.safetensors", sha) for sha in shas}
    files = entry.files if isinstance(entry, Manifest) else {}
    for name, sha in sorted(files.items()):
        if f"{entry.folder}/{name}" not in withdrawn:
            objects[f"{INCREMENTS}/{entry.sha256}/{name}"] = Source(folder / name, sha)
    objects[f"{INCREMENTS}/{entry.sha256}/{MANIFEST}"] = Source(folder / MANIFEST, entry.sha256)
    return objects


def reached_objects(work_dir: Path, chain: Iterable[Entry], withdrawn: Container[str] = ()) -> dict[str, Source | None]:
    """By name in a store, every object that a chain leads to and where it stands in a work_dir; None for run.json,
    whose bytes nothing names.
    """
    reached: dict[str, Source | None] = {}
    for entry in chain:
        reached |= objects_of(entry, work_dir, work_dir / INCREMENTS / entry.folder, withdrawn)
        reached[f"{INCREMENTS}/{entry.sha256}/{RUN}"] = None
    return reached


def digests_in(champion: Champion | None) -> set[str]:
    """The bank files that a champion's tables name."""
    tables = (champion.bundles, champion.state) if champion else ()
    return {sha for table in tables for roles in table.values() for sha in roles.values()}


def hashed_blocks(source: Source) -> Iterator[bytes]:
    """A local file a block at a time; at its end a UserError, before anything is stored, where it was altered."""
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                watch.report()
                digest.update(block)
                yield block
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror}); restore it from a backup") from error
    if digest.hexdigest() != source.sha256:
        raise UserError(f"{source.path}: was altered and is not stored; restore it from a backup")

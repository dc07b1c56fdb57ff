"""champion.json: what is served. The chain's head and, by task, the newest promoted bundle and method state.

It is the fold of the chain and replaced as a whole, so that it grows with the tasks there are.
"""

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError

from data_contracts.errors import UserError
from pipeline.config import describe
from pipeline.files import FileBeside, canonical_json, date_apart, file_beside, start_writing
from pipeline.tracking.history import take_over
from pipeline.tracking.manifest import Entry, Manifest, Record, RoleName, Sha256, TaskName

CHAMPION = "champion.json"


class Champion(Record):
    """What is served: the chain's head and, by task, the newest promoted bundle and method state."""

    format: Literal[1] = 1
    head: Sha256  # sha256 of the newest manifest, rejected ones included
    increment: int = Field(ge=0)  # number of the newest promoted increment; 0 = none yet
    bundles: dict[TaskName, dict[RoleName, Sha256]]
    state: dict[TaskName, dict[RoleName, Sha256]]

    def to_bytes(self) -> bytes:
        """The file's content: canonical JSON in UTF-8."""
        return canonical_json(self.model_dump()).encode()


class _Table:
    """A table by task as canonical JSON. One piece of memory, changed in place: it may be hundreds of KB."""

    def __init__(self, table: Mapping[str, dict[str, str]]) -> None:
        self.tasks = sorted(table)
        parts = [self._part(task, table[task]) for task in self.tasks]
        self._sizes = array("L", map(len, parts))
        self._text = bytearray(b"".join(parts))

    @staticmethod
    def _part(task: str, roles: dict[str, str]) -> bytes:
        """With the comma after it."""
        return f'"{task}":{canonical_json(roles)},'.encode()

    def replace(self, task: str, roles: dict[str, str] | None) -> None:
        """Take a task's part anew; None: it has none any more."""
        place = bisect_left(self.tasks, task)
        begin = end = sum(self._sizes[:place])
        if place < len(self.tasks) and self.tasks[place] == task:
            end += self._sizes[place]
            del self.tasks[place], self._sizes[place]
        part = b""
        if roles is not None:
            part = self._part(task, roles)
            self.tasks.insert(place, task)
            self._sizes.insert(place, len(part))
        self._text[begin:end] = part

    def write_to(self, file: BinaryIO) -> None:
        """Without its braces."""
        with memoryview(self._text) as text:
            file.write(text[:-1])


class _Mark(NamedTuple):
    """Another one for every change of a file."""

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int


def _mark(path: Path) -> _Mark | None:
    """None for a file that cannot be opened. Over NFS a `stat` without opening may be seconds old."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return _Mark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Served(NamedTuple):
    """What champion.json held at one moment."""

    champion: Champion | None
    mark: _Mark | None  # looked at first, so that a change since then shows

    @classmethod
    def at_first(cls, work_dir: Path) -> "Served":
        """What it holds now. Raises as `read_champion` does."""
        mark = _mark(work_dir / CHAMPION)
        return cls(read_champion(work_dir), mark)

    def now(self, work_dir: Path) -> Champion | None:
        """What it holds now, read again unless it is untouched."""
        if self.mark is not None and self.mark == _mark(work_dir / CHAMPION):
            return self.champion
        return read_champion(work_dir)


class Current:
    """The champion of a work_dir in the hands of who publishes there: changed in place, and only the tasks that a
    change touches are put into JSON anew. A process that publishes on neither reads back nor copies what it wrote.
    """

    _last: ClassVar["Current | None"] = None  # the one that this process wrote out last

    def __init__(self, champion: Champion | None) -> None:
        self.champion = champion  # None: nothing was published
        self._tables: tuple[_Table, _Table] | None = None  # bundles and state, once they were written out
        self._mark: _Mark | None = None  # of its file, where this process has made that and nobody else had it since

    @classmethod
    def take(cls, work_dir: Path | str) -> "Current":
        """What champion.json holds, to be changed and written out. Raises UserError when the file is damaged."""
        taken = cls._of(Path(work_dir) / CHAMPION)
        cls._last = None  # until it is written out again, the file is what counts
        return taken

    @classmethod
    def _of(cls, path: Path) -> "Current":
        last = cls._last
        if last is not None and last._mark is not None and last._mark == _mark(path):
            return last
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls(None)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error
        if last is not None and last.to_bytes() == data:
            return last
        try:
            champion = Champion.model_validate_json(data)
        except ValidationError as error:
            raise UserError(
                f"{path}: not a valid champion file ({describe(error)}); restore it from a backup"
            ) from error
        if champion.to_bytes() != data:
            raise UserError(f"{path}: not in the form it was written in; restore it from a backup")
        return cls(champion)

    def copy(self) -> Champion | None:
        """The champion as it is now, whatever becomes of this one."""
        if self.champion is None:
            return None
        # every part comes from a validated record: validating the whole table again would cost more with every task
        tables = {"bundles": dict(self.champion.bundles), "state": dict(self.champion.state)}
        return self.champion.model_copy(update=tables)

    def advance(self, manifest: Manifest) -> None:
        """Take in one more increment: the head moves always, the tables only with a promotion."""
        before = self.champion or Champion(head=manifest.sha256, increment=0, bundles={}, state={})
        changed = take_over(before.bundles, before.state, manifest)
        promoted = manifest.increment if changed else before.increment
        self.champion = before.model_copy(update={"head": manifest.sha256, "increment": promoted})
        if self._tables is not None:
            bundles, state = self._tables
            for task in changed:
                bundles.replace(task, before.bundles.get(task))
                state.replace(task, before.state.get(task))

    @contextmanager
    def drafted(self, work_dir: Path, before: Served, entry: Entry) -> Iterator["Draft"]:
        """This one, as `entry` makes it, written beside champion.json; nothing is left of it after the block unless it
        took its place. The file grows with the tasks: the disk takes it while the block does the rest.
        """
        with file_beside(work_dir / CHAMPION) as beside:
            place_of_head = self._write_to(beside.file)
            start_writing(beside.file)
            yield Draft(entry, before, self, beside, place_of_head)

    def to_bytes(self) -> bytes:
        """The file's content, as `Champion.to_bytes`."""
        file = BytesIO()
        self._write_to(file)
        return file.getvalue()

    def _write_to(self, file: BinaryIO) -> int:
        """Returns the place of the head's digest in the file."""
        if self._tables is None:
            self._tables = _Table(self.champion.bundles), _Table(self.champion.state)
        bundles, state = self._tables
        rest = canonical_json(self.champion.model_dump(include={"format", "head", "increment"}))[1:-1]
        file.write(b'{"bundles":{')
        bundles.write_to(file)
        place_of_head = file.tell() + len("},") + rest.index(self.champion.head)
        file.write(b"}," + rest.encode() + b',"state":{')
        state.write_to(file)
        file.write(b"}}")
        return place_of_head


class Draft:
    """champion.json as it will be, beside champion.json as it is. All it may still lack is the head's digest."""

    def __init__(self, entry: Entry, before: Served, current: Current, beside: FileBeside, place_of_head: int) -> None:
        self.entry = entry  # that the tables were brought up to date with
        self.before = before
        self._current = current
        self._beside = beside
        self._place_of_head = place_of_head

    def settle(self, head: str) -> None:
        """Name the head, which leaves nothing open."""
        self._current.champion = self._current.champion.model_copy(update={"head": head})
        file = self._beside.file
        file.seek(self._place_of_head)
        file.write(head.encode())
        file.flush()
        self._date = date_apart(file.fileno())

    def copy(self) -> Champion:
        """The champion that it will be, whatever becomes of it later."""
        return self._current.copy()

    def take_place(self) -> None:
        """Make it champion.json; a kill or an error leaves the old one."""
        self._beside.take_place()
        mark = _mark(self._beside.path)
        # where the times differ, those of the file system are coarser
        self._current._mark = mark if mark is not None and mark.modified_ns == self._date else None
        Current._last = self._current


def read_champion(work_dir: Path | str) -> Champion | None:
    """The champion of a work_dir, None when nothing was published. Raises UserError when champion.json is damaged."""
    return Current._of(Path(work_dir) / CHAMPION).copy()

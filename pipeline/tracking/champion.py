"""champion.json: what is served. The chain's head and, by task, the newest promoted bundle and method state.

It is the fold of the chain and replaced as a whole, so that it grows with the tasks there are. A process that publishes
on parses nothing that it wrote itself, and writes out anew only the tasks that an increment changed.
"""

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError

from data_contracts.errors import UserError
from pipeline.config import describe
from pipeline.files import atomic_file, canonical_json, date_apart, start_writing
from pipeline.tracking.manifest import Record, RoleName, Sha256, TaskName

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
        file = BytesIO()
        self.write_to(file)
        return file.getvalue()

    def write_to(self, file: BinaryIO, before: "Champion | None" = None, changed: Iterable[str] = ()) -> None:
        """Write the file's content.

        Args:
            file: takes bytes.
            before: a champion that differs in no tasks but those `changed`. Where it was the last one to be
                written out here, only these are written out anew.
            changed: names of tasks.
        """
        last = _Written.last
        if last is None or last.champion is not self:
            _Written.last = None  # its tables are taken over
            if last is not None and before is not None and last.champion is before:
                bundles, state = last.bundles, last.state
                for task in changed:
                    bundles.replace(task, self.bundles.get(task))
                    state.replace(task, self.state.get(task))
            else:
                bundles, state = _Table(self.bundles), _Table(self.state)
            rest = canonical_json(self.model_dump(include={"format", "head", "increment"}))[1:-1].encode()
            last = _Written.last = _Written(self, bundles, rest, state)
        file.write(b'{"bundles":{')
        last.bundles.write_to(file)
        file.write(b"}," + last.rest + b',"state":{')
        last.state.write_to(file)
        file.write(b"}}")


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


@dataclass
class _Written:
    """A champion and the parts of its content."""

    last: ClassVar["_Written | None"] = None  # the one that this process wrote out last

    champion: Champion
    bundles: _Table
    rest: bytes  # the fields between the tables
    state: _Table
    mark: "_Mark | None" = None  # of its file, where this process has made that and nobody else had it since


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


@contextmanager
def replacing_champion(
    work_dir: Path, champion: Champion, before: Champion | None = None, changed: Iterable[str] = ()
) -> Iterator[None]:
    """A block after which champion.json holds `champion`; a kill or an error leaves the old one. It grows with the
    tasks, so that the disk takes it while the block does the rest. Arguments as for `Champion.write_to`.
    """
    path = work_dir / CHAMPION
    with atomic_file(path) as file:
        champion.write_to(file, before, changed)
        written = _Written.last
        start_writing(file)
        date = date_apart(file.fileno())
        yield
    mark = _mark(path)
    if (
        written is not None and mark is not None and mark.modified_ns == date
    ):  # else the file system's times are coarser
        written.mark = mark


def read_champion(work_dir: Path | str) -> Champion | None:
    """The champion of a work_dir, None when nothing was published. Raises UserError when champion.json is damaged."""
    path = Path(work_dir) / CHAMPION
    last = _Written.last
    if last is not None and last.mark is not None and last.mark == _mark(path):
        return last.champion
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    if last is not None and last.champion.to_bytes() == data:
        return last.champion
    try:
        champion = Champion.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{path}: not a valid champion file ({describe(error)}); restore it from a backup") from error
    if champion.to_bytes() != data:
        raise UserError(f"{path}: not in the form it was written in; restore it from a backup")
    return champion

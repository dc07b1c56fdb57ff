"""champion.json: what is served. The chain's head and, by task, the newest promoted bundle and method state.

It is the fold of the chain and replaced as a whole, so that it grows with the tasks there are. A process that publishes
on parses nothing that it wrote itself, and writes out anew only the tasks that an increment changed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationError

from data_contracts.errors import UserError
from pipeline.config import describe
from pipeline.files import canonical_json
from pipeline.tracking.manifest import Record, RoleName, Sha256, TaskName

CHAMPION = "champion.json"


class Champion(Record):
    """What is served: the chain's head and, by task, the newest promoted bundle and method state."""

    format: Literal[1] = 1
    head: Sha256  # sha256 of the newest manifest, rejected ones included
    increment: int = Field(ge=0)  # number of the newest promoted increment; 0 = none yet
    bundles: dict[TaskName, dict[RoleName, Sha256]]
    state: dict[TaskName, dict[RoleName, Sha256]]

    def to_bytes(self, before: "Champion | None" = None, changed: Iterable[str] = ()) -> bytes:
        """The file's content: canonical JSON in UTF-8.

        Args:
            before: a champion that differs in no tasks but those `changed`. Where it was the last one to be
                written out here, only these are written out anew.
        """
        last = _Written.last
        if last is not None and last.champion is self:
            return last.data
        if last is not None and before is not None and last.champion is before:
            _Written.last = None  # its parts are taken over
            bundles, state = last.bundles, last.state
            for task in changed:
                bundles.replace(task, self.bundles.get(task))
                state.replace(task, self.state.get(task))
        else:
            bundles, state = _Table(self.bundles), _Table(self.state)
        between = canonical_json(self.model_dump(include={"format", "head", "increment"}))[1:-1].encode()
        pieces = [b'{"bundles":{', bundles.text, b"},", between, b',"state":{', state.text, b"}}"]
        data = b"".join(pieces)  # once: they may be hundreds of KB
        _Written.last = _Written(self, data, bundles, state)
        return data


class _Table:
    """A table by task as canonical JSON. One piece of memory: thousands of small ones take longer to gather."""

    def __init__(self, table: Mapping[str, dict[str, str]]) -> None:
        self.tasks = sorted(table)
        parts = [self._part(task, table[task]) for task in self.tasks]
        self._sizes = [len(part) for part in parts]
        self._text = b"".join(parts)

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
        if part or begin < end:
            text = memoryview(self._text)
            self._text = b"".join([text[:begin], part, text[end:]])

    @property
    def text(self) -> memoryview:
        """Without its braces."""
        return memoryview(self._text)[:-1]


@dataclass(frozen=True)
class _Written:
    """A champion, its bytes, and the parts they are made of."""

    last: ClassVar["_Written | None"] = None  # the one that this process wrote out last

    champion: Champion
    data: bytes
    bundles: _Table
    state: _Table


def read_champion(work_dir: Path | str) -> Champion | None:
    """The champion of a work_dir, None when nothing was published. Raises UserError when champion.json is damaged."""
    path = Path(work_dir) / CHAMPION
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    last = _Written.last
    if last is not None and last.data == data:
        return last.champion
    try:
        champion = Champion.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{path}: not a valid champion file ({describe(error)}); restore it from a backup") from error
    if champion.to_bytes() != data:
        raise UserError(f"{path}: not in the form it was written in; restore it from a backup")
    return champion

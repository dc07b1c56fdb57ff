"""The outbox: what MLflow is still to be told, on disk, in order.

One small file an event, named by its sequence number, written beside and renamed; it goes once the event is delivered.
So what stands in the folder is what MLflow does not know yet, a kill leaves no half event, and no event is lost. One
that was delivered just before a kill is delivered again: delivery changes nothing the second time.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic

OUTBOX = "outbox"
_NAME = re.compile(r"\d{10}\.json")
_DAMAGED, _ASIDE = ".damaged", ".aside"


@dataclass(frozen=True)
class Event:
    """One thing that MLflow is to be told."""

    sequence: int  # from 1; the order of delivery
    kind: str
    key: str  # what makes it once: of two waiting events with one key, the second is dropped; empty: never dropped
    uri: str  # where it was meant to go, without a password; it goes to whatever server the next launch names
    time: int  # milliseconds since the epoch: MLflow's times are when it happened, not when it was delivered
    data: dict[str, Any]


class Outbox:
    """The waiting events of one work_dir, oldest first. Not safe for several threads: `Courier` guards it."""

    def __init__(self, work_dir: Path | str, uri: str):
        self.folder = Path(work_dir) / OUTBOX
        self.uri = uri
        self.not_on_disk: OSError | None = None  # the last event that could not be written is held in memory alone
        self._waiting: dict[int, Event] = {}
        events, damaged = read_outbox(work_dir)
        for path in damaged:
            os.replace(path, path.with_name(path.name + _DAMAGED))
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for event in events:
            self._waiting[event.sequence] = event
        numbers = [int(path.name[:10]) for path in self.folder.glob("*.json*") if path.name[:10].isdigit()]
        self._next = max(numbers, default=0) + 1

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, kind: str, data: dict[str, Any], key: str = "") -> Event | None:
        """Add an event, durably; None where one with this key waits already. A full disk never stops the caller: the
        event is then held in memory, and `not_on_disk` says why.
        """
        if key and any(event.key == key for event in self._waiting.values()):
            return None
        event = Event(self._next, kind, key, self.uri, int(time.time() * 1000), data)
        self._next += 1
        self._waiting[event.sequence] = event
        try:
            write_atomic(self._path(event), json.dumps(asdict(event), sort_keys=True).encode())
        except OSError as error:
            self.not_on_disk = error
        return event

    def first(self) -> Event | None:
        """The oldest waiting event."""
        return next(iter(self._waiting.values()), None)

    def makes_run(self, key: str) -> Event | None:
        """The oldest waiting event that makes the run with this key."""
        return next((e for e in self._waiting.values() if e.kind == "run" and e.data.get("key") == key), None)

    def put_aside(self, event: Event) -> str:
        """Wait with an event no longer, and keep its file under another name, which the audit tells; that name."""
        self._waiting.pop(event.sequence, None)
        path = self._path(event)
        aside = path.with_name(path.name + _ASIDE)
        if path.exists():
            os.replace(path, aside)
        return aside.name

    def remove(self, event: Event) -> None:
        """Forget a delivered event."""
        self._waiting.pop(event.sequence, None)
        self._path(event).unlink(missing_ok=True)

    def _path(self, event: Event) -> Path:
        return self.folder / f"{event.sequence:010d}.json"


def read_outbox(work_dir: Path | str) -> tuple[list[Event], list[Path]]:
    """The waiting events of a work_dir in order, and the files among them that hold none. Nothing is changed."""
    events, damaged = [], []
    folder = Path(work_dir) / OUTBOX
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not _NAME.fullmatch(path.name):
            continue
        event = _read(path)
        if event is None:
            damaged.append(path)
        else:
            events.append(event)
    return events, damaged


def set_aside(work_dir: Path | str) -> list[Path]:
    """The files that were no event when a launch read them, or of a run that MLflow does not know."""
    folder = Path(work_dir) / OUTBOX
    return sorted([*folder.glob(f"*{_DAMAGED}"), *folder.glob(f"*{_ASIDE}")])


def _read(path: Path) -> Event | None:
    try:
        fields = json.loads(path.read_bytes())
        event = Event(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    right = isinstance(event.data, dict) and all(isinstance(text, str) for text in (event.kind, event.key, event.uri))
    return event if right and type(event.time) is int and event.sequence == int(path.name[:10]) else None

"""What a chain of increments says, kept up to date increment by increment: no manifest is read or walked twice.

Bringing it up to date costs what the new increment changed, not what there was before. Of an increment it keeps what
later ones ask for, about its two rows of scores; of manifests only the newest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.tracking.chain import take_over
from pipeline.tracking.manifest import ContractRecord, Manifest


@dataclass(frozen=True)
class Entry:
    """An increment in short."""

    increment: int
    task: str
    folder: str  # its name in increments/
    verdict: str
    contract: ContractRecord
    data: dict[str, str]  # digest by split
    learning_digest: str
    row: dict[str, float]  # this row of R, on test
    validation_row: dict[str, float]


@dataclass
class History:
    """The increments of a work_dir, oldest first, and what they amount to."""

    entries: list[Entry] = field(default_factory=list)
    head: Manifest | None = None  # the newest, rejected or not
    promoted: Manifest | None = None  # the newest promoted one
    bundles: dict[str, dict[str, str]] = field(default_factory=dict)  # the champion's, by task
    state: dict[str, dict[str, str]] = field(default_factory=dict)  # the champion's method state, by task
    learned: dict[str, Entry] = field(default_factory=dict)  # by task its newest promotion, in order of learning
    row: dict[str, float] = field(default_factory=dict)  # each task's score in the newest promotion that measured it
    _by_task: dict[str, list[Entry]] = field(default_factory=dict)

    @classmethod
    def of(cls, manifests: Iterable[Manifest]) -> "History":
        """The history that a chain of manifests, in any order, tells."""
        history = cls()
        for manifest in sorted(manifests, key=lambda manifest: manifest.increment):
            history.add(manifest)
        return history

    def add(self, manifest: Manifest) -> None:
        """One more increment."""
        entry = Entry(
            manifest.increment,
            manifest.task,
            manifest.folder,
            manifest.verdict,
            manifest.contract,
            {split: record.digest for split, record in manifest.data.items()},
            manifest.learning_digest,
            manifest.row,
            manifest.validation_row,
        )
        self.entries.append(entry)
        self._by_task.setdefault(manifest.task, []).append(entry)
        self.head = manifest
        if take_over(self.bundles, self.state, manifest):
            self.promoted = manifest
            self.learned.pop(manifest.task, None)
            self.learned[manifest.task] = entry
            self.row |= manifest.row

    def of_task(self, task: str) -> Iterator[Entry]:
        """The increments of one task, newest first."""
        return reversed(self._by_task.get(task, []))

    @property
    def head_sha256(self) -> str | None:
        """Digest of the newest manifest; None before the first."""
        return self.head.sha256 if self.head else None

"""What a chain says, kept up to date entry by entry: no manifest is read or walked twice.

Bringing it up to date costs what the new increment changed, not what there was before. Of an increment it keeps what
later ones ask for, about its two rows of scores; of manifests only the newest.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from data_contracts.errors import UserError
from pipeline.tracking.manifest import ROUTER, Change, ContractRecord, Manifest
from pipeline.tracking.manifest import Entry as ChainEntry

ROW = "row.json"
KEPT_FILES = (ROW, "review.json")


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
    files: dict[str, str] = field(default_factory=dict)  # digest by name, of the files that reports read


@dataclass
class History:
    """The increments of a work_dir, oldest first, and what they amount to.

    A restored champion takes the tables back to what they were after an earlier entry; tasks retired since stay away.
    `entries` and `of_task` hold all increments there ever were, everything else those in effect.
    """

    entries: list[Entry] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    head: ChainEntry | None = None  # the newest, rejected or not
    newest: Manifest | None = None  # the newest increment, in effect or not
    promoted: Manifest | None = None  # the newest promoted one
    bundles: dict[str, dict[str, str]] = field(default_factory=dict)  # the champion's, by task
    state: dict[str, dict[str, str]] = field(default_factory=dict)  # the champion's method state, by task
    learned: dict[str, Entry] = field(default_factory=dict)  # by task its newest promotion, in order of learning
    row: dict[str, float] = field(default_factory=dict)  # each task's score in the newest promotion that measured it
    in_effect: set[int] = field(default_factory=set)  # numbers of the increments that the champion stands on
    retired: dict[str, int] = field(default_factory=dict)  # number of a task's newest withdrawal, also if learned since
    withdrawn: dict[str, Change] = field(default_factory=dict)  # by digest of a bank file that was not published since
    _by_task: dict[str, list[Entry]] = field(default_factory=dict)

    @classmethod
    def of(cls, manifests: Iterable[ChainEntry]) -> "History":
        """The history that a chain, in any order, tells."""
        history = cls()
        ordered = sorted(manifests, key=lambda manifest: manifest.increment)
        restored = {manifest.to for manifest in ordered if isinstance(manifest, Change)}
        then: dict[int, History] = {}  # as it was after each entry whose champion is restored later
        for manifest in ordered:
            if isinstance(manifest, Manifest):
                history.add(manifest)
            else:
                history.change(manifest, then.get(manifest.to))
            if manifest.increment in restored:
                then[manifest.increment] = history.tables()
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
            {name: sha for name, sha in manifest.files.items() if name in KEPT_FILES},
        )
        self.entries.append(entry)
        self._by_task.setdefault(manifest.task, []).append(entry)
        self.head = self.newest = manifest
        self.in_effect.add(manifest.increment)
        if self.withdrawn:
            published = {*manifest.bank.values(), *manifest.state.values()}
            self.withdrawn = {sha: change for sha, change in self.withdrawn.items() if sha not in published}
        if take_over(self.bundles, self.state, manifest):
            self.promoted = manifest
            self.learned.pop(manifest.task, None)
            self.learned[manifest.task] = entry
            self.row |= manifest.row

    def tables(self) -> "History":
        """A copy of what a restored champion takes back."""
        own = ("bundles", "state", "learned", "row", "in_effect")
        return History(promoted=self.promoted, **{name: getattr(self, name).copy() for name in own})

    def change(self, change: Change, then: "History | None" = None) -> None:
        """One more entry that learns nothing; `then` is what was after the entry whose champion it restores."""
        self.head = change
        self.changes.append(change)
        if change.task is not None:
            self.retired[change.task] = change.increment
            self.withdrawn |= dict.fromkeys(change.withdrawn, change)
        else:
            back = (then or History()).tables()
            self.promoted, self.bundles, self.state = back.promoted, back.bundles, back.state
            self.learned, self.row, self.in_effect = back.learned, back.row, back.in_effect
        for task, number in self.retired.items():
            if task not in self.learned or self.learned[task].increment < number:
                self._leave_out(task)
        for task, names in list(self.state.items()):
            self.state[task] = {name: sha for name, sha in names.items() if sha not in self.withdrawn}
            if not self.state[task]:
                del self.state[task]

    def _leave_out(self, task: str) -> None:
        """Take a task out of what is in effect. A router that stands with it stays: it is one for all tasks."""
        router = {name: sha for name, sha in self.state.pop(task, {}).items() if name == ROUTER}
        if router:
            self.state[task] = router
        for table in (self.bundles, self.learned, self.row):
            table.pop(task, None)
        self.in_effect -= {entry.increment for entry in self._by_task.get(task, [])}

    def of_task(self, task: str) -> Iterator[Entry]:
        """The increments of one task, newest first."""
        return reversed(self._by_task.get(task, []))

    def refuse_retired(self, task: str, learned: int) -> None:
        """Raise UserError for a task that was retired after its increment `learned` (0: it is not served)."""
        if learned < self.retired.get(task, 0):
            number = self.retired[task]
            raise UserError(
                f"task '{task}' was withdrawn with its experts (increment {number}); it is not served any more"
            )

    def refuse_withdrawn(self, roles: Mapping[str, str], sentence: str) -> None:
        """Raise UserError, beginning with `sentence`, where a bundle or state names a withdrawn file."""
        for role, sha in roles.items():
            if change := self.withdrawn.get(sha):
                raise UserError(
                    f"{sentence} the {role} {sha[:12]}..., which was withdrawn with task '{change.task}' (increment "
                    f"{change.increment})"
                )

    @property
    def length(self) -> int:
        """Number of the newest entry; 0 before the first."""
        return self.head.increment if self.head else 0

    @property
    def head_sha256(self) -> str | None:
        """Digest of the newest manifest; None before the first."""
        return self.head.sha256 if self.head else None


def take_over(bundles: dict[str, dict[str, str]], state: dict[str, dict[str, str]], manifest: Manifest) -> set[str]:
    """Bring the tables of bundles and method state, by task, up to date in place. Returns the tasks whose parts are
    others then: none for a rejected increment.
    """
    if manifest.verdict == "rejected":
        return set()
    bundles.update(manifest.bundles)
    state.pop(manifest.task, None)
    changed = replace_router(state, manifest)
    if manifest.state:
        state[manifest.task] = manifest.state
    return {manifest.task, *manifest.bundles, *changed}


def replace_router(state: dict[str, dict[str, str]], manifest: Manifest) -> list[str]:
    """Take the router out of a table of states, by task, in place, where the increment brings a newer one: it is one
    for all tasks and stands with the task it learned last. Returns the tasks it stood with.
    """
    stood = [task for task, names in state.items() if ROUTER in names] if ROUTER in manifest.state else []
    for task in stood:
        state[task] = {name: sha for name, sha in state[task].items() if name != ROUTER}
        if not state[task]:
            del state[task]
    return stood

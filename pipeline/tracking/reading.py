"""What a work_dir serves, and what it stands on, now or as of an earlier increment. For jobs that read."""

from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.tracking.chain import champion_of, load_chain
from pipeline.tracking.champion import Champion
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Manifest


@dataclass(frozen=True)
class AsOf:
    """A work_dir as of one entry of its chain."""

    work_dir: Path
    champion: Champion
    chain: list[Manifest]  # the increments that the champion stands on, newest first
    history: History  # the work_dir's up to now: what was withdrawn since is not served

    def learned(self, task: str) -> Manifest | None:
        """The increment that learned a task last; None where it is not learned."""
        return next((m for m in self.chain if m.task == task and m.verdict == "promoted"), None)

    def bundle(self, task: str) -> dict[str, str]:
        """What a task is served with. Raises UserError naming the tasks there are, or by whom it was withdrawn."""
        manifest = self.learned(task)
        self.history.refuse_retired(task, manifest.increment if manifest else 0)
        if task not in self.champion.bundles:
            known = ", ".join(self.champion.bundles) or "none yet"
            raise UserError(f"task '{task}' is not learned in {self.work_dir}; learned: {known}")
        bundle = self.champion.bundles[task]
        self.history.refuse_withdrawn(bundle, f"task '{task}' cannot be served as of this increment: it had")
        return bundle

    def serves(self, task: str) -> bool:
        """Whether a task was learned by then and not withdrawn since."""
        manifest = self.learned(task)
        return task in self.champion.bundles and manifest.increment >= self.history.retired.get(task, 0)


def as_of(work_dir: Path, increment: int | None = None) -> AsOf:
    """Verify the chain of a work_dir and take it as of an entry (default: now).

    Raises UserError for a work_dir without increments, an entry there is not, or where every task is withdrawn.
    """
    chain = load_chain(work_dir)
    if not chain:
        raise UserError(f"work_dir {work_dir} has no published increment; run jobs/continual.py first")
    now = then = History.of(chain)
    if increment is not None:
        chain = [entry for entry in chain if entry.increment <= increment]
        if not chain or chain[0].increment != increment:
            raise UserError(f"work_dir {work_dir} has no increment {increment}")
        then = History.of(chain)
    effect = [entry for entry in chain if isinstance(entry, Manifest) and entry.increment in then.in_effect]
    if not effect:
        raise UserError(f"every task of work_dir {work_dir} is withdrawn; there is nothing to serve")
    return AsOf(work_dir, champion_of(then), effect, now)

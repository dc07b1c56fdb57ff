"""Two increments of a work_dir compared by their review cost on one task, from what they published; no model is run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts import UserError
from pipeline.evaluation.review_cost import REVIEW, ReviewCost, ScoredRows, decided, paired_bootstrap, review_cost
from pipeline.tracking.chain import load_chain, read_published
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Entry, Manifest


@dataclass(frozen=True)
class Compared:
    """Review cost of increments A and B on the same test rows at the same target precision."""

    task: str
    target_precision: float
    before: ReviewCost
    after: ReviewCost
    interval: tuple[float, float]  # 95 %, of the stripping rate of B minus that of A

    @property
    def difference(self) -> float:
        """Stripping rate of B minus that of A."""
        return self.after.stripping_rate - self.before.stripping_rate


def compare_reviews(work_dir: Path | str, first: int, second: int, task: str) -> Compared:
    """Compare increments `first` (A) and `second` (B), thresholds as each published them.

    The interval is a paired bootstrap over the test rows; the thresholds stay. Raises UserError where an increment has
    no thresholds for the task, or the two differ in test rows or target precision.
    """
    folder = Path(work_dir).expanduser().resolve()
    chain = load_chain(folder)
    targets, tables, costs, alone = [], [], [], []
    for number in (first, second):
        record, table = _published(folder, chain, number, task)
        rows = ScoredRows.of(*(table[name].to_pylist() for name in ("answer", "score", "reference")))
        targets.append(record["target_precision"])
        tables.append(table)
        costs.append(review_cost(rows, record["thresholds"]))
        alone.append(decided(rows.answers, rows.scores, record["thresholds"]))
    if targets[0] != targets[1]:
        raise UserError(
            f"increment {first} chose its thresholds for a precision of {targets[0]}, increment {second} for "
            f"{targets[1]}; only equal targets can be compared"
        )
    if any(tables[0][name].to_pylist() != tables[1][name].to_pylist() for name in ("row_id", "reference")):
        raise UserError(f"increments {first} and {second} were tested on different rows of {task}; compare two others")
    before, after = (np.asarray(rows, dtype=float) for rows in alone)
    return Compared(task, targets[0], *costs, paired_bootstrap(before, after))


def _published(work_dir: Path, chain: list[Entry], number: int, task: str) -> tuple[dict, pa.Table]:
    """A task's review record and test predictions of an increment, verified against its manifest."""
    manifest = next((manifest for manifest in chain if manifest.increment == number), None)
    if manifest is None:
        raise UserError(f"work_dir {work_dir} has no increment {number}")
    if not isinstance(manifest, Manifest):
        raise UserError(f"entry {number} of work_dir {work_dir} ({manifest.name}) learned nothing; name an increment")
    if change := next(
        (c for c in History.of(chain).changes if f"{manifest.folder}/predictions/{task}.parquet" in c.withdrawn_files),
        None,
    ):
        raise UserError(f"task '{task}' was withdrawn with its predictions (increment {change.increment})")
    record = read_review(work_dir, manifest).get(task)
    if record is None:
        raise UserError(
            f"increment {number} published no thresholds for task '{task}'; learn with evaluation.review set, and name "
            "a classification task that the increment measured"
        )
    return record, pq.read_table(pa.BufferReader(_verified(work_dir, manifest, f"predictions/{task}.parquet")))


def read_review(work_dir: Path, manifest: Manifest) -> dict[str, dict]:
    """{task: review record} of an increment, verified; empty where it has none."""
    if REVIEW not in manifest.files:
        return {}
    return json.loads(_verified(work_dir, manifest, REVIEW))


def _verified(work_dir: Path, manifest: Manifest, name: str) -> bytes:
    return read_published(work_dir, manifest.folder, manifest.files, name)


def render(compared: Compared, first: int, second: int) -> str:
    """The comparison as text, in points of 100."""
    lines = [f"{compared.task}: rows decided without review, target precision {compared.target_precision}"]
    for number, cost in ((first, compared.before), (second, compared.after)):
        precision = "-" if cost.precision is None else f"{100 * cost.precision:.1f}"
        share = f"{100 * cost.stripping_rate:5.1f} % of {cost.rows} test rows"
        lines.append(f"  increment {number:<4d} {share}, of these right {precision:>5s} %")
    low, high = (100 * value for value in compared.interval)
    lines.append(f"  difference     {100 * compared.difference:+5.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
    return "\n".join(lines)

"""The rows of a suite: drawn by seed, stratified by label, the same for every method and order."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.suites import SUITES, Task
from pipeline.files import canonical_json, sha256_text

Row = dict[str, str]
Splits = dict[str, list[Row]]


def _plain(row: Row) -> Row:
    return {"id": row["id"], "text": row["text"], "label": row["label"]}


def _multirc(row: Row) -> Row:
    """The paragraph alone may be cut: question and candidate answer are a column of their own."""
    paragraph, _, question = row["text"].partition("\nquestion: ")
    return {"id": row["id"], "text": paragraph, "question": f"question: {question}", "label": row["label"]}


def _trace(row: Row) -> Row:
    """Without the first and the last line of the prompt, which the contract's template has."""
    body = row["prompt"].partition("\n")[2].rpartition("\n")[0]
    return {"id": row["id"], "text": body, "label": row["answer"]}


def _trace_letter(row: Row) -> Row:
    return {**_trace(row), "label": row["answer"][:1]}


ROW_FORMS: dict[str, Callable[[Row], Row]] = {
    "text": _plain,
    "multirc": _multirc,
    "trace": _trace,
    "trace_letter": _trace_letter,
}


@dataclass(frozen=True)
class Sample:
    """The rows of one task and what names them."""

    task: Task
    labels: list[str]  # sorted; none for generation
    splits: Splits

    @property
    def digest(self) -> str:
        """Hex sha256 of every row."""
        return sha256_text(canonical_json(self.splits))

    def write(self, folder: Path) -> None:
        """Write <folder>/<task>/<split>.parquet; all columns are text."""
        (folder / self.task.name).mkdir(parents=True, exist_ok=True)
        for split, rows in self.splits.items():
            table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]})
            pq.write_table(table, folder / self.task.name / f"{split}.parquet")


def sample_suite(options: QualityOptions, seed: int, folders: Sequence[str]) -> dict[str, Sample]:
    """By folder the rows of the tasks named. Raises UserError for data that is not there."""
    tasks = SUITES[options.suite].tasks
    return {folder: sample_task(options, seed, tasks[folder]) for folder in folders}


def sample_task(options: QualityOptions, seed: int, task: Task) -> Sample:
    """Draw the rows of one task; validation rows come out of train where there is no such file."""
    read = {split: read_rows(options.data, task, split) for split in ("train", "validation", "test")}
    if not read["train"] or not read["test"]:
        raise UserError(f"--data {options.data} has no {task.data_folder}/train.parquet and test.parquet; name another")
    strata = [row["label"] for row in read["train"] + read["test"]] if task.kind == "classification" else []
    pools, splits = dict(read), {}
    if not read["validation"]:
        held_out = draw(read["train"], options.validation_rows, f"{seed}/{task.folder}/held out", bool(strata))
        taken = {row["id"] for row in held_out}
        pools = {**read, "validation": held_out, "train": [row for row in read["train"] if row["id"] not in taken]}
    for split in ("train", "validation", "test"):
        wanted = getattr(options, f"{split}_rows")
        splits[split] = draw(pools[split], wanted, f"{seed}/{task.folder}/{split}", bool(strata))
    return Sample(task, sorted(set(strata)), splits)


def read_rows(data: str, task: Task, split: str) -> list[Row]:
    """The rows of a file in the form of their task; none where there is no file."""
    path = Path(data) / task.data_folder / f"{split}.parquet"
    if not path.is_file():
        return []
    try:
        rows = [ROW_FORMS[task.form](row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: not a file of the suite ({str(error).splitlines()[0]}); name another") from None
    if task.part is None:
        return rows
    first, step = task.part
    return sorted(rows, key=lambda row: row["id"])[first::step]


def draw(rows: Sequence[Row], wanted: int, seed: str, stratified: bool) -> list[Row]:
    """At most `wanted` rows, shuffled by seed; the share of each label is kept as nearly as whole rows allow (largest
    remainders, ties by label).
    """
    shuffled = sorted(rows, key=lambda row: row["id"])
    random.Random(seed).shuffle(shuffled)
    if wanted >= len(shuffled) or not stratified:
        return shuffled[:wanted]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in shuffled:
        groups[row["label"]].append(row)
    exact = {label: wanted * len(group) / len(shuffled) for label, group in groups.items()}
    take = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(groups, key=lambda label: (take[label] - exact[label], label))
    for label in by_remainder[: wanted - sum(take.values())]:
        take[label] += 1
    chosen = {row["id"] for label, group in groups.items() for row in group[: take[label]]}
    return [row for row in shuffled if row["id"] in chosen]

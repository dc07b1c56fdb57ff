"""From a contract and its files to clean rows: read, check, quarantine, and count so that nothing gets lost.

Rows pass in batches, from files to disk and from there through the checks, so that memory holds 32 bytes for each of
them (the hashes of ids and texts) and half as much again for a moment.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.contract import SPLITS, TaskContract
from data_contracts.verdict import DataRejected, Verdict, judge
from pipeline.data.check_split import NUM_EXAMPLES, CheckedSplit, check_split
from pipeline.data.raw_rows import read_splits, source_files
from pipeline.data.token_limits import TokenCounter, tokenizer_digest
from pipeline.files import atomic_file, canonical_json, sha256_text

# Judged splits keep a shared text; the later one in this order loses it.
_PRIORITY = ("test", "validation", "train")


@dataclass(frozen=True)
class CleanTask:
    """A task's data after its contract was applied."""

    contract: TaskContract
    # train, validation, test -> columns row_id, text, prompt, answer, row_sha256 (all strings), memory-mapped
    splits: dict[str, pa.Table]
    verdict: Verdict
    file_digests: dict[str, str]  # file name below its data root -> sha256
    data_digests: dict[str, str]  # split -> sha256 over its row_sha256 in order
    quarantine: Path | None  # None: no row was rejected, or no folder was given
    prompt_ids: dict[str, pa.ChunkedArray]  # split -> token ids of its prompts; empty: no tokenizer was given
    tokenizer_digest: str | None  # of the tokenizer that gave the ids


def ingest(
    contract: TaskContract, roots: list[str | Path], *, tokenizer=None, quarantine_dir: Path | None = None
) -> CleanTask:
    """Read and check a task's data; the quarantine is written before the verdict is acted upon.

    Args:
        contract: the task's contract.
        roots: allowed folders and URI prefixes; the contract's files must lie below them.
        tokenizer: a Hugging Face fast tokenizer, or None: token limits are then not checked.
        quarantine_dir: rejected rows go to `<quarantine_dir>/<task>/<digest of contract and files>.parquet` (file,
            line, split, reason, row_sha256; never the text). Rows on their way lie on disk beside it, in files without
            a name (None: in the folder for temporary files), and so do the clean rows until the result is let go.

    Raises:
        UserError: an unreadable or missing file, a path outside the roots, a missing column.
        DataRejected: (a UserError with the verdict) more rejected rows than allowed, or fewer rows left than needed.
    """
    task = examine(contract, roots, tokenizer=tokenizer, quarantine_dir=quarantine_dir)
    if not task.verdict.passed:
        raise DataRejected(task.verdict, task.quarantine)
    return task


def examine(
    contract: TaskContract, roots: list[str | Path], *, tokenizer=None, quarantine_dir: Path | None = None
) -> CleanTask:
    """As `ingest`, but data that breaks its contract is returned with a verdict that has not passed."""
    counter = None if tokenizer is None else TokenCounter(tokenizer)
    folder = None if quarantine_dir is None else Path(quarantine_dir).parent
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    raw, file_digests = read_splits(contract, roots, folder)
    checked: dict[str, CheckedSplit] = {}
    for name in _PRIORITY:
        judged = {other: done.texts for other, done in checked.items()}
        checked[name] = check_split(contract, name, raw.pop(name).batches(), counter, judged, folder)
    verdict = _verdict(contract, checked)
    quarantine = None
    if quarantine_dir is not None and verdict.kept < verdict.rows_in:
        digest = sha256_text(canonical_json({"contract": contract.digest, "files": file_digests}))
        quarantine = Path(quarantine_dir) / contract.task / f"{digest}.parquet"
        with atomic_file(quarantine) as file:
            pq.write_table(pa.concat_tables([checked[name].quarantine for name in SPLITS]), file)
    return CleanTask(
        contract=contract,
        splits={name: checked[name].clean for name in SPLITS},
        verdict=verdict,
        file_digests=file_digests,
        data_digests={name: checked[name].data_digest for name in SPLITS},
        quarantine=quarantine,
        prompt_ids={name: ids for name in SPLITS if (ids := checked[name].prompt_ids) is not None},
        tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def source_digests(contract: TaskContract, roots: list[str | Path]) -> dict[str, str]:
    """File name below its data root -> sha256, for every file of the contract; no row is read. Raises as `ingest`."""
    return source_files(contract, roots)[1]


def _verdict(contract: TaskContract, checked: dict[str, CheckedSplit]) -> Verdict:
    """The counts of every split against the contract's limits; `checked` in the order of the right to a text."""
    leaks: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for name, split in checked.items():
        leaks |= {f"{name} in {other}": number for other, number in split.leaks.items()}
        for code, places in split.examples.items():
            examples[code] = (examples.get(code, []) + places)[:NUM_EXAMPLES]
    return judge(contract, {name: checked[name].counts for name in SPLITS}, leaks, examples)

"""From a contract and its files to clean rows: read, check, quarantine, and count so that nothing gets lost."""

import io
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.checks import check_values, column_of, counts, mark, repeats, shared_with
from data_contracts.contract import SPLITS, TaskContract, TrainShare
from data_contracts.readers import Role, open_file, read_records
from data_contracts.sources import resolve_source, source_name
from data_contracts.verdict import DataRejected, SplitCounts, TokenLengths, Verdict, judge
from pipeline.data.prompts import CLEAN_COLUMNS, rendered
from pipeline.data.token_limits import TokenCounter, fit
from pipeline.files import canonical_json, sha256_text, write_atomic

_NUM_EXAMPLES = 3
# Judged splits keep a shared text; the later one in this order loses it.
_PRIORITY = ("test", "validation", "train")


@dataclass(frozen=True)
class CleanTask:
    """A task's data after its contract was applied."""

    contract: TaskContract
    splits: dict[
        str, pa.Table
    ]  # train, validation, test -> columns row_id, text, prompt, answer, row_sha256 (all strings)
    verdict: Verdict
    file_digests: dict[str, str]  # file name below its data root -> sha256
    data_digests: dict[str, str]  # split -> sha256 over its row_sha256 in order
    quarantine: Path | None  # None: no row was rejected, or no folder was given


@dataclass(frozen=True)
class _Rows:
    """Rows of one split on their way, one entry per row read."""

    table: pa.Table  # the contract's data columns as strings
    files: pa.ChunkedArray  # file name
    lines: np.ndarray
    reasons: pa.ChunkedArray
    unreadable: dict[int, str]  # row -> digest of its bytes

    def only(self, mask: np.ndarray) -> "_Rows":
        """The rows where mask is True, in order."""
        keep = pa.array(mask)
        place = np.cumsum(mask) - 1
        moved = {int(place[row]): digest for row, digest in self.unreadable.items() if mask[row]}
        return _Rows(
            self.table.filter(keep), self.files.filter(keep), self.lines[mask], self.reasons.filter(keep), moved
        )


@dataclass(frozen=True)
class _Checked:
    """One split after the checks of its own."""

    rows: _Rows
    prompts: pa.ChunkedArray  # null where the row is rejected
    keys: pa.ChunkedArray  # digest of the normalised prompt; null where the row is rejected
    tokens: np.ndarray | None
    cut: np.ndarray
    warned: dict[str, pa.ChunkedArray]  # rule code -> True where a rule of severity warn is broken


def ingest(
    contract: TaskContract, roots: list[str | Path], *, tokenizer=None, quarantine_dir: Path | None = None
) -> CleanTask:
    """Read and check a task's data; the quarantine is written before the verdict is acted upon.

    Args:
        contract: the task's contract.
        roots: allowed folders and URI prefixes; the contract's files must lie below them.
        tokenizer: a Hugging Face fast tokenizer, or None: token limits are then not checked.
        quarantine_dir: rejected rows go to `<quarantine_dir>/<task>/<digest of contract and files>.parquet` (file,
            line, split, reason, row_sha256; never the text).

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
    raw, file_digests = _read_splits(contract, roots)
    checked = {name: _check_split(contract, raw[name], counter) for name in SPLITS}
    checked, leaks = _remove_leaks(checked)
    splits = {name: _clean_table(contract, name, checked[name]) for name in SPLITS}
    verdict = _verdict(contract, checked, splits, leaks)
    quarantine = None
    if quarantine_dir is not None and verdict.kept < verdict.rows_in:
        digest = sha256_text(canonical_json({"contract": contract.digest, "files": file_digests}))
        quarantine = Path(quarantine_dir) / contract.task / f"{digest}.parquet"
        _write_quarantine(quarantine, checked)
    data_digests = {name: _digest_of(table.column("row_sha256").to_pylist()) for name, table in splits.items()}
    return CleanTask(contract, splits, verdict, file_digests, data_digests, quarantine)


def source_digests(contract: TaskContract, roots: list[str | Path]) -> dict[str, str]:
    """File name below its data root -> sha256, for every file of the contract; no row is read. Raises as `ingest`."""
    return _source_files(contract, roots)[1]


def _source_files(
    contract: TaskContract, roots: list[str | Path]
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, str]]:
    """(path, name) of the files of every split that has its own, and the digest of each name."""
    files: dict[str, list[tuple[str, str]]] = {}
    digests: dict[str, str] = {}
    for split in SPLITS:
        source = getattr(contract.source, split)
        if isinstance(source, TrainShare):
            continue
        files[split] = []
        for path in dict.fromkeys(path for pattern in source for path in resolve_source(pattern, roots)):
            with open_file(path) as file:
                digest = file_digest(file, "sha256").hexdigest()
            name = source_name(path, roots)
            if digests.setdefault(name, digest) != digest:
                name = path  # two roots hold different files of the same name
                digests[name] = digest
            files[split].append((path, name))
    return files, digests


def _read_splits(contract: TaskContract, roots: list[str | Path]) -> tuple[dict[str, _Rows], dict[str, str]]:
    """Every split's rows and the digest of every file read."""
    files, digests = _source_files(contract, roots)
    splits = {split: _read_files(contract, named) for split, named in files.items()}
    sources = {split: getattr(contract.source, split) for split in SPLITS}
    shares = {split: source.fraction for split, source in sources.items() if isinstance(source, TrainShare)}
    if shares:
        splits |= _share_out(contract, splits["train"], shares)
    return splits, digests


def _read_files(contract: TaskContract, files: list[tuple[str, str]]) -> _Rows:
    roles: dict[str, Role] = dict.fromkeys(contract.data_columns, "value")
    keys = [name for name in (contract.columns.id, contract.columns.answer) if name is not None]
    roles |= dict.fromkeys(keys, "key") | {contract.columns.text: "text"}
    parts: list[_Rows] = []
    start = 0
    for path, name in files:
        records = read_records(path, contract.source.format, roles)
        rows = len(records.lines)
        moved = {start + row: digest for row, digest in records.unreadable.items()}
        parts.append(_Rows(records.table, column_of([name] * rows), records.lines, records.reasons, moved))
        start += rows
    return _Rows(
        pa.concat_tables([part.table for part in parts]),
        pa.chunked_array([chunk for part in parts for chunk in part.files.chunks], pa.string()),
        np.concatenate([part.lines for part in parts]),
        pa.chunked_array([chunk for part in parts for chunk in part.reasons.chunks], pa.string()),
        {row: digest for part in parts for row, digest in part.unreadable.items()},
    )


def _share_out(contract: TaskContract, train: _Rows, shares: dict[str, float]) -> dict[str, _Rows]:
    """Cut train by a hash of the text alone: stable under reordering, new rows and a new prompt."""
    texts = train.table.column(contract.columns.text).to_pylist()
    place = np.array([1.0 if text is None else int(_key(text)[:13], 16) / 16**13 for text in texts])
    taken = np.zeros(len(texts), dtype=bool)
    splits: dict[str, _Rows] = {}
    low = 0.0
    for name in ("test", "validation"):  # test first: the validation share does not move it
        if name in shares:
            chosen = (place >= low) & (place < low + shares[name])
            low += shares[name]
            taken |= chosen
            splits[name] = train.only(chosen)
    return splits | {"train": train.only(~taken)}


def _check_split(contract: TaskContract, rows: _Rows, counter: TokenCounter | None) -> _Checked:
    """All checks that need one split only; the token limits come before duplicates, since cutting may make some."""
    reasons, warned = check_values(contract, rows.table, rows.reasons)
    good = pc.is_null(reasons).to_numpy()
    places = np.flatnonzero(good)
    kept = rows.table.filter(pa.array(good))
    cut = np.zeros(len(good), dtype=bool)
    tokens = None
    if counter is None:
        prompts = rendered(contract.prompt, kept).to_pylist()
    else:
        values = kept.column(contract.columns.answer).to_pylist()
        texts = values if contract.labels is None else [contract.labels[value] for value in values]
        fitted = fit(contract, kept, texts, counter)
        prompts = fitted.prompts
        too_long = np.zeros(len(good), dtype=bool)
        too_long[places[~fitted.fits]] = True
        reasons = mark(reasons, pa.chunked_array([pa.array(too_long)]), "too_long")
        cut[places] = fitted.cut
        tokens = np.zeros(len(good), dtype=np.int64)
        tokens[places] = fitted.tokens
    keys: list[str | None] = [None] * len(good)
    filled: list[str | None] = [None] * len(good)
    for place, prompt in zip(places.tolist(), prompts, strict=True):
        keys[place], filled[place] = _key(prompt), prompt
    key_column = column_of(keys)
    if contract.columns.id is not None:
        reasons = mark(reasons, repeats(rows.table.column(contract.columns.id), reasons), "duplicate_id")
    reasons = mark(reasons, repeats(key_column, reasons), "duplicate_text")
    return _Checked(replace(rows, reasons=reasons), column_of(filled), key_column, tokens, cut, warned)


def _remove_leaks(checked: dict[str, _Checked]) -> tuple[dict[str, _Checked], dict[str, int]]:
    """Mark rows whose text a split of higher priority keeps, and count them by pair of splits."""
    done: dict[str, _Checked] = {}
    leaks: dict[str, int] = {}
    for name in _PRIORITY:
        split = checked[name]
        reasons = split.rows.reasons
        for winner, other in done.items():
            shared = shared_with(split.keys, reasons, other.keys, other.rows.reasons)
            number = pc.sum(shared).as_py() or 0
            if number:
                leaks[f"{name} in {winner}"] = number
                reasons = mark(reasons, shared, "leak")
        done[name] = replace(split, rows=replace(split.rows, reasons=reasons))
    return done, leaks


def _clean_table(contract: TaskContract, split: str, checked: _Checked) -> pa.Table:
    good = pc.is_null(checked.rows.reasons)
    rows = checked.rows.table.filter(good)
    if contract.columns.id is not None:
        ids = rows.column(contract.columns.id).to_pylist()
    else:
        ids = [f"{split}-{place + 1}" for place in np.flatnonzero(good.to_numpy())]
    prompts = checked.prompts.filter(good).to_pylist()
    answers = rows.column(contract.columns.answer).to_pylist()
    digests = [sha256_text(canonical_json(list(row))) for row in zip(ids, prompts, answers, strict=True)]
    values = (ids, rows.column(contract.columns.text).to_pylist(), prompts, answers, digests)
    return pa.table({name: pa.array(v, pa.string()) for name, v in zip(CLEAN_COLUMNS, values, strict=True)})


def _verdict(
    contract: TaskContract, checked: dict[str, _Checked], splits: dict[str, pa.Table], leaks: dict[str, int]
) -> Verdict:
    per_split = {name: _split_counts(contract, checked[name], splits[name]) for name in SPLITS}
    return judge(contract, per_split, leaks, _examples(checked))


def _split_counts(contract: TaskContract, checked: _Checked, clean: pa.Table) -> SplitCounts:
    kept = pc.is_null(checked.rows.reasons)
    good = kept.to_numpy()
    warned = {code: pc.sum(pc.and_(kept, hit)).as_py() or 0 for code, hit in checked.warned.items()}
    labels = {}
    if contract.labels is not None:
        seen = counts(clean.column("answer"))
        labels = {label: seen.get(label, 0) for label in contract.labels}
    tokens = None
    if checked.tokens is not None and good.any():
        low, median, p95, high = np.percentile(checked.tokens[good], [0, 50, 95, 100], method="higher").tolist()
        tokens = TokenLengths(int(low), int(median), int(p95), int(high))
    return SplitCounts(
        rows_in=len(good),
        kept=clean.num_rows,
        rejected=counts(checked.rows.reasons),
        warned={code: number for code, number in warned.items() if number},
        truncated=int((checked.cut & good).sum()),
        labels=labels,
        tokens=tokens,
    )


def _examples(checked: dict[str, _Checked]) -> dict[str, list[str]]:
    """The first places of each reason, as `file line n`."""
    examples: dict[str, list[str]] = {}
    for split in checked.values():
        for code in counts(split.rows.reasons):
            found = np.flatnonzero(pc.equal(split.rows.reasons, code).fill_null(False).to_numpy())[:_NUM_EXAMPLES]
            places = [f"{split.rows.files[int(row)]} line {split.rows.lines[row]}" for row in found]
            examples[code] = (examples.get(code, []) + places)[:_NUM_EXAMPLES]
    return examples


def _write_quarantine(path: Path, checked: dict[str, _Checked]) -> None:
    """Where every rejected row stands, why it was rejected, and the digest of its values as they are in the file."""
    parts = []
    for name in SPLITS:
        rows = checked[name].rows
        bad = pc.is_valid(rows.reasons)
        places = np.flatnonzero(bad.to_numpy()).tolist()
        values = rows.table.filter(bad).to_pylist()
        digests = [
            rows.unreadable.get(place) or sha256_text(canonical_json(list(row.values())))
            for place, row in zip(places, values, strict=True)
        ]
        parts.append(
            pa.table(
                {
                    "file": rows.files.filter(bad),
                    "line": pa.array(rows.lines[places], pa.int64()),
                    "split": pa.array([name] * len(places), pa.string()),
                    "reason": rows.reasons.filter(bad),
                    "row_sha256": pa.array(digests, pa.string()),
                }
            )
        )
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables(parts), buffer)
    write_atomic(path, buffer.getvalue())


def _key(text: str) -> str:
    """Digest of a text with case folded and white space collapsed: equal texts for duplicates and leaks."""
    return sha256(" ".join(text.split()).casefold().encode("utf-8")).hexdigest()


def _digest_of(row_digests: list[str]) -> str:
    total = sha256()
    for digest in row_digests:
        total.update(bytes.fromhex(digest))
    return total.hexdigest()

"""One pass over one split: every check, in batches, with counts that add up and memory that the rows do not fill."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import compress
from json.encoder import encode_basestring
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.checks import check_values, counts, mark
from data_contracts.contract import TaskContract
from data_contracts.verdict import SplitCounts, TokenLengths
from pipeline.data.prompts import CLEAN_COLUMNS, rendered
from pipeline.data.raw_rows import RawRows
from pipeline.data.seen import SeenHashes, folded, text_hashes
from pipeline.data.spool import Spool
from pipeline.data.token_limits import TokenCounter, fit
from pipeline.watch.rank import report

NUM_EXAMPLES = 3
_CLEAN = pa.schema([(name, pa.string()) for name in CLEAN_COLUMNS])
_PROMPT_IDS = pa.schema([("prompt_ids", pa.list_(pa.int32()))])
_QUARANTINE = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("split", pa.string()),
        ("reason", pa.string()),
        ("row_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class CheckedSplit:
    """One split after its checks."""

    counts: SplitCounts
    clean: pa.Table  # memory-mapped; columns CLEAN_COLUMNS
    prompt_ids: pa.ChunkedArray | None  # memory-mapped; the clean prompts' token ids; None: no tokenizer was given
    quarantine: pa.Table  # memory-mapped; file, line, split, reason, row_sha256
    data_digest: str  # sha256 over the clean rows' digests in order
    examples: dict[str, list[str]]  # reason code -> first places, "file line n"
    leaks: dict[str, int]  # split -> rows left out because that split has their text
    texts: SeenHashes  # of every row that no check of its own split rejected


def check_split(
    contract: TaskContract,
    split: str,
    batches: Iterable[RawRows],
    counter: TokenCounter | None,
    judged: dict[str, SeenHashes],
    folder: Path | None,
) -> CheckedSplit:
    """Check a split's rows in their order.

    Args:
        batches: all rows of the split.
        counter: None: token limits are not checked.
        judged: the texts of the splits that keep a text they share with this one, in the order of that right.
        folder: where the results lie on disk; None: the folder for temporary files.
    """
    checks = _SplitChecks(contract, split, counter, judged, folder)
    for left in _one_ahead(checks.row_by_row, batches):
        report()
        checks.check(left)
    return checks.result()


def _one_ahead(check: Callable[[RawRows], "_Left"], batches: Iterable[RawRows]) -> Iterator["_Left"]:
    """`check` of each batch in order, the next one computed in a thread meanwhile: most of its time is Arrow's and the
    tokenizer's, which do not hold the interpreter.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: Future[_Left] | None = None
        for rows in batches:
            done, pending = pending, pool.submit(check, rows)
            if done is not None:
                yield done.result()
        if pending is not None:
            yield pending.result()


class _SplitChecks:
    """What is carried from batch to batch: 16 bytes a row for its id and 16 for its text, the rest of fixed size."""

    def __init__(
        self,
        contract: TaskContract,
        split: str,
        counter: TokenCounter | None,
        judged: dict[str, SeenHashes],
        folder: Path | None,
    ) -> None:
        self.contract, self.split, self.counter, self.judged = contract, split, counter, judged
        self.ids, self.texts = SeenHashes(), SeenHashes()
        self.clean, self.quarantine = Spool(_CLEAN, folder), Spool(_QUARANTINE, folder)
        self.prompt_ids = None if counter is None else Spool(_PROMPT_IDS, folder)
        self.rows_in = self.kept = self.truncated = 0
        self.rejected: Counter[str] = Counter()
        self.warned: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.leaks: Counter[str] = Counter()
        self.lengths = np.zeros(contract.limits.max_tokens + 1, dtype=np.int64)  # kept rows by number of tokens
        self.examples: dict[str, list[str]] = {}
        self.digest = sha256()

    def row_by_row(self, rows: RawRows) -> "_Left":
        """The checks of a row by itself; changes nothing here. The token limits are the last of them: a row that breaks
        another has no prompt to count.
        """
        reasons, warned = check_values(self.contract, rows.table, rows.reasons)
        good = pc.is_null(reasons)
        table, places = rows.table.filter(good), np.flatnonzero(good.to_numpy())
        if self.counter is None:
            prompts = rendered(self.contract.prompt, table).to_pylist()
            nothing = np.zeros(len(places), dtype=np.int64)
            return _Left(rows, reasons, warned, places, table, prompts, None, nothing, nothing.astype(bool))
        answers = table.column(self.contract.columns.answer).to_pylist()
        texts = answers if self.contract.labels is None else [self.contract.labels[name] for name in answers]
        fitted = fit(self.contract, table, texts, self.counter)
        left = _Left(rows, reasons, warned, places, table, fitted.prompts, fitted.prompt_ids, fitted.tokens, fitted.cut)
        left.drop(~fitted.fits, "too_long")
        return left

    def check(self, left: "_Left") -> None:
        """The checks of a row against the rows before it, in their order; cutting may have made duplicates."""
        if self.contract.columns.id is not None:
            ids = left.table.column(self.contract.columns.id).to_pylist()
            left.drop(self.ids.add(text_hashes(ids)), "duplicate_id")
        hashes = text_hashes([folded(prompt) for prompt in left.prompts])
        repeated = self.texts.add(hashes)
        left.drop(repeated, "duplicate_text")
        hashes = hashes[~repeated]
        for other, texts in self.judged.items():
            shared = texts.contains(hashes)
            left.drop(shared, "leak")
            hashes = hashes[~shared]
            self.leaks[other] += int(shared.sum())
        kept = pc.is_null(left.reasons)
        for code, hit in left.warned.items():
            self.warned[code] += pc.sum(pc.and_(kept, hit)).as_py() or 0
        self.truncated += int(left.cut.sum())
        self.lengths += np.bincount(left.tokens, minlength=len(self.lengths))
        self._keep(left)
        self._reject(left.rows, left.reasons)
        self.rows_in += len(left.rows.lines)

    def result(self) -> CheckedSplit:
        """The counts, once every row is checked."""
        labels = {label: self.labels[label] for label in self.contract.labels or ()}
        return CheckedSplit(
            counts=SplitCounts(
                rows_in=self.rows_in,
                kept=self.kept,
                rejected=dict(sorted(self.rejected.items())),
                warned={code: number for code, number in self.warned.items() if number},
                truncated=self.truncated,
                labels=labels,
                tokens=None if self.counter is None else _token_lengths(self.lengths),
            ),
            clean=self.clean.table(),
            prompt_ids=None if self.prompt_ids is None else self.prompt_ids.table().column("prompt_ids"),
            quarantine=self.quarantine.table(),
            data_digest=self.digest.hexdigest(),
            examples=dict(sorted(self.examples.items())),
            leaks={other: number for other, number in self.leaks.items() if number},
            texts=self.texts,
        )

    def _keep(self, left: "_Left") -> None:
        names = self.contract.columns
        if names.id is not None:
            ids = left.table.column(names.id).to_pylist()
        else:
            ids = [f"{self.split}-{number}" for number in (self.rows_in + 1 + left.places).tolist()]
        answers = left.table.column(names.answer).to_pylist()
        digests = row_digests([ids, left.prompts, answers])
        self.digest.update(b"".join(digests))
        self.labels.update(answers if self.contract.labels is not None else ())
        self.kept += len(ids)
        texts = left.table.column(names.text)
        self.clean.write(pa.table([ids, texts, left.prompts, answers, _hex(digests)], schema=_CLEAN))
        if self.prompt_ids is not None:
            self.prompt_ids.write(pa.table([left.prompt_ids], schema=_PROMPT_IDS))

    def _reject(self, rows: RawRows, reasons: pa.ChunkedArray) -> None:
        """Where every rejected row stands, why it was rejected, and the digest of its values as the file has them."""
        bad = pc.is_valid(reasons)
        places = np.flatnonzero(bad.to_numpy())
        if not len(places):
            return
        values = [column.to_pylist() for column in rows.table.filter(bad).columns]
        digests = pc.coalesce(rows.unreadable.filter(bad), pa.array(_hex(row_digests(values)), pa.string()))
        files, codes, lines = rows.files.filter(bad), reasons.filter(bad), rows.lines[places]
        table = pa.table([files, lines, [self.split] * len(places), codes, digests], schema=_QUARANTINE)
        self.quarantine.write(table)
        for code, number in counts(codes).items():
            self.rejected[code] += number
            known = self.examples.setdefault(code, [])
            first = table.filter(pc.equal(codes, code)).slice(0, NUM_EXAMPLES - len(known)).to_pylist()
            known += [f"{row['file']} line {row['line']}" for row in first]


@dataclass
class _Left:
    """A batch, and those of its rows that no check has rejected so far."""

    rows: RawRows  # the batch
    reasons: pa.ChunkedArray  # of every row of the batch
    warned: dict[str, pa.ChunkedArray]  # rule code -> True where a rule of severity warn is broken, of the batch
    places: np.ndarray  # of the rows left, in the batch
    table: pa.Table  # the contract's data columns of the rows left
    prompts: list[str]
    prompt_ids: pa.ChunkedArray | None
    tokens: np.ndarray  # prompt + answer + end of answer; 0 where they are not counted
    cut: np.ndarray  # bool

    def drop(self, hit: np.ndarray, code: str) -> None:
        """Reject the rows left where `hit` is True."""
        if not hit.any():
            return
        failed = np.zeros(len(self.reasons), dtype=bool)
        failed[self.places[hit]] = True
        self.reasons = mark(self.reasons, pa.chunked_array([pa.array(failed)]), code)
        stays = ~hit
        self.places, self.tokens, self.cut = self.places[stays], self.tokens[stays], self.cut[stays]
        self.table = self.table.filter(pa.array(stays))
        self.prompts = list(compress(self.prompts, stays))
        if self.prompt_ids is not None:
            self.prompt_ids = self.prompt_ids.filter(pa.array(stays))


def row_digests(columns: list[list[str | None]]) -> list[bytes]:
    """sha256 of each row's values as canonical JSON: `["a","b",null]`."""
    quoted = [["null" if value is None else encode_basestring(value) for value in column] for column in columns]
    return [sha256(f"[{','.join(row)}]".encode()).digest() for row in zip(*quoted, strict=True)]


def _hex(digests: list[bytes]) -> list[str]:
    return [digest.hex() for digest in digests]


def _token_lengths(rows: np.ndarray) -> TokenLengths | None:
    """Percentiles (the row's own length, the higher of two) from the number of rows of each length."""
    if not (total := int(rows.sum())):
        return None
    ranks = np.ceil((total - 1) * np.array([0, 0.5, 0.95, 1])).astype(np.int64)
    low, median, p95, high = np.searchsorted(np.cumsum(rows), ranks, side="right").tolist()
    return TokenLengths(low, median, p95, high)

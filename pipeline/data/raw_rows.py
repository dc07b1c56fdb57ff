"""A contract's files, read in batches onto disk: one spool a split, with the place every row came from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_contracts import readers
from data_contracts.contract import SPLITS, TaskContract, TrainShare
from data_contracts.sources import resolve_source, source_name
from pipeline.data.seen import folded
from pipeline.data.spool import Spool

# Rows are checked in pieces of about this size at most, so that long texts do not fill the memory either.
PIECE_BYTES = 1 << 22
# Beside the contract's columns: file name, line, the reader's reason, digest of the bytes of a row that is no record.
_PLACE = (("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("unreadable_sha256", pa.string()))


@dataclass(frozen=True)
class RawRows:
    """Some rows of a split as they were read."""

    table: pa.Table  # the contract's data columns as strings
    files: pa.ChunkedArray  # file name
    lines: np.ndarray
    reasons: pa.ChunkedArray
    unreadable: pa.ChunkedArray  # sha256 of the bytes of a row that is no record, null for the others


class RawSplit:
    """The rows of one split on disk, in order."""

    def __init__(self, contract: TaskContract, folder: Path | None) -> None:
        self._names = contract.data_columns
        fields = [(name, pa.string()) for name in self._names]
        self._spool = Spool(pa.schema([*fields, *_PLACE]), folder)

    def write(self, table: pa.Table) -> None:
        """Append rows: the contract's columns and their places."""
        rows = max(1, math.ceil(table.num_rows / math.ceil(max(1, table.nbytes) / PIECE_BYTES)))
        for start in range(0, table.num_rows, rows):
            self._spool.write(table.slice(start, rows))

    def batches(self) -> Iterator[RawRows]:
        """The rows, some at a time, once."""
        for table in self._spool.batches():
            files, lines, reasons, unreadable = table.columns[len(self._names) :]
            data = table.select(range(len(self._names)))
            yield RawRows(data, files, lines.to_numpy(), reasons, unreadable)


def source_files(
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
            with readers.open_file(path) as file:
                digest = file_digest(file, "sha256").hexdigest()
            name = source_name(path, roots)
            if digests.setdefault(name, digest) != digest:
                name = path  # two roots hold different files of the same name
                digests[name] = digest
            files[split].append((path, name))
    return files, digests


def read_splits(
    contract: TaskContract, roots: list[str | Path], folder: Path | None
) -> tuple[dict[str, RawSplit], dict[str, str]]:
    """Every split's rows, put on disk in `folder`, and the digest of every file read. Raises UserError for a file that
    cannot be read.
    """
    files, digests = source_files(contract, roots)
    sources = {split: getattr(contract.source, split) for split in SPLITS}
    shares = {split: source.fraction for split, source in sources.items() if isinstance(source, TrainShare)}
    splits = {split: RawSplit(contract, folder) for split in SPLITS}
    keys = [name for name in (contract.columns.id, contract.columns.answer) if name is not None]
    roles: dict[str, readers.Role] = dict.fromkeys(contract.data_columns, "value")
    roles |= dict.fromkeys(keys, "key") | {contract.columns.text: "text"}
    for split, named in files.items():
        for path, name in named:
            for records in readers.read_batches(path, contract.source.format, roles, readers.BATCH_ROWS):
                table = _with_places(records, name)
                if split == "train" and shares:
                    for owner, chosen in _owners(records.table.column(contract.columns.text), shares).items():
                        splits[owner].write(table.filter(pa.array(chosen)))
                else:
                    splits[split].write(table)
            pa.default_memory_pool().release_unused()  # what the file's batches took is not needed by the checks
    return splits, digests


def _with_places(records: readers.Records, name: str) -> pa.Table:
    rows = len(records.lines)
    if records.unreadable:
        unreadable = pa.array([records.unreadable.get(row) for row in range(rows)], pa.string())
    else:
        unreadable = pa.nulls(rows, pa.string())
    places = (pa.repeat(name, rows), pa.array(records.lines), records.reasons.combine_chunks(), unreadable)
    columns = [column.combine_chunks() for column in records.table.columns]
    names = [*records.table.column_names, *(name for name, _ in _PLACE)]
    return pa.Table.from_arrays([*columns, *places], names=names)


def _owners(texts: pa.ChunkedArray, shares: dict[str, float]) -> dict[str, np.ndarray]:
    """Cut train by a hash of the text alone: stable under reordering, new rows and a new prompt. A row without a text
    stays in train.
    """
    values = texts.to_pylist()
    digests = b"".join([b"" if text is None else sha256(folded(text).encode()).digest()[:8] for text in values])
    place = np.ones(len(values))
    hashed = np.frombuffer(digests, dtype=">u8") >> np.uint64(12)  # 52 bits, which a float holds exactly
    place[np.array([text is not None for text in values], dtype=bool)] = hashed / 2.0**52
    owners: dict[str, np.ndarray] = {}
    low = 0.0
    for name in ("test", "validation"):  # test first: the validation share does not move it
        if name in shares:
            owners[name] = (place >= low) & (place < low + shares[name])
            low += shares[name]
    return owners | {"train": ~np.any(list(owners.values()), axis=0)}

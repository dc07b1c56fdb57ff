"""Rows out of parquet, JSON-lines and CSV files, as text columns with the line they stand on.

A row that cannot be read as a record is kept as a row with a reason, so that rows in = kept + quarantined.
"""

import csv
import io
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_contracts.checks import column_of, mark, no_reasons
from data_contracts.errors import UserError
from data_contracts.remote import remote_errors, told
from pipeline.files import sha256_bytes

# Rows read, checked and written at a time.
BATCH_ROWS = 65_536
# Bytes of a parquet column read at a time: without a limit it is a whole row group, often a million rows.
_READ_BYTES = 1 << 20
# What a column may hold: text only; names (text, whole numbers, true/false); anything that prints as one value.
Role = Literal["text", "key", "value"]


@dataclass(frozen=True)
class Records:
    """The rows of a file, or some of them that follow one another."""

    table: pa.Table  # the asked columns as strings
    lines: np.ndarray  # where each row begins, from 1; in parquet the row number
    reasons: pa.ChunkedArray  # malformed, invalid_utf8, wrong_type, or null
    unreadable: dict[int, str]  # row index -> sha256 of its bytes, for rows that are no record at all


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A local file or an fsspec URI, for reading bytes. Raises UserError naming the file if it cannot be opened, or a
    remote one cannot be read to its end.
    """
    try:
        file = fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")  # noqa: SIM115
    except remote_errors() as error:
        raise UserError(f"{path} cannot be opened ({told(error)}); check the file and its access") from None
    with file:
        try:
            yield file
        except remote_errors() as error:
            if "://" not in path:
                raise
            raise UserError(f"{path} cannot be read ({told(error)}); check the network, then run again") from None


def read_records(path: str, file_format: str, roles: dict[str, Role]) -> Records:
    """Read the columns named in `roles`. Raises UserError naming the file if it is unreadable or lacks a column."""
    (records,) = read_batches(path, file_format, roles, None)
    return records


def read_batches(path: str, file_format: str, roles: Mapping[str, Role], num_rows: int | None) -> Iterator[Records]:
    """As `read_records`, at most `num_rows` rows at a time (None: the whole file at once); at least one batch, which
    may be empty. Raises as `read_records`, for a fault that shows late in the file after the rows before it.
    """
    with open_file(path) as file, closing(_parts(path, file, file_format, list(roles), num_rows)) as parts:
        for part in parts:
            columns, lines, reasons, unreadable = _with_reasons(part)
            texts = {}
            for name, role in roles.items():
                texts[name], wrong, undecodable = as_text(columns[name], role)
                reasons = mark(reasons, undecodable, "invalid_utf8")
                reasons = mark(reasons, wrong, "wrong_type")
            yield Records(pa.table(texts), lines, reasons, unreadable)


def raw_columns(
    path: str, file: BinaryIO, file_format: str, names: list[str] | None
) -> tuple[dict[str, Any], np.ndarray, pa.ChunkedArray, dict[int, str]]:
    """Columns as the file holds them (Arrow columns from parquet, lists from JSON lines and CSV); all if names is None.

    Returns:
        columns, line numbers, reasons (malformed, invalid_utf8), digests of the rows that are no records.
    """
    (part,) = _parts(path, file, file_format, names, None)
    return _with_reasons(part)


@dataclass
class _Part:
    """Rows that follow one another, as their file holds them."""

    columns: dict[str, Any]
    lines: list[int] | range
    bad: dict[int, tuple[str, bytes]]  # row -> reason code and bytes of what is no record


def _parts(
    path: str, file: BinaryIO, file_format: str, names: list[str] | None, num_rows: int | None
) -> Generator[_Part]:
    read = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv}[file_format]
    return read(path, file, names, num_rows)


def _with_reasons(part: _Part) -> tuple[dict[str, Any], np.ndarray, pa.ChunkedArray, dict[int, str]]:
    codes: list[str | None] = [None] * len(part.lines)
    for row, (code, _) in part.bad.items():
        codes[row] = code
    digests = {row: sha256_bytes(content) for row, (_, content) in part.bad.items()}
    reasons = column_of(codes) if part.bad else no_reasons(len(part.lines))
    return part.columns, np.asarray(part.lines, dtype=np.int64), reasons, digests


def as_text(values: Any, role: Role) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    """A raw column as text, True where the type does not suit the role, True where the text is not UTF-8."""
    if isinstance(values, list):
        return _list_as_text(values, role)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    nothing = _constant(False, len(values))
    if _is_text(kind) or _is_bytes(kind):
        text, undecodable = _decoded(values)
        return text, nothing, undecodable
    suits = pa.types.is_null(kind)
    suits |= role != "text" and (pa.types.is_integer(kind) or pa.types.is_boolean(kind))
    suits |= role == "value" and (pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_temporal(kind))
    try:
        text = values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        text = pa.chunked_array([pa.nulls(len(values), pa.string())])
    return text, nothing if suits else pc.is_valid(values), nothing


def _parquet(path: str, file: BinaryIO, names: list[str] | None, num_rows: int | None) -> Generator[_Part]:
    try:
        parquet = pq.ParquetFile(file, buffer_size=_READ_BYTES)
        present = parquet.schema_arrow.names
        _require(path, names, present)
        wanted = names if names is not None else list(dict.fromkeys(present))
        if num_rows is None or not parquet.metadata.num_rows:
            tables = iter([parquet.read(columns=names)])
        else:
            batches = parquet.iter_batches(num_rows, columns=names)
            tables = (pa.Table.from_batches([batch]) for batch in batches)
        start = 1
        while (table := next(tables, None)) is not None:
            lines = range(start, start := start + table.num_rows)
            yield _Part({name: table.column(name) for name in wanted}, lines, {})
    except (pa.ArrowException, OSError) as error:
        if _is_remote_failure(path, error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable parquet file ({first_line}); write it again") from None


def _is_remote_failure(path: str, error: Exception) -> bool:
    """Whether reading behind a URI failed, and not what was read; pyarrow calls a broken file an OSError too."""
    passing = isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", None) is not None
    return "://" in path and passing


def _jsonl(path: str, file: BinaryIO, names: list[str] | None, num_rows: int | None) -> Generator[_Part]:
    records: list[dict] = []
    lines: list[int] = []
    bad: dict[int, tuple[str, bytes]] = {}
    present: dict[str, None] = {}
    readable = unreadable = False

    def part() -> _Part:
        wanted = list(present) if names is None else names
        return _Part({name: [record.get(name) for record in records] for name in wanted}, lines, bad)

    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        record: Any = None
        code = "malformed"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            code = "invalid_utf8"
        except (ValueError, RecursionError):
            pass
        if len(records) == num_rows:
            yield part()
            records, lines, bad = [], [], {}
        if isinstance(record, dict):
            readable = True
            present.update(dict.fromkeys(record))
        else:
            unreadable = True
            bad[len(records)] = (code, line)
            record = {}
        records.append(record)
        lines.append(number)
    if unreadable and not readable:
        raise UserError(
            f"{path} is not a readable jsonl file: no line is a JSON object in UTF-8; "
            "check source.format and how the file was saved"
        )
    if records:
        _require(path, names, list(present))
    yield part()


def _csv(path: str, file: BinaryIO, names: list[str] | None, num_rows: int | None) -> Generator[_Part]:
    # Python's csv, for its line numbers and quoted newlines; bytes that are not UTF-8 survive as surrogates.
    stream = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    undecodable: set[int] = set()
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than some documents
    reader = csv.reader(_watched(stream, undecodable), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: dict[int, tuple[str, bytes]] = {}
    try:
        header = next(reader, None)
        if not header or 1 in undecodable:
            raise UserError(f"{path} is not a readable csv file: its first line must name the columns, in UTF-8")
        if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
            raise UserError(f"{path} separates its columns by {other!r}; save it as a csv file with commas")
        _require(path, names, header)
        wanted = names if names is not None else list(dict.fromkeys(header))
        places = {name: header.index(name) for name in wanted}
        before = reader.line_num
        for row in reader:
            first, before = before + 1, reader.line_num
            if not row:
                continue
            code = None
            if undecodable and not undecodable.isdisjoint(range(first, before + 1)):
                code = "invalid_utf8"
            elif len(row) != len(header):
                code = "malformed"
            undecodable.clear()
            if len(rows) == num_rows:
                yield _Part({name: [row[place] for row in rows] for name, place in places.items()}, lines, bad)
                rows, lines, bad = [], [], {}
            if code:
                bad[len(rows)] = (code, "\x1f".join(row).encode("utf-8", "surrogateescape"))
                row = [None] * len(header)
            rows.append(row)
            lines.append(first)
    except (csv.Error, OSError) as error:
        if _is_remote_failure(path, error):
            raise
        raise UserError(f"{path} is not a readable csv file (line {reader.line_num}: {error}); mend it there") from None
    finally:
        stream.detach()
    yield _Part({name: [row[place] for row in rows] for name, place in places.items()}, lines, bad)


def _watched(stream: io.TextIOWrapper, undecodable: set[int]) -> Iterator[str]:
    """The stream's lines; the numbers of those with bytes that are not UTF-8 are noted."""
    for number, line in enumerate(stream, start=1):
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError:
                undecodable.add(number)
        yield line


def _require(path: str, names: list[str] | None, present: list[str]) -> None:
    for name in names or ():
        if name not in present:
            raise UserError(f"{path} has no column {name!r}, which the contract names (it has {', '.join(present)})")
        if present.count(name) > 1:
            raise UserError(f"{path} has the column {name!r} {present.count(name)} times; give each its own name")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _decoded(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Text or bytes as valid text (null where it is not UTF-8), and where it is not. Parquet itself does not check."""
    if values.type == pa.string() and all(map(_is_ascii, values.chunks)):
        return values, _constant(False, len(values))
    try:
        return values.cast(pa.binary()).cast(pa.string()), _constant(False, len(values))
    except pa.ArrowInvalid:
        return _encodable([_or_none(value) for value in values.cast(pa.binary()).to_pylist()])


def _is_ascii(values: pa.StringArray) -> bool:
    _, offsets, data = values.buffers()
    if not len(values) or data is None:
        return True
    ends = np.frombuffer(offsets, dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    content = np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]
    return not len(content) or content.max() < 0x80


def _or_none(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", "surrogateescape")


def _encodable(texts: list[str | None]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Texts without those that hold lone surrogates, and where those stood."""
    wrong = [text is not None and not text.isascii() and _has_surrogate(text) for text in texts]
    kept = [None if bad else text for text, bad in zip(texts, wrong, strict=True)]
    return column_of(kept), column_of(wrong, pa.bool_())


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _list_as_text(values: list, role: Role) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    kinds = set(map(type, values)) - {type(None)}
    nothing = _constant(False, len(values))
    if not kinds <= {str}:
        allowed = {"text": {str}, "key": {str, int, bool}, "value": {str, int, bool, float}}[role] | {type(None)}
        wrong = column_of([type(value) not in allowed for value in values], pa.bool_())
        values = [_value_text(value) for value in values]
    else:
        wrong = nothing
    try:
        return column_of(values), wrong, nothing
    except UnicodeEncodeError:
        text, undecodable = _encodable(values)
        return text, wrong, undecodable


def _value_text(value: Any) -> str | None:
    """A JSON value as the text Arrow prints for it; a list or an object as its JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value)


def _constant(value: bool, length: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(np.full(length, value))])

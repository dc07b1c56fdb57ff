"""The checks on a task's rows, vectorised: every function works on whole Arrow columns and gives a reason code per row.

A reason column is an Arrow string column with one value per row: null for a row that is kept so far, else the code of
the first check it failed. Columns are strings here: the readers have turned every accepted value into its text.
"""

import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.contract import Rule, TaskContract

Column = pa.ChunkedArray

_NUMBER = r"^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*$"


def column_of(values: list, kind: pa.DataType | None = None) -> Column:
    """A Python list as an Arrow column."""
    return pa.chunked_array([pa.array(values, kind or pa.string())])


def no_reasons(num_rows: int) -> Column:
    """A reason column in which every row is kept."""
    return pa.chunked_array([pa.nulls(num_rows, pa.string())])


def mark(reasons: Column, failed: Column, code: str) -> Column:
    """Give `code` to the rows that failed and have no reason yet."""
    marks = _Marks(reasons)
    marks.add(failed, code)
    return marks.reasons()


def counts(reasons: Column) -> dict[str, int]:
    """How many rows have each reason, by code in alphabetical order."""
    found = pc.value_counts(pc.drop_null(reasons)).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(found, key=lambda entry: entry["values"])}


def check_values(contract: TaskContract, table: pa.Table, reasons: Column) -> tuple[Column, dict[str, Column]]:
    """Check every row by itself: nulls, empty text, labels, then the contract's own rules.

    Args:
        table: the contract's data columns, all strings.
        reasons: what the reader already found (wrong_type, invalid_utf8, malformed).

    Returns:
        The reasons, and for each rule of severity `warn` True where a row breaks it.
    """
    columns = contract.columns
    marks = _Marks(reasons)
    needed = [name for name in (columns.id, columns.answer) if name is not None]
    for name in needed:
        marks.add(_blank(table.column(name)), "null")
    for name in contract.prompt_columns:
        marks.add(pc.is_null(table.column(name)), "null")
    marks.add(_blank(table.column(columns.text)), "empty_text")
    if contract.labels is not None:
        known = pc.is_in(table.column(columns.answer), value_set=pa.array(list(contract.labels), pa.string()))
        marks.add(pc.invert(known), "unknown_label")
    for rule in contract.rules:
        if rule.severity == "reject":
            marks.add(broken(rule, table.column(rule.column)), rule.code)
    warned: dict[str, Column] = {}
    for rule in contract.rules:
        if rule.severity == "warn":
            hit = broken(rule, table.column(rule.column))
            warned[rule.code] = pc.or_(warned[rule.code], hit) if rule.code in warned else hit
    return marks.reasons(), warned


def broken(rule: Rule, values: Column) -> Column:
    """True where a value breaks the rule. A missing value breaks every rule, a text that is no number min and max."""
    if rule.check == "min_length":
        fine = _has_characters(values, rule.value)
    elif rule.check == "max_length":
        fine = pc.invert(_has_characters(values, rule.value + 1))
    elif rule.check == "regex":
        fine = pc.match_substring_regex(values, pattern=rule.value)
    elif rule.check == "allowed_values":
        fine = pc.is_in(values, value_set=pa.array([_as_text(value) for value in rule.value], pa.string()))
    else:
        compare = pc.greater_equal if rule.check == "min_value" else pc.less_equal
        fine = compare(_numbers(values), float(rule.value))
    return pc.or_kleene(pc.is_null(fine), pc.invert(fine))


class _Marks:
    """Reasons on their way: a number for each row that failed, and the codes' texts only once at the end."""

    def __init__(self, reasons: Column) -> None:
        self._known = reasons
        self._free = pc.is_null(reasons)
        self._codes: list[str] = []
        self._found = pa.chunked_array([pa.nulls(len(reasons), pa.int32())])

    def add(self, failed: Column, code: str) -> None:
        """Give `code` to the rows that failed and have no reason yet."""
        hit = pc.and_(self._free, pc.fill_null(failed, False) if failed.null_count else failed)
        if pc.any(hit).as_py():
            self._found = pc.if_else(hit, pa.scalar(len(self._codes), pa.int32()), self._found)
            self._codes.append(code)
            self._free = pc.and_not(self._free, hit)

    def reasons(self) -> Column:
        """The reason column."""
        if not self._codes:
            return self._known
        found = pa.chunked_array([pa.array(self._codes, pa.string()).take(chunk) for chunk in self._found.chunks])
        return found if self._known.null_count == len(found) else pc.coalesce(self._known, found)


def _has_characters(values: Column, number: int) -> Column:
    """True where a text has at least `number` characters, which are counted only where its bytes do not tell: one
    character is 1 to 4 bytes.
    """
    num_bytes = pc.binary_length(values)
    enough = pc.greater_equal(num_bytes, _int32(4 * number))
    unsure = pc.and_not(pc.greater_equal(num_bytes, _int32(number)), enough)
    if not pc.any(unsure).as_py():
        return enough
    counted = pc.greater_equal(pc.utf8_length(pc.if_else(unsure, values, "")), number)
    return pc.or_(enough, pc.and_(unsure, counted))


def _int32(number: int) -> pa.Scalar:
    """A length to compare with: no text of a column is as long as the largest."""
    return pa.scalar(min(number, 2**31 - 1), pa.int32())


def _blank(values: Column) -> Column:
    """True for a null and for a text of white space only."""
    nothing = pc.or_(pc.utf8_is_space(values), pc.equal(pc.binary_length(values), _int32(0)))
    return pc.or_kleene(pc.is_null(values), nothing)


def _numbers(values: Column) -> Column:
    """The values as float64, null where a text is no number."""
    is_number = pc.match_substring_regex(values, pattern=_NUMBER)
    text = pc.if_else(is_number, pc.utf8_trim_whitespace(values), pa.scalar(None, pa.string()))
    return pc.cast(text, pa.float64())


def _as_text(value: object) -> str:
    """A rule's scalar written as the readers write a cell (true, 3, 2.5)."""
    if isinstance(value, str):
        return value
    return pc.cast(pa.scalar(value), pa.string()).as_py()

"""The checks on a task's rows, vectorised: every function works on whole Arrow columns and gives a reason code per row.

A reason column is an Arrow string column with one value per row: null for a row that is kept so far, else the code of
the first check it failed. Columns are strings here: the readers have turned every accepted value into its text.
"""

import numpy as np
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
    hit = pc.and_(pc.is_null(reasons), pc.fill_null(failed, False))
    return pc.if_else(hit, pa.scalar(code, pa.string()), reasons)


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
    needed = [name for name in (columns.id, columns.answer) if name is not None]
    for name in needed:
        reasons = mark(reasons, _blank(table.column(name)), "null")
    for name in contract.prompt_columns:
        reasons = mark(reasons, pc.is_null(table.column(name)), "null")
    reasons = mark(reasons, _blank(table.column(columns.text)), "empty_text")
    if contract.labels is not None:
        known = pc.is_in(table.column(columns.answer), value_set=pa.array(list(contract.labels), pa.string()))
        reasons = mark(reasons, pc.invert(known), "unknown_label")
    for rule in contract.rules:
        if rule.severity == "reject":
            reasons = mark(reasons, broken(rule, table.column(rule.column)), rule.code)
    warned: dict[str, Column] = {}
    for rule in contract.rules:
        if rule.severity == "warn":
            hit = broken(rule, table.column(rule.column))
            warned[rule.code] = pc.or_(warned[rule.code], hit) if rule.code in warned else hit
    return reasons, warned


def broken(rule: Rule, values: Column) -> Column:
    """True where a value breaks the rule. A missing value breaks every rule, a text that is no number min and max."""
    if rule.check == "min_length":
        fine = pc.greater_equal(pc.utf8_length(values), rule.value)
    elif rule.check == "max_length":
        fine = pc.less_equal(pc.utf8_length(values), rule.value)
    elif rule.check == "regex":
        fine = pc.match_substring_regex(values, pattern=rule.value)
    elif rule.check == "allowed_values":
        fine = pc.is_in(values, value_set=pa.array([_as_text(value) for value in rule.value], pa.string()))
    else:
        compare = pc.greater_equal if rule.check == "min_value" else pc.less_equal
        fine = compare(_numbers(values), float(rule.value))
    return pc.invert(pc.fill_null(fine, False))


def repeats(values: Column, reasons: Column) -> Column:
    """True where an earlier row without a reason has the same value: the first one wins."""
    candidates = np.flatnonzero(pc.is_null(reasons).to_numpy())
    repeated = np.zeros(len(values), dtype=bool)
    if len(candidates):
        encoded = pc.dictionary_encode(values.take(pa.array(candidates))).unify_dictionaries()
        codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])
        again = np.ones(len(codes), dtype=bool)
        again[np.unique(codes, return_index=True)[1]] = False
        repeated[candidates[again]] = True
    return pa.chunked_array([pa.array(repeated)])


def shared_with(keys: Column, reasons: Column, others: Column, other_reasons: Column) -> Column:
    """True where a row's key is also the key of a kept row of another split."""
    kept = others.filter(pc.is_null(other_reasons))
    return pc.and_(pc.is_null(reasons), pc.is_in(keys, value_set=kept.combine_chunks()))


def _blank(values: Column) -> Column:
    """True for a null and for a text of white space only."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)


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

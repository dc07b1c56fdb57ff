"""From a contract's columns to the text the model reads and the text it must write."""

import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.contract import TaskContract
from data_contracts.errors import UserError
from data_contracts.template import parse_template, prompt_columns

__all__ = ["CLEAN_COLUMNS", "answers", "prompt_columns", "render_prompts", "rendered"]

# The columns of a clean split, see pipeline.data.ingest.
CLEAN_COLUMNS = ("row_id", "text", "prompt", "answer", "row_sha256")


def rendered(template: str, table: pa.Table) -> pa.ChunkedArray:
    """The template filled in for every row, as an Arrow column of strings; null where a named column is null.

    Raises UserError if the table lacks a column the template names.
    """
    missing = [name for name in prompt_columns(template) if name not in table.column_names]
    if missing:
        raise UserError(
            f"the prompt names the column {missing[0]!r}, which the data does not have "
            f"(it has {', '.join(table.column_names)}); mend the prompt or the data"
        )
    pieces: list = []
    for literal, name in parse_template(template):
        if literal:
            pieces.append(pa.scalar(literal, pa.string()))
        if name is not None:
            pieces.append(pc.cast(table.column(name), pa.string()))
    filled = pc.binary_join_element_wise(*pieces, pa.scalar("", pa.string()), null_handling="emit_null")
    return filled if isinstance(filled, pa.ChunkedArray) else pa.chunked_array([filled], pa.string())


def render_prompts(contract: TaskContract, table: pa.Table) -> list[str]:
    """One prompt per row of a table that has the contract's prompt columns.

    Raises UserError if a column is missing or a row has no value in one.
    """
    prompts = rendered(contract.prompt, table)
    if prompts.null_count:
        row = pc.index(pc.is_null(prompts), True).as_py()
        raise UserError(
            f"{prompts.null_count} rows (the first is row {row + 1}) have no value in a column of the prompt "
            f"({', '.join(contract.prompt_columns)}); fill them in or leave the rows out"
        )
    return prompts.to_pylist()


def answers(contract: TaskContract, table: pa.Table) -> list[str]:
    """The text the model must write, one per row: the label's text for classification, else the answer column.

    `table` is a clean split of `ingest` (its `answer` column is read) or rows as they are in the files (the contract's
    answer column is read). Raises UserError for a missing column, a missing answer or an answer that is no label.
    """
    name = "answer" if tuple(table.column_names) == CLEAN_COLUMNS else contract.columns.answer
    if name not in table.column_names:
        raise UserError(f"the data has no answer column {name!r} (it has {', '.join(table.column_names)})")
    values = pc.cast(table.column(name), pa.string()).to_pylist()
    if contract.labels is None:
        texts = values
    else:
        texts = [contract.labels.get(value) for value in values]
    if None in texts:
        row = texts.index(None)
        raise UserError(f"row {row + 1} has the answer {values[row]!r}, which is not an answer of task {contract.task}")
    return texts

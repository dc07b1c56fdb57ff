"""New rows without a task id: the router chooses each row's task by its text alone."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_contracts import UserError
from data_contracts.checks import mark
from data_contracts.readers import read_records
from pipeline.evaluation.text_states import score_texts, text_tokens
from pipeline.serving import Served
from pipeline.stages.route import read_router, router_of

AUTO = "auto"  # in place of a task's name
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class RoutedRows:
    """The rows of a file, each with the task chosen for it; a row without a readable text has a reason instead."""

    row_ids: list[str]
    tasks: list[str | None]
    scores: list[float | None]  # the router's, of the chosen task
    reasons: pa.ChunkedArray  # (rows,) reason code or null


def route_rows(served: Served, data: str, text_column: str | None) -> RoutedRows:
    """Choose a task for every row of a parquet, jsonl or csv file. Collective.

    Raises UserError where there is no router, where it has not seen every task that is served, or where contracts call
    their text column differently and none is named.
    """
    job, tasks = served.job, list(served.champion.bundles)
    digest = router_of(served.champion.state)
    if digest is None:
        raise UserError(f"{job.work_dir} has no router: learn with `router: {{}}` in the stream, or name the task")
    served.at.history.refuse_withdrawn({"router": digest}, f"{job.work_dir} cannot route: at this increment it had")
    router = read_router(job, digest)
    if unknown := [task for task in tasks if task not in router.tasks]:
        raise UserError(
            f"the router of {job.work_dir} has not seen {', '.join(unknown)}, learned without a router; name the task, "
            "or learn one more task with these in the stream"
        )
    contracts = [served.contract(task) for task in tasks]
    texts = {contract.columns.text for contract in contracts}
    if text_column is None and len(texts) > 1:
        raise UserError(f"the tasks call their text {', '.join(sorted(texts))}; name the file's with --text-column")
    ids = {contract.columns.id for contract in contracts}
    column = text_column or texts.pop()
    row_ids, values, reasons = job.world.on_main(lambda: _read(data, column, ids.pop() if len(ids) == 1 else None))
    chosen: list[str | None] = [None] * len(values)
    scores: list[float | None] = [None] * len(values)
    good = [row for row, reason in enumerate(reasons.to_pylist()) if reason is None]
    if good:
        job.serve({})
        tokens = text_tokens(job.tokenizer, [values[row] for row in good], router.config.max_tokens)
        known = [router.tasks.index(task) for task in tasks]
        table = score_texts(job.learner, router, tokens, job.config.evaluation.batch_tokens)[:, known]
        for row, best, score in zip(good, table.argmax(dim=1).tolist(), table.amax(dim=1).tolist(), strict=True):
            chosen[row], scores[row] = tasks[best], score
    return RoutedRows(row_ids, chosen, scores, reasons)


def _read(data: str, column: str, ids: str | None) -> tuple[list[str], list[str | None], pa.ChunkedArray]:
    """Row ids (the lines where there is no id column), texts, and why a row has none."""
    file_format, roles = file_format_of(data), {column: "text"}
    try:
        records = read_records(data, file_format, roles | ({ids: "key"} if ids else {}))
    except UserError:
        if not ids:
            raise
        ids, records = None, read_records(data, file_format, roles)
    texts = records.table.column(column)
    reasons = mark(records.reasons, pc.is_null(texts), "null")
    reasons = mark(reasons, pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(False), "empty_text")
    row_ids = [str(line) for line in records.lines] if ids is None else records.table.column(ids).to_pylist()
    return row_ids, texts.to_pylist(), reasons


def file_format_of(path: str) -> str:
    """Format by suffix. Raises UserError for another one."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: the file must end in {', '.join(FORMATS)}")
    return FORMATS[suffix]

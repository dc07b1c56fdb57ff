"""Score new rows of a learned task with the bundle it is served with."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data_contracts import TaskContract, UserError
from data_contracts.checks import mark
from data_contracts.readers import read_records
from pipeline.data.token_limits import TokenCounter, fit
from pipeline.data.tokens import answer_tokens, prompt_tokens
from pipeline.evaluation.answers import answer_rows
from pipeline.evaluation.review_cost import decided
from pipeline.files import write_atomic
from pipeline.methods.protocol import bundle_digest
from pipeline.routing import AUTO, file_format_of, route_rows
from pipeline.serving import Served

OPTIONAL = ("task", "task_score", "label_scores", "decision")  # columns that only some predictions have
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("task", pa.string()),
        ("task_score", pa.float64()),
        ("answer", pa.string()),
        ("score", pa.float32()),
        ("label_scores", pa.list_(pa.float32())),
        ("decision", pa.string()),
        ("bundle", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class NewRows:
    """Rows to be answered, as prompts, and for each row why it cannot be (null: it can)."""

    row_ids: list[str]
    prompts: list[str]  # of the rows that can be answered, in order
    reasons: pa.Array  # (rows,) reason code or null


def predict(served: Served, task: str, data: str, text_column: str | None = None) -> pa.Table:
    """Columns row_id, answer, score, label_scores (classification), bundle, reason; one row for each row of `data`.

    Where the bundle has thresholds, `decision` says of each row whether it is decided or to review. With the task
    `auto` the router chooses each row's task by its text alone; `task` and `task_score` say which, and how near 1 its
    score is. `text_column` is the file's name for the text, if it is not the contract's. A row that cannot be answered
    (no text, too long, not UTF-8) has a reason and no answer: no row is lost. Collective; the same on every rank.
    """
    routed = route_rows(served, data, text_column) if task == AUTO and AUTO not in served.champion.bundles else None
    tasks = [task] if routed is None else [name for name in served.champion.bundles if name in routed.tasks]
    columns = {} if routed is None else {"row_id": routed.row_ids, "reason": routed.reasons.to_pylist()}
    for name in tasks:
        only = None if routed is None else np.array([chosen == name for chosen in routed.tasks])
        for column, values in answer_task(served, name, data, text_column, only).items():
            here = columns.setdefault(column, [None] * len(values))
            for row in range(len(values)) if only is None else np.flatnonzero(only):
                if column != "row_id" or routed is None:
                    here[row] = values[row]
    if routed is not None:
        columns |= {"task": routed.tasks, "task_score": routed.scores}
    kept = [name for name in SCHEMA.names if name in columns or name not in OPTIONAL]
    rows = len(columns["row_id"])
    return pa.table({name: pa.array(columns.get(name, [None] * rows), SCHEMA.field(name).type) for name in kept})


def answer_task(
    served: Served, task: str, data: str, text_column: str | None, only: np.ndarray | None
) -> dict[str, list]:
    """The columns of `predict` for a task's rows: all of the file, or `only` (rows,) of them. Collective."""
    job, bundle, contract = served.job, served.bundle(task), served.contract(task)
    counter = TokenCounter(job.tokenizer)

    def read() -> NewRows:
        try:
            return read_rows(contract, data, counter, text_column, only)
        except UserError:
            if only is None or contract.prompt_columns == [contract.columns.text]:
                raise
            return NewRows([""] * len(only), [], pa.array(["missing_column"] * len(only)))

    new = job.world.on_main(read)
    reasons = new.reasons.to_pylist()
    columns = {
        "row_id": new.row_ids,
        "answer": [None] * len(reasons),
        "score": [None] * len(reasons),
        "bundle": [bundle_digest(bundle)] * len(reasons),
        "reason": reasons,
    }
    answered = [row for row, reason in enumerate(reasons) if reason is None and (only is None or only[row])]
    if new.prompts:
        job.serve(bundle)
        labels = list((contract.labels or {}).values())
        answers = answer_rows(
            job.learner,
            contract,
            prompt_tokens(job.tokenizer, new.prompts),
            answer_tokens(job.tokenizer, labels) if labels else [],
            job.tokenizer.eos_token_id,
            job.tokenizer,
            job.config.evaluation.batch_tokens,
        )
        table = answers.table([new.row_ids[row] for row in answered]).drop_columns(["row_id"])
        for name in table.column_names:
            values = columns.setdefault(name, [None] * len(reasons))
            for row, value in zip(answered, table[name].to_pylist(), strict=True):
                values[row] = value
    thresholds = served.thresholds(task)
    if thresholds is not None:
        columns["decision"] = ["review"] * len(reasons)
        alone = decided(
            [columns["answer"][row] for row in answered], [columns["score"][row] for row in answered], thresholds
        )
        for row in np.array(answered, dtype=int)[alone]:
            columns["decision"][row] = "decided"
    return columns


def read_rows(
    contract: TaskContract,
    data: str,
    counter: TokenCounter,
    text_column: str | None = None,
    only: np.ndarray | None = None,
) -> NewRows:
    """Read a parquet, jsonl or csv file of new rows; the answer column is not needed.

    `text_column` is what the file calls the contract's text column. Of rows outside `only` (rows,) nothing is asked:
    they have no prompt and no reason. Raises UserError for an unknown suffix, an unreadable file, or a missing column
    of the prompt.
    """
    names = contract.prompt_columns
    text = text_column or contract.columns.text
    roles = dict.fromkeys([name for name in names if name != contract.columns.text], "value") | {text: "text"}
    ids = contract.columns.id
    file_format = file_format_of(data)
    try:
        records = read_records(data, file_format, roles | ({ids: "key"} if ids else {}))
    except UserError:
        if not ids:
            raise
        ids = None  # new rows may come without the id column; then they are numbered
        records = read_records(data, file_format, roles)
    columns = [contract.columns.text if name == text else name for name in records.table.column_names]
    rows = records.table.rename_columns(columns)
    reasons = records.reasons
    for name in names:
        reasons = mark(reasons, pc.is_null(rows.column(name)), "null")
    blank = pc.equal(pc.utf8_trim_whitespace(rows.column(contract.columns.text)), "")
    reasons = mark(reasons, blank.fill_null(False), "empty_text")
    good = pc.is_null(reasons)
    if only is not None:
        good = pc.and_(good, pa.chunked_array([pa.array(only)]))
    kept = rows.filter(good)
    # the longest answer decides whether a prompt leaves room for one
    label = max((contract.labels or {"": ""}).values(), key=len)
    fitted = fit(contract, kept, [label] * kept.num_rows, counter)
    too_long = np.zeros(len(reasons), dtype=bool)
    too_long[np.flatnonzero(good.to_numpy())[~fitted.fits]] = True
    reasons = mark(reasons, pa.chunked_array([pa.array(too_long)]), "too_long")
    row_ids = [str(n) for n in records.lines] if ids is None else rows.column(ids).to_pylist()
    prompts = [prompt for prompt, fits in zip(fitted.prompts, fitted.fits, strict=True) if fits]
    return NewRows(row_ids, prompts, reasons.combine_chunks())


def write_table(table: pa.Table, path: str) -> None:
    """Write predictions as parquet, jsonl or csv, by suffix; whole or not at all."""
    buffer = io.BytesIO()
    kind = file_format_of(path)
    if kind == "parquet":
        pq.write_table(table, buffer, compression="zstd")
    elif kind == "csv":
        flat = table.drop_columns(["label_scores"]) if "label_scores" in table.column_names else table
        pyarrow.csv.write_csv(flat, buffer)
    else:
        buffer.write(table.to_pandas().to_json(orient="records", lines=True, force_ascii=False).encode())
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another place") from error

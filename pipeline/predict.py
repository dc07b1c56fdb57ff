"""Score new rows of a learned task with the bundle it is served with."""

import io
from dataclasses import dataclass
from pathlib import Path

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
from pipeline.files import write_atomic
from pipeline.serving import Served, bundle_digest

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class NewRows:
    """Rows to be answered, as prompts, and for each row why it cannot be (null: it can)."""

    row_ids: list[str]
    prompts: list[str]  # of the rows that can be answered, in order
    reasons: pa.Array  # (rows,) reason code or null


def predict(served: Served, task: str, data: str) -> pa.Table:
    """Columns row_id, answer, score, label_scores (classification), bundle, reason; one row for each row of `data`.

    A row that cannot be answered (no text, too long, not UTF-8) has a reason and no answer: no row is lost.
    Collective; the same on every rank.
    """
    job = served.job
    bundle, contract = served.bundle(task), served.contract(task)
    new = job.world.on_main(lambda: read_rows(contract, data, TokenCounter(job.tokenizer)))
    job.serve(bundle)
    labels = list((contract.labels or {}).values())
    answered = pc.is_null(new.reasons).to_numpy(zero_copy_only=False)
    columns: dict[str, list] = {"answer": [None] * len(answered), "score": [None] * len(answered)}
    if new.prompts:
        answers = answer_rows(
            job.learner,
            contract,
            prompt_tokens(job.tokenizer, new.prompts),
            answer_tokens(job.tokenizer, labels) if labels else [],
            job.tokenizer.eos_token_id,
            job.tokenizer,
            job.config.evaluation.batch_tokens,
        )
        table = answers.table([new.row_ids[row] for row in np.flatnonzero(answered)]).drop_columns(["row_id"])
        for name in table.column_names:
            values = columns.setdefault(name, [None] * len(answered))
            for row, value in zip(np.flatnonzero(answered), table[name].to_pylist(), strict=True):
                values[row] = value
    digest = bundle_digest(bundle)
    return pa.table(
        {
            "row_id": pa.array(new.row_ids, pa.string()),
            "answer": pa.array(columns["answer"], pa.string()),
            "score": pa.array(columns["score"], pa.float32()),
            **(
                {"label_scores": pa.array(columns["label_scores"], pa.list_(pa.float32()))}
                if "label_scores" in columns
                else {}
            ),
            "bundle": pa.array([digest] * len(answered), pa.string()),
            "reason": new.reasons.cast(pa.string()),
        }
    )


def read_rows(contract: TaskContract, data: str, counter: TokenCounter) -> NewRows:
    """Read a parquet, jsonl or csv file of new rows; the answer column is not needed.

    Raises UserError for an unknown suffix, an unreadable file, or a missing column of the prompt.
    """
    names = contract.prompt_columns
    roles = dict.fromkeys(names, "value") | {contract.columns.text: "text"}
    ids = contract.columns.id
    file_format = file_format_of(data)
    try:
        records = read_records(data, file_format, roles | ({ids: "key"} if ids else {}))
    except UserError:
        if not ids:
            raise
        ids = None  # new rows may come without the id column; then they are numbered
        records = read_records(data, file_format, roles)
    reasons = records.reasons
    for name in names:
        reasons = mark(reasons, pc.is_null(records.table.column(name)), "null")
    blank = pc.equal(pc.utf8_trim_whitespace(records.table.column(contract.columns.text)), "")
    reasons = mark(reasons, blank.fill_null(False), "empty_text")
    good = pc.is_null(reasons)
    kept = records.table.filter(good)
    # the longest answer decides whether a prompt leaves room for one
    label = max((contract.labels or {"": ""}).values(), key=len)
    fitted = fit(contract, kept, [label] * kept.num_rows, counter)
    too_long = np.zeros(len(reasons), dtype=bool)
    too_long[np.flatnonzero(good.to_numpy())[~fitted.fits]] = True
    reasons = mark(reasons, pa.chunked_array([pa.array(too_long)]), "too_long")
    row_ids = [str(n) for n in records.lines] if ids is None else records.table.column(ids).to_pylist()
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


def file_format_of(path: str) -> str:
    """Format by suffix. Raises UserError for another one."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: the file must end in {', '.join(FORMATS)}")
    return FORMATS[suffix]

"""Case `validation`: a contract's checks on whole columns against a pydantic model row by row; cost of a full verdict.

The synthetic rows break the contract in known places, so that both ways must reject the same number.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, create_model

from data_contracts import TaskContract
from data_contracts.checks import check_values, mark, no_reasons
from data_contracts.readers import BATCH_ROWS, as_text, read_batches
from pipeline.benchmarks.machine import peak_bytes
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, interleave, rates, summary
from pipeline.data.ingest import examine
from pipeline.data.seen import SeenHashes, folded, text_hashes
from pipeline.data.token_limits import TokenCounter

VECTORISED, ROW_BY_ROW = "vectorised", "row_by_row_pydantic"
LABELS = ("negative", "neutral", "positive")
SHORTEST, LONGEST = 3, 400  # characters of a text
ROLES = {"id": "key", "text": "text", "label": "key"}
_WORDS = ("parcel", "hotel", "engine", "garden", "ticket", "camera", "printer", "jacket", "teapot", "window", "late")
_SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
_MOST_VERDICT_ROWS = 200_000


def measure_validation(options: SpeedOptions, tokenizer: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Reports 'validation' (both ways on the same checks) and 'verdict' (the whole of it, and its parts)."""
    number = options.validation_rows
    contract, table = synthetic_contract(), synthetic_rows(number)
    model, records = row_model(contract), table.to_pylist()  # the peer is given Python objects, uncounted
    rejected: dict[str, int] = {}

    def columns(_: int) -> None:
        reasons = vectorised(contract, table)
        rejected[VECTORISED] = len(reasons) - reasons.null_count

    def rows(_: int) -> None:
        rejected[ROW_BY_ROW] = row_by_row(model, records)

    seconds = interleave({VECTORISED: columns, ROW_BY_ROW: rows}, options.repeats, warmup=1)
    report = compare(seconds, [(ROW_BY_ROW, VECTORISED)])
    report["figures"] = {
        name: {"rows_per_second": rates([number] * options.repeats, values), "rejected": rejected[name]}
        for name, values in seconds.items()
    }
    records.clear()
    return {"validation": report, "verdict": measure_verdict(contract, table, tokenizer, folder, options.repeats)}


def measure_verdict(
    contract: TaskContract, table: pa.Table, tokenizer: Any, folder: Path, repeats_: int
) -> dict[str, Any]:
    """Seconds of a verdict from parquet files, without and with token limits, and of its parts alone."""
    table = table.slice(0, _MOST_VERDICT_ROWS)
    number, start = table.num_rows, 0
    for split, share in _SPLITS.items():
        stop = number if split == "test" else start + int(number * share)
        pq.write_table(table.slice(start, stop - start), folder / f"{split}.parquet")
        start = stop
    whole = str(folder / "whole.parquet")
    pq.write_table(table, whole)
    read = list(read_batches(whole, "parquet", ROLES, BATCH_ROWS))
    texts = [[text or "" for text in part.table.column("text").to_pylist()] for part in read]
    counter = TokenCounter(tokenizer)

    def duplicates(_: int) -> SeenHashes:
        seen = SeenHashes()
        for part in texts:
            seen.add(text_hashes([folded(text) for text in part]))
        return seen

    judged, hashes = duplicates(0), [text_hashes([folded(text) for text in part]) for part in texts]
    parts: dict[str, Callable[[int], Any]] = {
        "verdict": lambda _: examine(contract, [folder], tokenizer=tokenizer),
        "verdict without token limits": lambda _: examine(contract, [folder]),
        "reading": lambda _: list(read_batches(whole, "parquet", ROLES, BATCH_ROWS)),
        "values": lambda _: [check_values(contract, part.table, part.reasons) for part in read],
        "duplicates": duplicates,
        "leaks": lambda _: [judged.contains(part) for part in hashes],
        "tokens": lambda _: [counter.prompt_ids(part) for part in texts],
    }
    seconds = interleave(parts, repeats_, warmup=0)
    return {
        "rows": number,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": {},
        "figures": {name: {"rows_per_second": rates([number] * repeats_, own)} for name, own in seconds.items()},
        "peak_bytes_of_this_process": peak_bytes(),
    }


def synthetic_contract() -> TaskContract:
    """Types, nulls, lengths and a label set."""
    return TaskContract.model_validate(
        {
            "task": "synthetic",
            "version": "1.0.0",
            "owner": "benchmark",
            "description": "Synthetic rows",
            "kind": "classification",
            "language": "en",
            "source": {"format": "parquet", **{split: [f"{split}.parquet"] for split in _SPLITS}},
            "columns": {"id": "id", "text": "text", "answer": "label"},
            "prompt": "{text}\nSentiment:",
            "labels": {name: f" {name}" for name in LABELS},
            "metric": "accuracy",
            "limits": {"max_rejected_fraction": 1.0, "min_rows": {"train": 1, "validation": 1, "test": 1}},
            "rules": [
                {"column": "text", "check": "min_length", "value": SHORTEST},
                {"column": "text", "check": "max_length", "value": LONGEST},
            ],
            "licence": "own",
            "sensitivity": "public",
        }
    )


def synthetic_rows(number: int, first: int = 0) -> pa.Table:
    """Rows `first` to `first + number`, of which five in a hundred break the contract, each in a way of its own, at
    places 7, 23, 41, 59 and 73.
    """
    draw = random.Random(first)
    texts: list[str | None] = []
    labels: list[str | None] = []
    for row in range(first, first + number):
        texts.append(f"Note {row}: the {' and the '.join(draw.choices(_WORDS, k=3 + row % 9))} we got.")
        labels.append(LABELS[row % len(LABELS)])
        match row % 100:
            case 7:
                texts[-1] = None
            case 23:
                texts[-1] = "ok"
            case 41:
                labels[-1] = "unheard of"
            case 59:
                labels[-1] = None
            case 73:
                texts[-1] = "long " * LONGEST
    return pa.table({"id": [f"row-{row}" for row in range(first, first + number)], "text": texts, "label": labels})


def vectorised(contract: TaskContract, table: pa.Table) -> pa.ChunkedArray:
    """The reason of every row, null for a row that keeps the contract: the product's checks on types and values, in the
    product's batches.
    """
    done = []
    for start in range(0, table.num_rows, BATCH_ROWS):
        part = table.slice(start, BATCH_ROWS)
        reasons = no_reasons(part.num_rows)
        texts = {}
        for name, role in ROLES.items():
            texts[name], wrong, undecodable = as_text(part.column(name), role)
            reasons = mark(reasons, undecodable, "invalid_utf8")
            reasons = mark(reasons, wrong, "wrong_type")
        done += check_values(contract, pa.table(texts), reasons)[0].chunks
    return pa.chunked_array(done)


def row_model(contract: TaskContract) -> type[BaseModel]:
    """The same contract as a pydantic model of one row."""
    text = Annotated[str, StringConstraints(min_length=SHORTEST, max_length=LONGEST)]
    return create_model(
        "Row",
        __config__=ConfigDict(strict=True),
        id=(Annotated[str, StringConstraints(min_length=1)], ...),
        text=(text, ...),
        label=(Literal[tuple(contract.labels)], ...),
    )


def row_by_row(model: type[BaseModel], records: list[dict[str, Any]]) -> int:
    """How many records the model refuses."""
    refused = 0
    for record in records:
        try:
            model.model_validate(record)
        except ValidationError:
            refused += 1
    return refused

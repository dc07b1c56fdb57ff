"""Text classification tasks from folders of parquet files, prepared as the product prepares them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract
from data_contracts.errors import UserError
from pipeline.data.ingest import ingest
from pipeline.data.tokens import PreparedTask, open_shards, write_shards

MAX_ANSWER_TOKENS = 24


def task_names(data: str) -> list[str]:
    """Names of the task folders below `data`. Raises UserError where there is none."""
    names = sorted(path.parent.name for path in Path(data).glob("*/train.parquet"))
    if not names:
        raise UserError(f"--data {data} has no <task>/train.parquet; name a folder with one folder a task")
    return names


def label_names(data: str, task: str) -> list[str]:
    """The classes of a task, sorted. Raises UserError for a task or a column that is not there."""
    file = Path(data) / task / "train.parquet"
    if not file.is_file():
        raise UserError(f"{file} is not there; the tasks of --data are {', '.join(task_names(data))}")
    try:
        column = pq.read_table(file, columns=["label"]).column("label")
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{file} has no readable column 'label' ({str(error).splitlines()[0]})") from None
    return sorted({str(value) for value in column.drop_null().unique().to_pylist()})


def most_labels(data: str) -> str:
    """The task with most classes, the first by name among equals."""
    return max(task_names(data), key=lambda task: len(label_names(data, task)))


def task_contract(data: str, task: str, max_tokens: int) -> TaskContract:
    """A contract for one folder: the text, then its class; long texts are cut at `max_tokens`."""
    folder = Path(data) / task
    sources: dict[str, object] = {"train": [f"{task}/train.parquet"]}
    for split in ("validation", "test"):
        there = (folder / f"{split}.parquet").is_file()
        sources[split] = [f"{task}/{split}.parquet"] if there else {"from": "train", "fraction": 0.1}
    return TaskContract.model_validate(
        {
            "task": "measured",
            "version": "1.0.0",
            "owner": "benchmark",
            "description": "Rows whose speed is measured",
            "kind": "classification",
            "language": "en",
            "source": {"format": "parquet", **sources},
            "columns": {"text": "text", "answer": "label"},
            "prompt": "{text}\nClass:",
            "labels": {name: f" {name}" for name in label_names(data, task)},
            "metric": "accuracy",
            "limits": {
                "max_tokens": max_tokens,
                "max_answer_tokens": MAX_ANSWER_TOKENS,
                "too_long": "truncate",
                "max_rejected_fraction": 1.0,
                "min_rows": {"train": 1, "validation": 1, "test": 1},
            },
            "licence": "not stated",
            "sensitivity": "internal",
        }
    )


def prepare_task(
    data: str, task: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int, folder: Path
) -> PreparedTask:
    """Validate and tokenise a task into `folder`. Raises UserError where its data cannot be used."""
    contract = task_contract(data, task, max_tokens)
    write_shards(ingest(contract, [data], tokenizer=tokenizer), tokenizer, folder)
    return open_shards(contract, folder)

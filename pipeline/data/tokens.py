"""Token shards: the clean rows of a task, tokenised once, as memory-mapped Arrow files named by the digest of their
inputs.

A shard's columns: row_id, prompt_ids and answer_ids (token ids; the end-of-answer token is not stored), label (index
in the contract's labels, -1 for generation), reference (label name or reference text), text (the contract's text
column).
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract
from data_contracts.readers import BATCH_ROWS
from pipeline.data.batching import select_rows
from pipeline.data.ingest import CleanTask
from pipeline.data.token_limits import TokenCounter, text_tokenizer, tokenizer_digest
from pipeline.files import canonical_json, fsync_dir, make_durable, sha256_text, write_atomic
from pipeline.watch.rank import report

SHARD_FORMAT = 1
_SHARD = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("label", pa.int32()),
        ("reference", pa.string()),
        ("text", pa.string()),
    ]
)
datasets.disable_progress_bars()  # rank 0 prints one line a stage instead
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class PreparedTask:
    """A task ready for batches: the contract, its splits on disk, the label texts' tokens."""

    contract: TaskContract
    splits: Mapping[str, datasets.Dataset]
    label_ids: tuple[tuple[int, ...], ...]  # tokens of each label's text, in the contract's order; () for generation
    end_of_answer: int  # token that closes an answer
    data_digests: dict[str, str]
    counts: dict[str, dict[str, Any]]  # per split: rows_in, kept, rejected {reason: rows}
    files: tuple[str, ...]  # names of the data files below their roots

    @property
    def task(self) -> str:
        return self.contract.task

    def rows(self, split: str, limit: int | None, seed: int) -> "RowView":
        """At most `limit` rows of a split, drawn from (seed, task, split) alone."""
        dataset = self.splits[split]
        chosen = select_rows(len(dataset), limit, seed, f"{self.task}/{split}")
        return RowView(dataset if len(chosen) == len(dataset) else dataset.select(chosen), self.end_of_answer)


class Shards(Mapping[str, datasets.Dataset]):
    """The splits of a shard folder, memory-mapped when asked for and let go with their user.

    A stream of thousands of tasks keeps neither files nor mappings open for those that are not at work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, split: str) -> datasets.Dataset:
        if split not in SPLITS:
            raise KeyError(split)
        return datasets.load_from_disk(str(self.folder / split))

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


class RowView:
    """Rows of a shard with their lengths at hand and their tokens on disk."""

    def __init__(self, dataset: datasets.Dataset, end_of_answer: int) -> None:
        self.dataset = dataset
        self.end_of_answer = end_of_answer
        self.prompt_lengths = _list_lengths(dataset, "prompt_ids")  # (rows,) tokens
        self.answer_lengths = _list_lengths(dataset, "answer_ids") + 1  # (rows,) tokens, end of answer included
        self.lengths = self.prompt_lengths + self.answer_lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and answer token ids of the given rows."""
        table = self.dataset[list(map(int, rows))]
        return table["prompt_ids"], table["answer_ids"]

    def row_ids(self, rows: Sequence[int]) -> list[str]:
        """The rows' ids, as the contract's data name them."""
        return self.dataset[list(map(int, rows))]["row_id"]

    def column(self, name: str) -> list:
        """A whole column."""
        return list(self.dataset[name])


def shard_digest(contract_digest: str, file_digests: dict[str, str], tokenizer_digest: str) -> str:
    """Name of a shard folder: a digest over everything its content depends on."""
    return sha256_text(
        canonical_json([SHARD_FORMAT, contract_digest, file_digests, tokenizer_digest, datasets.__version__])
    )


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts, with the beginning-of-sequence token where the tokenizer adds one, never an end token."""
    encoded = [encoding.ids for encoding in text_tokenizer(tokenizer).encode_batch_fast(texts)]
    end = tokenizer.eos_token_id
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in encoded]


def answer_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of answers, tokenised apart from the prompt, no special tokens."""
    return [e.ids for e in text_tokenizer(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def write_shards(clean: CleanTask, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a clean task's tokens into `folder`, which appears whole or not at all; rows pass in batches.

    Prompts are tokenised here only if `clean` was not made with this tokenizer.
    """
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    texts = list((clean.contract.labels or {}).values())
    counter = TokenCounter(tokenizer)
    tokenised = clean.tokenizer_digest == tokenizer_digest(tokenizer)
    try:
        beside.mkdir(parents=True)
        for split, table in clean.splits.items():
            unfinished = beside / f"{split}.arrow"
            with pa.ipc.new_stream(str(unfinished), _SHARD) as stream:
                start = 0
                for batch in table.to_batches(max_chunksize=BATCH_ROWS):
                    report()
                    if tokenised:
                        prompt_ids = clean.prompt_ids[split].slice(start, batch.num_rows)
                    else:
                        prompt_ids = counter.prompt_ids(batch["prompt"].to_pylist())
                    start += batch.num_rows
                    stream.write_table(_shard_rows(clean.contract, batch, prompt_ids, counter, tokenizer.eos_token_id))
            datasets.Dataset.from_file(str(unfinished)).save_to_disk(str(beside / split))
            unfinished.unlink()
        meta = {
            "label_ids": answer_tokens(tokenizer, texts) if texts else [],
            "end_of_answer": tokenizer.eos_token_id,
            "data_digests": clean.data_digests,
            "counts": clean.verdict.to_dict()["splits"],
            "files": sorted(clean.file_digests),
        }
        write_atomic(beside / "meta.json", canonical_json(meta).encode())
        make_durable(beside)
        if folder.exists():
            shutil.rmtree(beside)
        else:
            os.rename(beside, folder)
            fsync_dir(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _shard_rows(
    contract: TaskContract, rows: pa.RecordBatch, prompt_ids: pa.ChunkedArray, counter: TokenCounter, end: int | None
) -> pa.Table:
    if contract.labels is None:
        label = pa.array(np.full(rows.num_rows, -1, dtype=np.int32))
        answer_ids = counter.answer_ids(rows["answer"].to_pylist())
    else:
        label = pc.index_in(rows["answer"], value_set=pa.array(list(contract.labels), pa.string()))
        if label.null_count:
            raise KeyError(rows["answer"].filter(pc.is_null(label))[0].as_py())
        answer_ids = counter.answer_ids(list(contract.labels.values())).take(label)
    prompts = _without_end(prompt_ids, end)
    return pa.table([rows["row_id"], prompts, answer_ids, label, rows["answer"], rows["text"]], schema=_SHARD)


def _without_end(prompt_ids: pa.ChunkedArray, end: int | None) -> pa.ListArray:
    """The ids without the end token some tokenizers put behind a text: the answer follows there."""
    lists = prompt_ids.combine_chunks()
    flat, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
    last = np.cumsum(lengths) - 1
    ended = lengths > 0
    ended[ended] = flat[last[ended]] == end
    offsets = np.concatenate([[0], np.cumsum(lengths - ended)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), np.delete(flat, last[ended]))


def open_shards(contract: TaskContract, folder: Path) -> PreparedTask:
    """A shard folder, ready to be mapped."""
    meta = json.loads((folder / "meta.json").read_text())
    label_ids = tuple(tuple(ids) for ids in meta["label_ids"])
    return PreparedTask(
        contract=contract,
        splits=Shards(folder),
        label_ids=label_ids,
        end_of_answer=meta["end_of_answer"],
        data_digests=meta["data_digests"],
        counts=meta["counts"],
        files=tuple(meta["files"]),
    )


def _list_lengths(dataset: datasets.Dataset, column: str) -> np.ndarray:
    return pc.list_value_length(dataset.select_columns([column]).with_format("arrow")[:][column]).to_numpy()

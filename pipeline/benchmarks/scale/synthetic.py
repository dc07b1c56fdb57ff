"""A tiny backbone and as many tasks as wanted, made from nothing: bytes for tokens, a word for a label."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Sample = dict[str, float]  # what one increment took and left
_END, _PAD = "<|end|>", "<|pad|>"
_LABELS = {"bad": " bad", "good": " good"}
_CUES = {"bad": ("late", "torn", "dull"), "good": ("new", "kind", "neat")}
_THINGS = ("cup", "lamp", "coat", "book", "door", "seat")


def make_backbone(folder: Path, width: int, layers: int, seed: int) -> None:
    """A random Llama of a few thousand parameters with a byte tokenizer, as a checkpoint folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_END, _PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD).save_pretrained(folder)


def task_name(number: int) -> str:
    """Name of the `number`-th task: all of one length, so that names do not change the bytes of a record."""
    return f"task_{number:05d}"


def make_task(root: Path, number: int, rows: int, seed: int) -> Path:
    """Data of one task below `root` (rows to train, half as many each to validate and test) and its contract's path.

    Every task has rows of its own and the same lengths, so that no increment is more work than another.
    """
    name = task_name(number)
    draw = random.Random(f"{seed}/{name}")
    folder = root / name
    folder.mkdir(parents=True)
    count = 0
    for split, wanted in (("train", rows), ("validation", rows // 2), ("test", rows // 2)):
        records = []
        for place in range(wanted):
            count += 1
            label = list(_LABELS)[place % len(_LABELS)]
            text = f"{count:04d} {draw.choice(_THINGS):4s} {draw.choice(_CUES[label]):4s} {draw.randrange(10**6):06d}"
            records.append({"text": text, "label": label})
        pq.write_table(pa.Table.from_pylist(records), folder / f"{split}.parquet")
    contract = {
        "task": name,
        "version": "1.0.0",
        "owner": "benchmark",
        "description": "Made to count increments",
        "kind": "classification",
        "language": "en",
        "source": {"format": "parquet", **{s: [f"{name}/{s}.parquet"] for s in ("train", "validation", "test")}},
        "columns": {"text": "text", "answer": "label"},
        "prompt": "{text}\nIt is",
        "labels": _LABELS,
        "metric": "accuracy",
        "limits": {"max_tokens": 64, "max_answer_tokens": 8, "min_rows": {"train": 1, "validation": 1, "test": 1}},
        "licence": "own",
        "sensitivity": "public",
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(contract, sort_keys=False), encoding="utf-8")
    return path

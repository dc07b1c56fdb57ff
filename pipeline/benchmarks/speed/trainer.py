"""Case `trainer`: training on a task's real length mix against PEFT with Hugging Face's Trainer.

Every contender trains in a process of its own, so that its memory is its own and none disturbs another; processes take
turns. All see the same tokenised rows in the same order and batches.
"""

import statistics
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.benchmarks.children import child_environment, run_module
from pipeline.benchmarks.speed.contenders import write_spec
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, rates
from pipeline.data.tokens import PreparedTask

PEER = "peft_trainer"  # of `trainer_child`
CONTENDERS = ("sequential", "moe_cl", PEER)
Notes = dict[str, list[dict[str, Any]]]  # contender -> what each of its runs left


def measure_training(options: SpeedOptions, prepared: PreparedTask, shards: Path, folder: Path) -> dict[str, Any]:
    """Seconds of the counted steps by contender on one task, with ratios, rows/s, tokens/s and peak memory."""
    wanted, there = (options.warmup + options.steps) * options.batch_size, len(prepared.splits["train"])
    if there < wanted:
        raise UserError(
            f"a run of {options.warmup} + {options.steps} steps of {options.batch_size} rows takes {wanted} rows, and "
            f"train has {there}; lower --steps or --batch-size"
        )
    notes: Notes = {name: [] for name in CONTENDERS}
    for turn in range(options.repeats):
        for name in CONTENDERS:
            notes[name].append(train_in_child(options, prepared, shards, name, folder / f"{turn}-{name}"))
    return training_report(notes)


def training_report(notes: Notes) -> dict[str, Any]:
    """The report from the notes of every contender's runs, in rounds."""
    seconds = {name: [note["seconds"] for note in own] for name, own in notes.items()}
    report = compare(seconds, [(PEER, "sequential"), (PEER, "moe_cl"), ("moe_cl", "sequential")])
    report["figures"] = {
        name: {
            "rows_per_second": rates([note["rows"] for note in own], seconds[name]),
            "tokens_per_second": rates([note["tokens"] for note in own], seconds[name]),
            "peak_bytes": statistics.median(note["peak_bytes"] for note in own),
            "bytes_before_training": statistics.median(note["bytes_before_training"] for note in own),
            "mean_loss": statistics.median(note["mean_loss"] for note in own),
        }
        for name, own in notes.items()
    }
    return report


def train_in_child(
    options: SpeedOptions, prepared: PreparedTask, shards: Path, contender: str, folder: Path
) -> dict[str, Any]:
    """One training run in a new process; its note. Raises RuntimeError with the end of its output where it fails."""
    spec = write_spec(options, prepared, shards, folder, contender=contender)
    return run_module("pipeline.benchmarks.speed.trainer_child", spec, child_environment())

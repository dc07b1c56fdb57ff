"""Case `trainer`: training on a task's real length mix against PEFT with Hugging Face's Trainer.

Every contender trains in a process of its own, so that its memory is its own and none disturbs another; processes take
turns. All see the same tokenised rows in the same order and batches.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, rates
from pipeline.data.tokens import PreparedTask

ROOT = Path(__file__).resolve().parents[3]
PEER = "peft_trainer"
CONTENDERS = ("sequential", "moe_cl", PEER)
Notes = dict[str, list[dict[str, Any]]]  # contender -> what each of its runs left
# what a process group left in the environment would make the child join it
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "CROSS_RANK")


def check_peer() -> None:
    """Raise UserError where the peer's package is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("the case 'trainer' trains with PEFT, which is not installed; run: pip install peft==0.21.2")


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
    spec = write_spec(options, prepared, shards, contender, folder)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.benchmarks.speed.trainer_child", str(spec)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"training with {contender} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(spec.with_name("note.json").read_text(encoding="utf-8"))


def child_environment() -> dict[str, str]:
    """This process's environment without its process group, with the package to be found."""
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return environment


def write_spec(options: SpeedOptions, prepared: PreparedTask, shards: Path, contender: str, folder: Path) -> Path:
    """What `trainer_child.main` reads; the run writes below `folder`."""
    folder.mkdir(parents=True)
    spec = {
        "contender": contender,
        "options": asdict(options),
        "contract": prepared.contract.model_dump(mode="json", by_alias=True),
        "shards": str(shards.resolve()),
        "work_dir": str(folder.resolve()),
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"

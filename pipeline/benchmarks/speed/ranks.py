"""Case `ranks`: the same global batch on one rank and on two, under ZeRO-2 and ZeRO-3, with the bytes they exchange.

Ranks share the machine's cores evenly, so that all worlds have the same. Every run is a launch of its own; launches
take turns. Beside what DeepSpeed handed to its collectives stands what the plan (`placement/traffic.py`) says.
"""

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.benchmarks.children import child_environment, run_module
from pipeline.benchmarks.speed.collectives import KINDS
from pipeline.benchmarks.speed.contenders import write_spec
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.ranks_child import PROBED
from pipeline.benchmarks.speed.samples import compare, rates
from pipeline.benchmarks.speed.trainer import Notes
from pipeline.data.tokens import PreparedTask
from pipeline.placement.architecture import load_architecture
from pipeline.placement.cluster import Placement, Workload
from pipeline.placement.plan import plan
from pipeline.placement.trainable import MethodChoice, trainable_of

METHOD = "moe_cl"
WORLDS = {"zero2 x1": (2, 1), "zero3 x1": (3, 1), "zero2 x2": (2, 2), "zero3 x2": (3, 2)}  # stage, ranks
PAIRS = [("zero3 x2", "zero3 x1"), ("zero2 x2", "zero2 x1"), ("zero3 x1", "zero2 x1"), ("zero3 x2", "zero2 x2")]
# keys of a DeepSpeed file by field of a placement
_SETTINGS = {
    "persistence_threshold": "stage3_param_persistence_threshold",
    "reduce_bucket_size": "reduce_bucket_size",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "max_reuse_distance": "stage3_max_reuse_distance",
}


def measure_ranks(options: SpeedOptions, prepared: PreparedTask, shards: Path, folder: Path) -> dict[str, Any]:
    """Seconds of the counted steps by world, with ratios, rates, peak memory, bytes beside the plan's, breakdown."""
    wanted, there = (options.warmup + options.steps + PROBED) * options.batch_size, len(prepared.splits["train"])
    if there < wanted:
        raise UserError(f"a run of the case 'ranks' takes {wanted} rows, and train has {there}; lower --steps")
    notes: Notes = {name: [] for name in WORLDS}
    for turn in range(options.repeats):
        for name in WORLDS:
            notes[name].append(train_in_world(options, prepared, shards, name, folder / f"{turn}-{name}"))
    return ranks_report(options, notes)


def ranks_report(options: SpeedOptions, notes: Notes) -> dict[str, Any]:
    """The report from the notes of every world's runs, in rounds."""
    seconds = {name: [note["seconds"] for note in own] for name, own in notes.items()}
    report = compare(seconds, PAIRS)
    report["figures"] = {}
    for name, own in notes.items():
        ranks = [rank for note in own for rank in note["ranks"]]
        counted = [step for rank in ranks for step in rank["steps"]]
        report["figures"][name] = {
            "rows_per_second": rates([note["rows"] for note in own], seconds[name]),
            "tokens_per_second": rates([note["tokens"] for note in own], seconds[name]),
            "peak_bytes": statistics.median(max(rank["peak_bytes"] for rank in note["ranks"]) for note in own),
            "threads": ranks[0]["threads"],
            "loss": statistics.median(note["loss"] for note in own),
            "step": {
                f"{kind}_{what}": statistics.median(step[f"{kind}_{what}"] for step in counted)
                for kind in KINDS
                for what in ("bytes", "calls", "seconds")
            },
            "planned": planned(options, *WORLDS[name], round(statistics.median(step["passes"] for step in counted))),
            "probed": breakdown([step for rank in ranks for step in rank["probed"]]),
        }
    return report


def breakdown(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a step whose collectives run by themselves, and where they go, on one rank."""
    parts = {
        "gather": [step["gather_seconds"] for step in steps],
        "reduce": [step["reduce_seconds"] + step["scalar_seconds"] for step in steps],
        "waiting": [step["waiting_seconds"] for step in steps],
    }
    whole = [step["seconds"] for step in steps]
    rest = [own - sum(values) for own, *values in zip(whole, *parts.values(), strict=True)]
    return {name: statistics.median(values) for name, values in {"step": whole, **parts, "rest": rest}.items()}


def planned(options: SpeedOptions, stage: int, ranks: int, micro_batches: int) -> dict[str, int]:
    """Bytes of one step of one rank by the plan: received by gathers, handed to the reduction of gradients."""
    zero = json.loads(deepspeed_file(options, stage).read_text(encoding="utf-8"))["zero_optimization"]
    settings = {field: int(zero[key]) for field, key in _SETTINGS.items() if key in zero}
    architecture = load_architecture(options.backbone)
    trainable = trainable_of(architecture, MethodChoice(METHOD, options.rank))
    placement = Placement(devices_per_node=ranks, zero_stage=stage, **settings)
    work = Workload(micro_batches=micro_batches, dtype=options.dtype)
    traffic = plan(architecture, trainable, placement, work).traffic
    return {"gather_bytes": traffic.all_gather_later, "reduce_bytes": traffic.gradients if ranks > 1 else 0}


def deepspeed_file(options: SpeedOptions, stage: int) -> Path:
    """The file of this stage beside the one the options name."""
    return Path(options.deepspeed).with_name(f"zero{stage}.json")


def train_in_world(
    options: SpeedOptions, prepared: PreparedTask, shards: Path, name: str, folder: Path
) -> dict[str, Any]:
    """One run in a launch of its own; its note. Raises RuntimeError with the end of its output where it fails."""
    stage, ranks = WORLDS[name]
    own = replace(options, deepspeed=str(deepspeed_file(options, stage).resolve()))
    spec = write_spec(own, prepared, shards, folder, world=name, method=METHOD)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return run_module("pipeline.benchmarks.speed.ranks_child", spec, child_environment(OMP_NUM_THREADS=threads), ranks)

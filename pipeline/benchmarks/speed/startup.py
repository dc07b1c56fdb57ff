"""Case `startup`: seconds from the `deepspeed` command to the end of the first optimizer step, and what they go to.

The real command learns one task in one step, in a work_dir of its own each time. The job says itself when its process
began and how long each phase took (`StartClock`, in run.json); what lies before its process is the launcher's.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.benchmarks.children import ROOT, child_environment, launcher, run_child
from pipeline.benchmarks.speed.contenders import stream_config
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import Samples, compare, summary
from pipeline.benchmarks.speed.tasks import task_contract

PREPARED, FRESH, TWO_RANKS = "prepared", "not_prepared", "prepared_2_ranks"
EVALUATED_ROWS = 2  # of validation and of test: the clock has stopped by then
Phases = dict[str, float]  # seconds by phase, the launcher's first


def measure_startup(options: SpeedOptions, task: str, folder: Path) -> dict[str, Any]:
    """Seconds to the first step by contender with their phases, and the seconds that imports take by package."""
    folder.mkdir(parents=True)
    contenders = {PREPARED: 1, FRESH: 1}
    if (os.cpu_count() or 1) >= 2 and options.batch_size % 2 == 0:
        contenders[TWO_RANKS] = 2
    shards = prepare_once(options, task, folder)
    runs: dict[str, list[Phases]] = {name: [] for name in contenders}
    for turn in range(options.repeats):
        for name, ranks in contenders.items():
            work_dir = folder / f"{turn}-{name}"
            if name != FRESH:
                shutil.copytree(shards, work_dir / "prepared")
            runs[name].append(launch(write_stream(options, task, work_dir), work_dir, ranks))
            shutil.rmtree(work_dir)
    return startup_report(runs) | {"imports": import_seconds()}


def startup_report(runs: Mapping[str, list[Phases]]) -> dict[str, Any]:
    """The report from the phases of every launch, in rounds."""
    seconds: Samples = {name: [sum(phases.values()) for phases in own] for name, own in runs.items()}
    pairs = [(name, PREPARED) for name in runs if name != PREPARED]
    names = {name: list(own[0]) for name, own in runs.items()}
    return compare(seconds, pairs) | {
        "phases": {name: {p: summary([run[p] for run in own]) for p in names[name]} for name, own in runs.items()}
    }


def write_stream(options: SpeedOptions, task: str, work_dir: Path) -> Path:
    """A stream of one task and one step, with its contract beside it; returns the stream file."""
    work_dir.mkdir(parents=True, exist_ok=True)
    contract = task_contract(options.data, task, options.max_tokens).model_dump(mode="json", by_alias=True)
    (work_dir / "measured.yaml").write_text(yaml.safe_dump(contract, sort_keys=False), encoding="utf-8")
    stream = stream_config(options, "moe_cl", work_dir).model_dump(mode="json") | {
        "tasks": [str(work_dir / "measured.yaml")],
        "rows": {"train": options.batch_size, "validation": EVALUATED_ROWS, "test": EVALUATED_ROWS},
    }
    (work_dir / "stream.yaml").write_text(yaml.safe_dump(stream, sort_keys=False), encoding="utf-8")
    return work_dir / "stream.yaml"


def prepare_once(options: SpeedOptions, task: str, folder: Path) -> Path:
    """The folder of the task's shards, made by the job that needs no device."""
    work_dir = folder / "prepared"
    stream = write_stream(options, task, work_dir)
    command = [sys.executable, ROOT / "jobs/continual.py", "--stream", stream, "--stages", "validate,prepare"]
    run_child(command, child_environment())
    return work_dir / "prepared"


def launch(stream: Path, work_dir: Path, ranks: int) -> Phases:
    """One launch of the real command; the launcher's seconds and those of rank 0's phases.

    Raises RuntimeError with the end of its output where it fails.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [*launcher(ranks), ROOT / "jobs/continual.py", "--stream", stream]
    began = time.time()
    run_child(command, child_environment(OMP_NUM_THREADS=threads))
    record = json.loads(next(work_dir.glob("increments/*/run.json")).read_text(encoding="utf-8"))["startup"]
    return {"launcher": record["began"] - began, **dict(record["phases"])}


def import_seconds(repeats: int = 3) -> dict[str, float]:
    """Median seconds by package of what the job imports at its start, its own time alone, largest first.

    From `python -X importtime`, which makes imports about a fifth slower; packages under 50 ms are one entry.
    """
    command = [sys.executable, "-X", "importtime", "-c", "import pipeline.continual"]
    parsed = [parse_import_times(run_child(command, child_environment())) for _ in range(repeats)]
    medians = {name: statistics.median(run.get(name, 0.0) for run in parsed) for name in parsed[0]}
    shown = {name: seconds for name, seconds in medians.items() if seconds >= 0.05}
    shown = dict(sorted(shown.items(), key=lambda item: -item[1]))
    return {**shown, "others": sum(medians.values()) - sum(shown.values())}


def parse_import_times(text: str) -> dict[str, float]:
    """Seconds by top-level package from the lines 'import time: own us | cumulative us | module'."""
    seconds: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        if line.startswith("import time:") and own.strip().isdigit():
            seconds[rest.rpartition("|")[2].strip().partition(".")[0]] += int(own) / 1e6
    return dict(seconds)

"""One run of the speed benchmark: the cases one after another, the report written after each."""

import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.backbones.load import load_tokenizer, skeleton
from pipeline.benchmarks.machine import describe_machine, describe_software, load_average, peak_bytes
from pipeline.benchmarks.speed.data import measure_data
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.ranks import measure_ranks
from pipeline.benchmarks.speed.report import draw
from pipeline.benchmarks.speed.scoring import measure_evaluation
from pipeline.benchmarks.speed.startup import measure_startup
from pipeline.benchmarks.speed.steps import measure_steps
from pipeline.benchmarks.speed.tasks import label_names, most_labels, prepare_task, task_names
from pipeline.benchmarks.speed.trainer import measure_training
from pipeline.benchmarks.speed.validation import measure_validation
from pipeline.config import BackboneConfig
from pipeline.files import write_atomic
from pipeline.placement.distributed import start_world

FORMAT = 1
Reports = dict[str, dict[str, Any]]  # case -> what was measured


def run_speed(options: SpeedOptions, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the cases asked for; writes `out` (JSON) and a picture beside it after every case, returns the report.

    Raises UserError, before anything is measured, for a backbone or data that a case cannot do without.
    """
    check(options)
    if not out.parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}; make it or name another file")
    report: dict[str, Any] = {
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "software": describe_software(),
        "backbone": Path(options.backbone).resolve().name,
        "settings": options.public(),
        "cases": {},
    }
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        for reports in measure(options, Path(folder), say):
            load = load_average()
            report["cases"] |= {name: {**case, "load_average_after": load} for name, case in reports.items()}
            report["peak_bytes_of_this_process"] = peak_bytes()
            write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
            draw(report, out.with_suffix(".png"))
    return report


def check(options: SpeedOptions) -> None:
    """Raise UserError for what cannot be measured."""
    _, family = skeleton(BackboneConfig(path=options.backbone, dtype=options.dtype))
    if family.routed is not None:
        raise UserError(f"the speed benchmark is for dense backbones; {options.backbone} is a {family.model_type}")
    for task in (*(options.tasks or task_names(options.data)), *([options.label_task] if options.label_task else [])):
        label_names(options.data, task)


def measure(options: SpeedOptions, folder: Path, say: Callable[[str], None]) -> Iterator[Reports]:
    """The reports of each case as they come. Processes of the trainer case come first: this one is small by then."""
    tokenizer = load_tokenizer(BackboneConfig(path=options.backbone, dtype=options.dtype))
    tasks = options.tasks or tuple(task_names(options.data))

    def prepared(task: str):
        shards = folder / "shards" / f"{task}-{len(list(folder.glob('shards/*')))}"
        shards.parent.mkdir(exist_ok=True)
        return prepare_task(options.data, task, tokenizer, options.max_tokens, shards), shards

    if "startup" in options.cases:
        say(f"startup: {tasks[0]}, {options.repeats} rounds of launches")
        yield {"startup": measure_startup(options, tasks[0], folder / "startup")}
    if "trainer" in options.cases:
        for task in tasks:
            say(f"trainer: {task}, {options.repeats} rounds of {options.warmup} + {options.steps} steps")
            yield {f"trainer on {task}": measure_training(options, *prepared(task), folder / "runs" / task)}
    if "ranks" in options.cases:
        say(f"ranks: {tasks[0]}, {options.repeats} rounds of {options.warmup} + {options.steps} steps")
        yield {"ranks": measure_ranks(options, *prepared(tasks[0]), folder / "ranks")}
    if "validation" in options.cases:
        say(f"validation: {options.validation_rows:,} rows")
        own = folder / "validation"
        own.mkdir()
        yield measure_validation(options, tokenizer, own)
    if "data" in options.cases:
        say(f"data: verdicts of up to {5 * options.validation_rows:,} rows, tokenising")
        yield measure_data(options, folder / "data")
    if {"step", "evaluation"} & set(options.cases):
        world = start_world()
        if "step" in options.cases:
            say(f"step: {tasks[0]}, {options.warmup} + {options.repeats} rounds")
            yield {"step": measure_steps(options, prepared(tasks[0])[0], world, tokenizer, folder / "step")}
        if "evaluation" in options.cases:
            task = options.label_task or most_labels(options.data)
            say(f"evaluation: {options.rows} rows of {task}, {options.repeats} rounds")
            yield measure_evaluation(options, prepared(task)[0], world, tokenizer, folder / "evaluation")

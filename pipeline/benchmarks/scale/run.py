"""One run of the scale benchmark: increments one after another through the product's own stages, each measured."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.backbones.load import load_tokenizer
from pipeline.benchmarks.machine import describe_machine, describe_software, load_average
from pipeline.benchmarks.scale.fresh import FreshStream
from pipeline.benchmarks.scale.options import ScaleOptions
from pipeline.benchmarks.scale.report import draw, summarise
from pipeline.benchmarks.scale.synthetic import Sample, make_backbone, make_task
from pipeline.config import StreamConfig, build_method
from pipeline.continual import backbone_record, learn
from pipeline.data.tokens import PreparedTask
from pipeline.experts.bank import Bank
from pipeline.files import write_atomic
from pipeline.placement.distributed import start_world
from pipeline.placement.learner import build_learner
from pipeline.stages.job import Job, leaving_no_garbage
from pipeline.stages.prepare import prepare
from pipeline.stages.validate import validate
from pipeline.tracking.champion import CHAMPION
from pipeline.tracking.history import History
from pipeline.tracking.manifest import MANIFEST, RUN, Manifest
from pipeline.tracking.mlflow_log import Tracker
from pipeline.training.stop import StopFlag

FORMAT = 2
_ZERO3 = Path(__file__).resolve().parents[3] / "deepspeed_configs" / "zero3.json"


def run_scale(options: ScaleOptions, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Learn `options.increments` synthetic tasks; writes `out` (JSON) and a picture beside it, returns the report.

    The last window's increments take turns with the first ones of a second stream, and are held against these.
    The report is written again every 100 increments, so that a run that is stopped keeps what it has. Raises UserError
    for a place that cannot be written, and where the kernel does not tell a process's resident memory.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}; make it or name another file")
    if not Path("/proc/self/statm").is_file():
        raise UserError("scale reads a process's resident memory from /proc/self/statm, which this system lacks")
    report: dict[str, Any] = {
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "software": describe_software(),
        "settings": options.public(),
    }
    samples: list[Sample] = []
    fresh: list[Sample] = []
    started, shown = time.monotonic(), time.monotonic()

    def write() -> None:
        with leaving_no_garbage():  # a picture is some MB of objects in cycles, and none of the product's
            figures = summarise(options, samples, fresh)
            report.update(figures, load_average_after=load_average(), increments=samples, second_stream=fresh)
            write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
            draw(report, out.with_suffix(".png"))

    folder = Path(options.work_dir or tempfile.mkdtemp(prefix="scale-"))
    (first, _), (turns, _) = options.windows["first"], options.windows["last"]
    second: FreshStream | None = None
    with contextlib.ExitStack() as stack:
        if options.work_dir is None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for sample in increments(options, folder):
            samples.append(sample)
            if len(samples) == turns - 1:
                second = stack.enter_context(FreshStream(options, folder / "second"))
                fresh += [second.next() for _ in range(1, first)]
            elif second is not None:
                fresh.append(second.next())
            now = time.monotonic()
            if now - shown > 5 or len(samples) == options.increments:
                shown = now
                left = (now - started) / len(samples) * (options.increments - len(samples))
                say(
                    f"increment {len(samples)}/{options.increments}  {sample['total_seconds']:.2f} s  "
                    f"{sample['resident_bytes'] / 1e6:,.0f} MB  {int(left // 60):02d}:{int(left % 60):02d} left"
                )
            if len(samples) % 100 == 0 and len(samples) < options.increments:
                write()
        write()
    return report


def increments(options: ScaleOptions, folder: Path) -> Iterator[Sample]:
    """Learn one task after another in one process, as a stream to which a task is added each time."""
    data, work_dir = folder / "data", folder / "work"
    data.mkdir(parents=True)
    make_backbone(folder / "backbone", options.width, options.layers, options.seed)
    paths = [str(make_task(data, number, options.rows, options.seed)) for number in range(1, options.increments + 1)]
    job, tracker = start(options, folder, work_dir, paths[:1])
    try:
        yield from learn_all(job, tracker, paths)
    finally:
        if tracker is not None:
            tracker.close()


def learn_all(job: Job, tracker: Tracker | None, paths: Sequence[str]) -> Iterator[Sample]:
    """Learn the tasks of these contracts one after another."""
    backbone, stop = backbone_record(job.config), StopFlag()
    history, prepared, tasks = History(), {}, []
    for path in paths:
        tasks.append(path)
        job.config = job.config.model_copy(update={"tasks": tuple(tasks)})
        with quiet():
            begin = time.perf_counter()
            with leaving_no_garbage():
                validated = validate(path, job.config, job.tokenizer, history)
                task: PreparedTask = prepare(validated, job.tokenizer)
                del validated
            prepared[task.task] = task
            ready = time.perf_counter()
            with leaving_no_garbage():
                manifest = learn(job, task, prepared, history, backbone, tracker, stop)
            history.add(manifest)
            learned = time.perf_counter()
            if tracker is not None:
                tracker.flush()  # nothing of this increment goes on beside the next one, or the other stream's
            end = time.perf_counter()
        seconds = {f"{part}_seconds": value for part, value in job.seconds.items()}
        if tracker is not None:
            seconds["delivery_seconds"] = end - learned
        yield {"prepare_seconds": ready - begin, **seconds, "total_seconds": end - begin, **left_bytes(job, manifest)}


def start(options: ScaleOptions, folder: Path, work_dir: Path, tasks: list[str]) -> tuple[Job, Tracker | None]:
    """The job as `run_stream` builds it, without a launcher, and its tracker if one is asked for."""
    config = StreamConfig.model_validate(
        {
            "stream": "scale",
            "work_dir": str(work_dir),
            "data_roots": [str(folder / "data")],
            "backbone": {"path": str(folder / "backbone"), "dtype": "float32"},
            "tasks": tasks,
            "method": {"name": "moe_cl", "lora": {"rank": options.rank, "alpha": 2 * options.rank, "dropout": 0.0}},
            "training": {"epochs": 1, "batch_size": options.batch_size, "learning_rate": 1e-3},
            "evaluation": {"earlier_tasks": options.earlier_tasks},
            "gate": {"max_regression": None},
            "deepspeed": str(_ZERO3),
            "seed": options.seed,
        }
    )
    work_dir.mkdir()
    method, world = build_method(config), start_world()
    learner = build_learner(config, method.plan, world, train=True)
    job = Job(config, world, work_dir, method, load_tokenizer(config.backbone), learner, Bank(work_dir / "bank"), {})
    return job, Tracker(work_dir, config.stream, config.tracking) if options.mlflow else None


def left_bytes(job: Job, manifest: Manifest) -> Sample:
    """What the increment has left on disk and what the process holds, in bytes; the rows it scored."""
    folder = job.work_dir / "increments" / manifest.folder
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident_bytes": resident,
        "manifest_bytes": (folder / MANIFEST).stat().st_size,
        "bank_bytes": sum(job.bank.path(sha).stat().st_size for sha in manifest.bank.values()),
        "run_json_bytes": (folder / RUN).stat().st_size,
        "champion_bytes": (job.work_dir / CHAMPION).stat().st_size,
        "scored_tasks": len(manifest.row),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the product's own lines from the terminal; they are shown where something goes wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise

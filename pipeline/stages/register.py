"""Stage 6: stage the increment's files, publish them into the chain, tell MLflow."""

import io
import shutil
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.tokens import PreparedTask
from pipeline.evaluation.review_cost import REVIEW
from pipeline.files import canonical_json, sha256_file, write_atomic
from pipeline.methods.protocol import PAST, Increment
from pipeline.stages.evaluate import Evaluated
from pipeline.stages.gate import Verdict
from pipeline.stages.job import Job
from pipeline.stages.train import Trained
from pipeline.store.published import open_store
from pipeline.tracking.chain import drafted, publish
from pipeline.tracking.history import History
from pipeline.tracking.manifest import RUN, Manifest
from pipeline.tracking.matrix_rows import SHOWN, matrix_of, newest_rows
from pipeline.tracking.versions import code_digest, library_versions

INFERRED = "predictions_inferred"  # folder of the predictions without task ids


@dataclass(frozen=True)
class Context:
    """What the record needs beside the results."""

    history: History
    backbone: dict[str, str]  # digest, model_type, dtype
    inputs_key: str
    run_id: str
    started: str  # ISO time
    user: str
    startup: dict[str, Any] = field(
        default_factory=dict
    )  # `StartClock.record` where a launch began with this increment


def register(
    job: Job,
    increment: Increment,
    prepared: PreparedTask,
    trained: Trained,
    evaluated: Evaluated,
    verdict: Verdict,
    context: Context,
) -> Manifest:
    """Publish one increment, promoted or rejected. Rank 0 only. At any kill the old or the new champion stands
    whole.
    """
    staged = job.inflight / f"publish-{increment.number}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    manifest = manifest_of(job, increment, prepared, trained, evaluated, verdict, context)
    with drafted(job.work_dir, manifest) as draft:
        stage_files(staged, job, increment, prepared, evaluated, verdict, context)
        files = {
            path.relative_to(staged).as_posix(): sha256_file(path)
            for path in sorted(staged.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest.model_validate(manifest.model_dump() | {"files": files})
        write_atomic(staged / RUN, canonical_json(run_record(job, trained, context)).encode())
        with job.timed("publish"):
            store = open_store(job.config.store.uri) if job.config.store else None
            publish(job.work_dir, staged, manifest, store, draft=draft)
    return manifest


def manifest_of(
    job: Job,
    increment: Increment,
    prepared: PreparedTask,
    trained: Trained,
    evaluated: Evaluated,
    verdict: Verdict,
    context: Context,
) -> Manifest:
    """The increment's manifest; the digests of its files are still wanting."""
    return Manifest(
        increment=increment.number,
        task=increment.task,
        parent=context.history.head_sha256,
        contract={
            "version": prepared.contract.version,
            "digest": prepared.contract.digest,
            "labels": prepared.contract.labels,
            "prompt": prepared.contract.prompt,
        },
        data={split: data_record(prepared, split) for split in prepared.splits},
        learning=job.config.learning(),
        learning_digest=job.learning_digest,
        training={"steps": trained.steps, "rows_consumed": trained.rows_consumed} | trained.account,
        backbone=context.backbone,
        method=job.config.method["name"],
        verdict="promoted" if verdict.promoted else "rejected",
        bundles=evaluated.bundles if verdict.promoted else {},
        bank={name: sha for name, sha in trained.bundle.items() if not name.startswith(PAST)} | trained.state,
        state=trained.state if verdict.promoted else {},
        row=evaluated.row,
        row_inferred=evaluated.inferred.row,
        validation_row=evaluated.validation_row,
        files={},
        gate=verdict.to_dict() | {"retention": evaluated.retention},
        versions=library_versions() | {"code": code_digest()},
    )


def stage_files(
    folder: Path,
    job: Job,
    increment: Increment,
    prepared: PreparedTask,
    evaluated: Evaluated,
    verdict: Verdict,
    context: Context,
) -> None:
    """Every file of the increment but manifest.json and run.json: row, contract, predictions, thresholds,
    heat map.
    """
    row = {
        "increment": increment.number,
        "task": increment.task,
        "test": evaluated.row,
        "validation": evaluated.validation_row,
        "baselines": evaluated.baselines,
        "retention": evaluated.retention,
    }
    if evaluated.inferred.row:
        row |= {"test_inferred": evaluated.inferred.row, "routing": evaluated.inferred.routing}
    write_atomic(folder / "row.json", canonical_json(row).encode())
    if evaluated.review:
        write_atomic(folder / REVIEW, canonical_json(evaluated.review).encode())
    write_atomic(
        folder / "contract.json", canonical_json(prepared.contract.model_dump(mode="json", by_alias=True)).encode()
    )
    for place, tables in (("predictions", evaluated.predictions), (INFERRED, evaluated.inferred.predictions)):
        for task, table in tables.items():
            write_atomic(folder / place / f"{task}.parquet", parquet_bytes(table))
    from pipeline.evaluation.plots import heat_map  # matplotlib: rank 0 alone draws, once an increment is learned

    learned = newest_rows(context.history.learned, SHOWN)
    tasks, rows, names = matrix_of([*learned, (increment.task, evaluated.row)][-SHOWN:])
    title = f"{job.config.stream}: {job.config.method['name']} after increment {increment.number}"
    if (total := len({*increment.order, increment.task})) > len(tasks):
        title += f", the newest {len(tasks)} of {total} tasks"
    heat_map(tasks, rows, folder / "report.png", title if verdict.promoted else f"{title} (rejected)", names)


def data_record(prepared: PreparedTask, split: str) -> dict[str, Any]:
    """The manifest's account of one split."""
    counts = prepared.counts[split]
    return {
        "digest": prepared.data_digests[split],
        "rows_in": counts["rows_in"],
        "kept": counts["kept"],
        "rejected": counts["rejected"],
    }


def run_record(job: Job, trained: Trained, context: Context) -> dict[str, Any]:
    """run.json: what differs between runs of the same learning. Outside the chain."""
    return {
        "started": context.started,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": context.user,
        "host": socket.gethostname(),
        "work_dir": str(job.work_dir),
        "world_size": job.world.size,
        "device": str(job.world.device),
        "config": job.config.model_dump(mode="json"),
        "continuations": trained.continuations,
        "seconds": {part: round(seconds, 3) for part, seconds in job.seconds.items()},  # as far as they are over
        "inputs_key": context.inputs_key,
        "mlflow_run_id": context.run_id,
        "startup": context.startup,
    }


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()

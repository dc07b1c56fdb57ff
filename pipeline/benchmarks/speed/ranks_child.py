"""One training run of one world, started by `ranks.py` on every rank; rank 0 writes note.json beside the spec.

    deepspeed --num_accelerators N --module pipeline.benchmarks.speed.ranks_child SPEC      (or plain python for one)

Counted are the steps after the warm-up; `PROBED` more follow with every collective run by itself, for the breakdown.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pipeline.training.loop as loop
from data_contracts import TaskContract
from pipeline.backbones.load import load_tokenizer
from pipeline.benchmarks.speed.collectives import Collectives
from pipeline.benchmarks.speed.contenders import build_job, second_increment
from pipeline.benchmarks.speed.machine import peak_bytes
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.config import BackboneConfig
from pipeline.data.batching import row_order
from pipeline.data.tokens import open_shards
from pipeline.placement.distributed import start_world
from pipeline.training.stop import StopFlag

PROBED = 3  # steps


def main(spec_file: str) -> None:
    """Train as the spec says and leave a note."""
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    options = SpeedOptions.of(spec["options"])
    world = start_world()
    prepared = open_shards(TaskContract.model_validate(spec["contract"]), Path(spec["shards"]))
    counted = range(options.warmup, options.warmup + options.steps)
    rows = prepared.rows("train", (counted.stop + PROBED) * options.batch_size, options.seed)
    tokenizer = load_tokenizer(BackboneConfig(path=options.backbone, dtype=options.dtype))
    job = build_job(options, spec["method"], Path(spec["work_dir"]), world, tokenizer, train=True)
    start = second_increment(job)
    steps: list[dict[str, Any]] = []
    passes: list[int] = []
    stock = loop.forward

    def forward(*arguments: Any) -> Any:
        passes.append(1)
        return stock(*arguments)

    loop.forward = forward
    with Collectives() as collectives:

        def on_step(log) -> None:
            steps.append({"end": time.perf_counter(), "loss": log.loss, "passes": len(passes), **collectives.taken()})
            passes.clear()
            collectives.probing = len(steps) >= counted.stop
            if collectives.probing:
                world.barrier()

        loop.train_rows(
            job.learner,
            job.method,
            job.config,
            rows,
            start,
            seed=options.seed,
            inflight=job.inflight,
            key="speed",
            title=spec["world"],
            stop=StopFlag(),
            on_step=on_step,
        )
    loop.forward = stock
    for step, before in zip(steps[:0:-1], steps[-2::-1], strict=True):
        step["seconds"] = step.pop("end") - before["end"]
    chosen = row_order(len(rows), 1, options.seed)[
        counted.start * options.batch_size : counted.stop * options.batch_size
    ]
    notes = world.gather(
        {
            "steps": steps[counted.start : counted.stop],
            "probed": steps[counted.stop :],
            "peak_bytes": peak_bytes(),
            "threads": torch.get_num_threads(),
        }
    )
    if world.is_main:
        note = {
            "seconds": sum(step["seconds"] for step in notes[0]["steps"]),
            "rows": len(chosen),
            "tokens": int(rows.lengths[chosen].sum()),
            "loss": notes[0]["steps"][-1]["loss"],
            "ranks": notes,
        }
        Path(spec_file).with_name("note.json").write_text(json.dumps(note), encoding="utf-8")
    world.barrier()


if __name__ == "__main__":
    main(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))

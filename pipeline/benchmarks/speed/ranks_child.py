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
from pipeline.benchmarks.machine import peak_bytes
from pipeline.benchmarks.speed.collectives import Collectives
from pipeline.benchmarks.speed.contenders import Spec, train_by_loop
from pipeline.data.batching import row_order
from pipeline.placement.distributed import start_world

PROBED = 3  # steps


def main(spec_file: str) -> None:
    """Train as the spec says and leave a note."""
    spec = Spec.read(spec_file)
    options = spec.options
    world = start_world()
    counted = range(options.warmup, options.warmup + options.steps)
    rows = spec.prepared.rows("train", (counted.stop + PROBED) * options.batch_size, options.seed)
    steps: list[dict[str, Any]] = []
    passes: list[int] = []
    stock = loop.forward

    def forward(*arguments: Any) -> Any:
        passes.append(1)
        return stock(*arguments)

    loop.forward = forward
    with Collectives() as collectives:

        def on_step(log: loop.StepLog) -> None:
            steps.append({"end": time.perf_counter(), "loss": log.loss, "passes": len(passes), **collectives.taken()})
            passes.clear()
            collectives.probing = len(steps) >= counted.stop
            if collectives.probing:
                world.barrier()

        train_by_loop(spec, spec.given["method"], rows, world, on_step=on_step)
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

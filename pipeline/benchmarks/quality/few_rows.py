"""What a stream does not measure by itself on the fewer test rows of the increments before its last.

- <WORK_DIR>/ahead/<task>.parquet: each task before it is learned, for forward transfer (METHODS section 5).
- <WORK_DIR>/again/<task>.parquet: each task after the last increment, in the same batches as when it was learned. In
  bf16 a row's scores depend a little on the rows of its batch, so a subset of the last, larger evaluation would show
  gains and losses where nothing has changed.

A process of its own, after the stream: `python -m pipeline.benchmarks.quality.few_rows WORK_DIR TEST_ROWS`. It opens
the work_dir as jobs/evaluate.py does.
"""

import sys
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.launch import AGAIN, AHEAD
from pipeline.files import write_atomic
from pipeline.methods.protocol import Bundle
from pipeline.serving import Served, open_served
from pipeline.stages.evaluate import measure
from pipeline.stages.prepare import PreparedTask, prepare
from pipeline.stages.register import parquet_bytes
from pipeline.stages.validate import validate
from pipeline.tracking.chain import fold
from pipeline.tracking.history import History


def unseen_bundle(method: str, latest: Bundle) -> Bundle:
    """What a task is served with before it is learned: the shared expert alone; without one the latest adapter; under
    `per_task` the bare backbone. `latest` is the bundle of the newest task.
    """
    if method == "per_task":
        return {}
    return {"shared": latest["shared"]} if "shared" in latest else latest


def answer_ahead_and_again(served: Served, ahead: Path, again: Path) -> None:
    """Answer each task of the stream but the first with what the increment before could serve it with, and all with
    what they are served with now. Collective.
    """
    job, history = served.job, History.of(served.chain)
    chain = sorted(served.chain, key=lambda manifest: manifest.increment)
    stream = [
        job.world.on_main(lambda path=path: validate(path, job.config, job.tokenizer, history))
        for path in job.config.tasks
    ]
    task_of = {validated.contract.task: prepare(validated, job.tokenizer) for validated in stream}
    for place, manifest in enumerate(chain[1:], start=1):
        before = chain[place - 1]
        bundle = unseen_bundle(before.method, fold(chain[:place]).bundles[before.task])
        answer(served, task_of[manifest.task], bundle, ahead)
    bundles = fold(chain).bundles
    for manifest in chain:
        answer(served, task_of[manifest.task], bundles[manifest.task], again)


def answer(served: Served, prepared: PreparedTask, bundle: Bundle, folder: Path) -> None:
    """Answer a task's test rows under a bundle and write <folder>/<task>.parquet. Collective."""
    measured = measure(served.job, prepared, bundle, "test")
    table = measured.answers.table(measured.rows.column("row_id"), measured.rows.column("reference"))
    if served.job.world.is_main:
        write_atomic(folder / f"{prepared.task}.parquet", parquet_bytes(table))


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 with one sentence."""
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    work_dir, test_rows = arguments
    try:
        served = open_served(work_dir, None, [f"rows.test={test_rows}"])
        answer_ahead_and_again(served, Path(work_dir) / AHEAD, Path(work_dir) / AGAIN)
    except UserError as error:
        print(f"few_rows: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

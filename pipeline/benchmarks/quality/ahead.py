"""The test rows of each task before it is learned, for forward transfer (METHODS section 5).

A process of its own, after the stream: `python -m pipeline.benchmarks.quality.ahead WORK_DIR TEST_ROWS`. It opens the
work_dir as jobs/evaluate.py does and writes <WORK_DIR>/ahead/<task>.parquet with the answers of the increment before.
"""

import sys
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.launch import AHEAD
from pipeline.files import write_atomic
from pipeline.methods.protocol import Bundle
from pipeline.serving import Served, open_served
from pipeline.stages.evaluate import measure
from pipeline.stages.prepare import prepare
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


def answer_ahead(served: Served, folder: Path) -> None:
    """Answer each task of the stream but the first with what the increment before could serve it with. Collective."""
    job, history = served.job, History.of(served.chain)
    chain = sorted(served.chain, key=lambda manifest: manifest.increment)
    stream = [
        job.world.on_main(lambda path=path: validate(path, job.config, job.tokenizer, history))
        for path in job.config.tasks
    ]
    task_of = {validated.contract.task: validated for validated in stream}
    for place, manifest in enumerate(chain[1:], start=1):
        before = chain[place - 1]
        bundle = unseen_bundle(before.method, fold(chain[:place]).bundles[before.task])
        measured = measure(job, prepare(task_of[manifest.task], job.tokenizer), bundle, "test")
        table = measured.answers.table(measured.rows.column("row_id"), measured.rows.column("reference"))
        if job.world.is_main:
            write_atomic(folder / f"{manifest.task}.parquet", parquet_bytes(table))


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 with one sentence."""
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    work_dir, test_rows = arguments
    try:
        answer_ahead(open_served(work_dir, None, [f"rows.test={test_rows}"]), Path(work_dir) / AHEAD)
    except UserError as error:
        print(f"ahead: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

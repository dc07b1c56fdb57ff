"""Two ranks of `jobs/continual.py`, forked; rank 1 sleeps in every forward pass, and each writes down how long the loop
found its steps.

    python -m tests.spans.worker PORT STREAM SECONDS FOLDER
"""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

from tests import forked

JOB = str(forked.ROOT / "jobs" / "continual.py")


def main(port: int, stream: str, seconds: float, folder: Path) -> int:
    """Fork the ranks and wait for them; the exit code."""
    for module in (*forked.IMPORTED, "transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe"):
        importlib.import_module(module)
    from pipeline.training import loop

    def slow(rank: int) -> None:
        forward, log = loop.forward, loop.StepLog

        def late(*arguments):
            if rank == 1:
                time.sleep(seconds)
            return forward(*arguments)

        def noted(*arguments):
            made = log(*arguments)
            with open(folder / f"{rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")
            return made

        loop.forward, loop.StepLog = late, noted

    return forked.wait_for(forked.start(2, port, JOB, ["--stream", stream], slow))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])))

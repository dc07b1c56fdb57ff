"""One rank of the multi-process tests: runs the cases of a plan one after another through the product's own functions.

    deepspeed --num_accelerators N tests/distributed/worker.py plan.json      (or plain python for one rank)

Each case leaves <folder>/rank<r>.json on every rank and, on rank 0, what its kind writes beside. It only records: the
tests compare.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch

from pipeline.placement.distributed import World, start_world

Kinds = Mapping[str, Callable[[World, dict[str, Any], Path], dict[str, Any]]]


def main(kinds: Kinds) -> int:
    """Run the plan named on the command line; a rank that fails ends the launch."""
    plan = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    torch.set_num_threads(1)  # the ranks of a test share two cores
    world = start_world(timeout_seconds=120)
    for case in json.loads(Path(plan).read_text(encoding="utf-8")):
        folder = Path(case["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        try:
            note = kinds[case["kind"]](world, case, folder)
        except BaseException:
            print(f"rank {world.rank}, case {folder.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise
        note["shared_memory_op"] = repr(deepspeed.comm.comm.cdb.shm_comm_op)
        (folder / f"rank{world.rank}.json").write_text(json.dumps(note), encoding="utf-8")
        gc.collect()
        world.barrier()
        print(f"rank {world.rank}, case {folder.name}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    from tests.distributed.learning import learn
    from tests.placement.round_trips import round_trips

    sys.exit(main({"learn": learn, "round_trips": round_trips}))

"""`jobs/continual.py` with a rank that goes wrong: `failing.py HOW [ARGUMENT ...]`.

At its third step rank 1 then stands still for ever: `asleep` before the step's first collective; `alone`, in a
collective that nobody else enters; `holding` the interpreter, so that no other thread runs either. `slow` goes
right. Rank 1 prints `now` at that step. Every step takes a quarter of a second longer than it needs, so that there is
time to send a signal. The configured limits hold from that step on: a busy machine may take longer than a test's few
seconds to get there.
"""

import ctypes
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.continual import main
from pipeline.watch import rank as watch

FOR_EVER = 100_000  # seconds
AT_STEP = 2  # from 0


def go_wrong(how: str, world) -> None:
    """Do not come back, unless `slow`."""
    if how == "asleep":
        time.sleep(FOR_EVER)
    if how == "alone":
        world.barrier()
        time.sleep(FOR_EVER)
    if how == "holding":
        ctypes.PyDLL(None).sleep(FOR_EVER)


def failing(how: str, arguments: list[str]) -> int:
    """Run the job; its exit code."""
    from pipeline.training import loop

    step_as_it_is, limit_it = loop.run_global_batch, watch.set_limits
    limits = {}
    watch.set_limits = limits.update

    @functools.wraps(step_as_it_is)
    def one_step(learner, method, config, rows, chosen, step, *others):
        time.sleep(0.25)
        if step == AT_STEP:
            limit_it(**limits)
        if step == AT_STEP and learner.world.rank == 1:
            print("now", flush=True)
            go_wrong(how, learner.world)
        return step_as_it_is(learner, method, config, rows, chosen, step, *others)

    loop.run_global_batch = one_step
    return main(arguments)


if __name__ == "__main__":
    local_rank = [argument for argument in sys.argv[1:] if argument.startswith("--local_rank")]
    kind, *rest = [argument for argument in sys.argv[1:] if argument not in local_rank]
    sys.exit(watch.watched(lambda: failing(kind, [*rest, *local_rank])))

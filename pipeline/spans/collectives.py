"""Times DeepSpeed's collectives: ZeRO's gathers and reductions, the all-to-all of expert parallelism.

All of them pass one object, DeepSpeed's backend, whose methods are covered while the context lasts. The time of an
asynchronous one is what its call and the wait for it take: what the rank's work stood still for, not what ran beside
it. On a device that works beside the host (CUDA) both return before the data is there, and the time is the host's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from deepspeed.comm import comm

KINDS = {
    "all_gather": "gather",
    "all_gather_into_tensor": "gather",
    "all_gather_coalesced": "gather",
    "broadcast": "gather",
    "all_to_all_single": "all_to_all",
    "all_to_all": "all_to_all",
    "reduce_scatter": "reduce",
    "reduce_scatter_tensor": "reduce",
    "reduce": "reduce",
    "all_reduce": "reduce",
    "all_reduce_coalesced": "reduce",
    "barrier": "wait",
}
Add = Callable[[str, float, float], None]  # name, Unix time of the start, seconds


@contextmanager
def timed_collectives(add: Add) -> Iterator[None]:
    """Tell `add` of every collective inside."""
    backend = comm.cdb
    covered = {name: kind for name, kind in KINDS.items() if hasattr(backend, name)}
    for name, kind in covered.items():
        setattr(backend, name, _timed(getattr(backend, name), kind, add))
    try:
        yield
    finally:
        for name in covered:
            delattr(backend, name)  # the class's own method shows again


def _timed(method: Callable[..., Any], kind: str, add: Add) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin, clock = time.time(), time.perf_counter()
        try:
            result = method(*args, **kwargs)
        finally:
            add(kind, begin, time.perf_counter() - clock)
        return result if result is None or not hasattr(result, "wait") else TimedWork(result, kind, add)

    return call


class TimedWork:
    """The handle of an asynchronous collective, whose waiting is timed; in all else the handle itself."""

    def __init__(self, work: Any, kind: str, add: Add) -> None:
        self._work, self._kind, self._add = work, kind, add

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the collective's end, as the handle does."""
        begin, clock = time.time(), time.perf_counter()
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            self._add(self._kind, begin, time.perf_counter() - clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

"""The start of a job: cheaper imports, and where the time up to the first optimizer step goes."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartClock:
    """Seconds of one phase after another, from the start of this process to the end of its first step."""

    def __init__(self) -> None:
        self.began = self._last = process_began()  # Unix time
        self.phases: dict[str, float] = {}  # seconds, in the order they were passed
        self.running = True

    def passed(self, phase: str) -> None:
        """A phase ends here; it began where the one before ended."""
        now = time.time()
        self.phases[phase] = now - self._last
        self._last = now

    def stop(self, step_seconds: float) -> None:
        """The first step ends here and took `step_seconds`; what lies before it is the increment's opening."""
        self.passed("opening")
        self.phases["opening"] -= step_seconds
        self.phases["first step"] = step_seconds
        self.running = False

    def line(self) -> str:
        """The phases in one line for a person."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        return f"first step done {sum(self.phases.values()):.1f} s after the process began: {parts}"

    def record(self) -> dict[str, object]:
        """What run.json keeps: `began` (Unix time) and `phases`: [name, seconds] in their order."""
        return {"began": self.began, "phases": [list(phase) for phase in self.phases.items()]}


@contextmanager
def imports_without_collections() -> Iterator[None]:
    """No garbage collection while heavy packages are imported: each would walk a million objects that all stay.

    What was imported is then left out of later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def process_began() -> float:
    """Unix time at which the kernel started this process, to 10 ms; now, on a system without /proc."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since boot, field 22 of proc(5)
    except OSError:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")

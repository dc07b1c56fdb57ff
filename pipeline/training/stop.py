"""Stop on request: a signal sets a flag, the loop agrees on it between steps, saves, and the command exits 75."""

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.watch import rank as watch
from pipeline.watch.rank import EXIT_STOPPED

if TYPE_CHECKING:  # a job listens for signals before the seconds that importing DeepSpeed takes
    from pipeline.placement.distributed import World

__all__ = ["EXIT_STOPPED", "StopFlag", "StoppedOnRequest"]


class StoppedOnRequest(Exception):
    """Raised on all ranks after the in-flight state was saved."""


class StopFlag:
    """Set by SIGTERM or SIGINT, or by the host's watchdog. One rank's flag is enough: the loop sums it over the ranks
    at every step.

    `marker` writes the marker of a stop, given its message; set while the job is one that a stop interrupts. `release`
    lets go of what the job holds, for an end without the interpreter's.
    """

    def __init__(self) -> None:
        self.requested = False
        self.marker: Callable[[str], None] | None = None
        self.release: Callable[[], None] | None = None

    def listen(self) -> None:
        """Install the handlers. Further signals change nothing: the watchdog ends what does not stop in time. Without
        one, a second signal of the same kind acts as it would have without us.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        watch.follow(self)

    def check(self, world: "World", message: str) -> None:
        """Raise StoppedOnRequest on all ranks if any of them was asked to stop. Collective."""
        if any(world.sum([float(self.requested)])):
            raise StoppedOnRequest(f"{message}; the same command continues")

    def request(self) -> None:
        """Stop at the next step."""
        self.requested = True

    def leave(self, doing: str) -> None:
        """The process ends before the next step is reached: leave the marker. What is on disk is whole at any moment;
        the same command continues from the state that was saved last.
        """
        if self.marker is not None:
            self.marker(f"{doing}: stopped before it was done; the same command continues")
        if self.release is not None:
            self.release()

    def _handle(self, number: int, _frame) -> None:
        self.request()
        watch.report_stop()
        if not watch.is_watched():
            signal.signal(number, signal.SIG_DFL)

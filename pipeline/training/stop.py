"""Stop on request: a signal sets a flag, the loop agrees on it between steps, saves, and the command exits 75."""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a job listens for signals before the seconds that importing DeepSpeed takes
    from pipeline.placement.distributed import World

EXIT_STOPPED = 75


class StoppedOnRequest(Exception):
    """Raised on all ranks after the in-flight state was saved."""


class StopFlag:
    """Set by SIGTERM or SIGINT. One rank's flag is enough: the loop sums it over the ranks at every step."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Install the handlers; a second signal of the same kind acts as it would have without us."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def check(self, world: "World", message: str) -> None:
        """Raise StoppedOnRequest on all ranks if any of them was asked to stop. Collective."""
        if any(world.sum([float(self.requested)])):
            raise StoppedOnRequest(f"{message}; the same command continues")

    def _handle(self, number: int, _frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)

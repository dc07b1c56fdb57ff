"""Takes events from the outbox to MLflow, in a thread of its own: whoever logs only ever writes the outbox.

A server that is gone, locked or hanging costs the training nothing. It is tried again with each event that comes, at
most every few seconds, and each time somebody asks for `flush`.
"""

import sys
import threading
import time

from data_contracts.credentials import shown
from pipeline.tracking.delivery import Delivery, UnknownRun, is_outage
from pipeline.tracking.outbox import Event, Outbox

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0  # seconds between two tries while events come


class Courier:
    """Delivers the outbox in order. An event that MLflow does not take stays first, and everything behind it waits."""

    def __init__(self, outbox: Outbox, delivery: Delivery):
        self.outbox = outbox
        self.delivery = delivery
        self.problem: Exception | None = None  # why the last try ended early
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pause, self._not_before = _FIRST_PAUSE, 0.0
        self._warned = False

    def send(self, kind: str, data: dict, key: str = "") -> None:
        """Put an event into the outbox; it is delivered when the server takes it."""
        with self._lock:
            self.outbox.append(kind, data, key)
            if self.outbox.not_on_disk and not self._warned:
                self._warned = True
                warn(f"{self.outbox.folder}: cannot be written ({self.outbox.not_on_disk}); events are held in memory")
            if time.monotonic() >= self._not_before:
                self._start()

    def flush(self, seconds: float) -> bool:
        """Try now, and wait at most `seconds` for it. Whether MLflow then knows everything."""
        with self._lock:
            thread = self._start()
        thread.join(seconds)
        with self._lock:
            return not len(self.outbox) and self.problem is None and self._thread is None

    def _start(self) -> threading.Thread:
        """The thread that delivers, started if there is none; the lock is held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
            self._thread.start()
        return self._thread

    def _deliver(self) -> None:
        delivered = 0
        try:
            self.delivery.open()
            while True:
                with self._lock:
                    event = self.outbox.first()
                    if event is None:
                        self._answered(delivered)
                        return
                try:
                    delivered += self._apply(event)
                except UnknownRun as error:
                    if event.kind in ("run", "published"):
                        raise  # the next launch queues the event that makes its parent
                    with self._lock:
                        name = self.outbox.put_aside(event)  # it only adds to a run, and holds up no other
                    warn(f"MLflow at {self.outbox.uri}: {error}; what waited for it is put aside ({name})")
        except Exception as error:  # of whatever kind: a server, a database driver and MLflow each raise their own
            self.delivery.forget()
            with self._lock:
                self._failed(error)

    def _apply(self, event: Event) -> int:
        """Deliver an event, before it those that make the runs it needs where MLflow does not know them; how many.

        Raises UnknownRun where no event that waits makes such a run.
        """
        delivered = 0
        while True:
            try:
                self.delivery.apply(event)
                break
            except UnknownRun as error:
                with self._lock:
                    makes = self.outbox.makes_run(error.key)
                if makes is None:
                    raise
                delivered += self._apply(makes)
        with self._lock:
            self.outbox.remove(event)
        return delivered + 1

    def _answered(self, delivered: int) -> None:
        if self.problem is not None and delivered:
            print(f"MLflow at {self.outbox.uri} has caught up: {delivered} events delivered", flush=True)
        self.problem, self._pause, self._not_before, self._thread = None, _FIRST_PAUSE, 0.0, None

    def _failed(self, error: Exception) -> None:
        passing = self.delivery.was_opened or is_outage(error)
        if passing if self.problem is None else is_outage(self.problem) and not passing:
            warn(
                f"MLflow at {self.outbox.uri} takes nothing at present ({short(error)}); the work goes on, what it is "
                f"to be told waits in {self.outbox.folder} and is delivered when it answers"
            )
        self.problem, self._thread = error, None
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def short(error: Exception, most: int = 200) -> str:
    """An error as one line of at most `most` characters, without a password."""
    text = shown(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)

"""The end of everything that could wait for ever: a phase that outlasts its limit ends the process with 1."""

import os
import sys
import threading
import time
from collections.abc import Callable


class Guard:
    """A thread that watches the phases of this process."""

    def __init__(self, overrun: Callable[[str], None]) -> None:
        self._overrun = overrun  # told the sentence, in the thread
        self._lock = threading.Lock()
        self._phase, self._remedy, self._limit, self._end = "", "", 0.0, float("inf")
        threading.Thread(target=self._watch, daemon=True, name="guard").start()

    def phase(self, name: str, limit: float, remedy: str) -> None:
        """What comes now must end within `limit` seconds."""
        with self._lock:
            self._phase, self._remedy, self._limit, self._end = name, remedy, limit, time.monotonic() + limit

    def off(self) -> None:
        """All phases are through."""
        with self._lock:
            self._end = float("inf")

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            with self._lock:
                if time.monotonic() > self._end:
                    try:
                        self._overrun(f"{self._phase}: no end in {self._limit:g} s; {self._remedy}")
                        sys.stdout.flush()
                        sys.stderr.flush()
                    finally:
                        os._exit(1)

"""Lines for a file, written by a thread. Whoever hands one over never waits: not for a disk that is full, failing,
slow, or gone for good.

What cannot be kept is dropped and counted: in the file as {"name": "dropped", "lines": N} where it can be written
again, and at the end on the standard error.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 0.5  # between two looks at what there is to write
PAUSE_SECONDS = 5.0  # after the disk refused
MOST_LINES = 20_000  # that wait: some MB


class LineWriter:
    """JSON lines into one file, of which at most two parts of `max_bytes` / 2 are kept: the newest, and the one before
    it, `<name>.1.jsonl`.
    """

    def __init__(self, path: Callable[[], Path], max_bytes: int, most_lines: int = MOST_LINES) -> None:
        self._find = path  # called by the thread, since also looking for a folder may take for ever
        self.path: Path | None = None
        self._part = max(4096, max_bytes // 2)
        self._lines: deque[dict[str, Any]] = deque()
        self._most = most_lines
        self.dropped = 0  # lines that were not written and will not be
        self._said = 0  # of them, how many stand in the file
        self._problem = ""
        self._fd = -1
        self._size = 0
        self._not_before = 0.0
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="spans", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Hand over a line; dropped where too many wait."""
        if len(self._lines) >= self._most:
            self.dropped += 1
        else:
            self._lines.append(line)

    def close(self, seconds: float = 2.0) -> None:
        """Write what there is, for at most so many seconds; what is left then is dropped. Says what was dropped."""
        self._closing = True
        self._wake.set()
        self._thread.join(seconds)
        if lost := self.dropped + len(self._lines):
            why = self._problem or ("the disk does not answer" if self._thread.is_alive() else "too many at once")
            print(f"warning: spans: {lost} lines dropped ({why}); the run itself is whole", file=sys.stderr, flush=True)

    def _work(self) -> None:
        while True:
            self._wake.wait(FLUSH_SECONDS)
            last = self._closing
            if self._lines and (last or time.monotonic() >= self._not_before):
                self._flush()
            if last:
                if self._fd >= 0:
                    os.close(self._fd)
                return

    def _flush(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if self.dropped > self._said:
            lines.append({"name": "dropped", "start": time.time(), "seconds": 0.0, "lines": self.dropped - self._said})
        dropped = self.dropped
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        try:
            self._open()
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            self._size += written
            self._said = dropped
        except OSError as error:
            self.dropped += len(lines) - (dropped > self._said)
            self._refused(error)

    def _open(self) -> None:
        if self.path is None:
            self.path = self._find()
        if self._fd >= 0 and self._size >= self._part:
            os.close(self._fd)
            self._fd = -1
            os.replace(self.path, self.path.with_suffix(".1.jsonl"))
        if self._fd < 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._fd).st_size
            if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
                os.write(self._fd, b"\n")  # the last line of a run that was killed, or that a full disk cut

    def _refused(self, error: OSError) -> None:
        """Nothing can be written now: say so once, try again later with a file opened afresh."""
        if not self._problem:
            where = self.path or "spans"
            print(
                f"warning: spans: {where} cannot be written ({error.strerror}); the run goes on without them",
                file=sys.stderr,
                flush=True,
            )
        self._problem = error.strerror or str(error)
        self._not_before = time.monotonic() + PAUSE_SECONDS
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

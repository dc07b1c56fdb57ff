"""Progress of a long piece of work as plain lines on rank 0: they read well in a terminal, a log file and a
scheduler.
"""

import time


class Progress:
    """Prints at most one line every `interval` seconds, and always the last step."""

    def __init__(self, title: str, total: int, *, start: int = 0, show: bool = True, interval: float = 5.0) -> None:
        self.title, self.total, self.start, self.show, self.interval = title, total, start, show, interval
        self._begin = self._last = time.monotonic()
        self._tokens = 0

    def update(self, step: int, tokens: int, terms: dict[str, float]) -> None:
        """Report that `step` steps are done, `tokens` more were processed, and the latest terms."""
        self._tokens += tokens
        now = time.monotonic()
        if not self.show or (now - self._last < self.interval and step < self.total):
            return
        self._last = now
        elapsed = max(now - self._begin, 1e-9)
        left = elapsed / max(1, step - self.start) * (self.total - step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        print(
            f"{self.title}  {step}/{self.total}  {shown}  {self._tokens / elapsed:,.0f} tokens/s  "
            f"{int(left // 60):02d}:{int(left % 60):02d} left",
            flush=True,
        )

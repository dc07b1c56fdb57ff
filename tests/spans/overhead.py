"""What spans cost: `python -m tests.spans.overhead` prints processor milliseconds a step, the writing thread's too.

A step here is 230 collectives and 6 spans that do nothing, which is what ZeRO-3 makes of a step of a 30-layer model.
"""

import tempfile
import time
from pathlib import Path

import torch

from pipeline.config import SpansConfig
from pipeline.placement.distributed import World
from pipeline.spans.collectives import _timed
from pipeline.spans.record import Recorder

COLLECTIVES, SPANS = 230, 6


def cost(folder: Path, every: int, steps: int) -> float:
    """Processor milliseconds a step, every so many steps written span by span."""
    recorder = Recorder(SpansConfig(every=every), folder, World(0, 1, torch.device("cpu")))
    nothing = _timed(lambda: None, "gather", recorder.add)
    begin = time.process_time()
    for step in range(1, steps + 1):
        recorder.begin_step(step)
        for _ in range(SPANS):
            with recorder.span("forward"):
                pass
        for _ in range(COLLECTIVES):
            nothing()
        recorder.end_step()
        if every == 1:
            while len(recorder.writer._lines) > 10_000:  # steps of seconds leave the thread its time
                time.sleep(0.01)
    recorder.writer.close(60.0)
    assert recorder.writer.dropped == 0
    return 1e3 * (time.process_time() - begin) / steps


def main() -> None:
    """Print both figures."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"a step of which the sums are written: {cost(Path(folder), 10**9, 1000):.2f} ms")
        print(f"a step that is written span by span: {cost(Path(folder), 1, 200):.2f} ms")


if __name__ == "__main__":
    main()

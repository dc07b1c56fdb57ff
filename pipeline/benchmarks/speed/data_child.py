"""One measurement of the case `data` in a process of its own: `python -m pipeline.benchmarks.speed.data_child SPEC`.

SPEC is a JSON file: {"what": "verdict", "folder", "rows", "note"} or {"what": "tokens", "backbone", "rows", "note"}.
The note is JSON too.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.benchmarks.speed.validation import synthetic_contract, synthetic_rows
from pipeline.data.ingest import examine

_PIECE = 100_000  # rows written at once


class Anonymous(threading.Thread):
    """The most memory this process held that no file backs, read twenty times a second: spooled rows are mapped files,
    which the kernel drops when it needs room.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = anonymous_bytes(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1]) * 1024


def write_rows(folder: Path, number: int) -> None:
    """`number` synthetic rows as parquet files: 80 % train, 10 % each validation and test."""
    shares = {"train": number * 8 // 10, "validation": number // 10, "test": number // 10}
    start = 0
    for split, rows in shares.items():
        with pq.ParquetWriter(folder / f"{split}.parquet", synthetic_rows(1).schema) as writer:
            for first in range(start, start + rows, _PIECE):
                writer.write_table(synthetic_rows(min(_PIECE, start + rows - first), first))
        start += rows


def measure_verdict(folder: Path, number: int) -> dict[str, Any]:
    """Seconds of the whole verdict without token limits, and memory before and at its peak."""
    write_rows(folder, number)
    pa.default_memory_pool().release_unused()
    watch = Anonymous()
    before = watch.peak
    watch.start()
    begin = time.perf_counter()
    found = examine(synthetic_contract(), [folder])
    seconds = time.perf_counter() - begin
    watch.done.set()
    watch.join()
    kept = sum(split.num_rows for split in found.splits.values())
    return {"rows": number, "seconds": seconds, "before_bytes": before, "peak_bytes": watch.peak, "kept": kept}


def measure_tokens(backbone: str, number: int) -> dict[str, Any]:
    """Seconds of tokenising `number` synthetic texts."""
    from pipeline.backbones.load import load_tokenizer
    from pipeline.config import BackboneConfig
    from pipeline.data.token_limits import TokenCounter

    texts = [text or "" for text in synthetic_rows(number)["text"].to_pylist()]
    counter = TokenCounter(load_tokenizer(BackboneConfig(path=backbone)))
    counter.prompt_ids(texts[:1000])
    begin = time.perf_counter()
    counter.prompt_ids(texts)
    return {"rows": number, "seconds": time.perf_counter() - begin}


def main(spec_file: str) -> None:
    """Measure what the specification asks for and write the note."""
    spec = json.loads(Path(spec_file).read_text())
    if spec["what"] == "verdict":
        note = measure_verdict(Path(spec["folder"]), spec["rows"])
    else:
        note = measure_tokens(spec["backbone"], spec["rows"])
    Path(spec_file).with_name("note.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main(sys.argv[1])

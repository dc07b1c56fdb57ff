"""The ranks' spans out of their files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.spans.record import FOLDER, local_folder

Line = dict[str, Any]


def folders_of(work_dir: Path, more: Sequence[Path] = ()) -> list[Path]:
    """Where spans of a run may lie: its work_dir, this host's folder for runs without one, and those named."""
    found = [work_dir / FOLDER, local_folder(work_dir.resolve()), *more]
    return [folder for folder in found if folder.is_dir()]


def read_spans(folders: Iterable[Path], increment: int | None = None) -> list[Line]:
    """All lines of all ranks by their start, of one increment or of all. A line that was cut by a kill is left out.

    Raises UserError where there is none.
    """
    lines = [line for folder in folders for path in sorted(folder.glob("rank*.jsonl")) for line in _lines(path)]
    if not lines:
        raise UserError("no spans are there; name a work_dir whose stream has `spans.enabled`")
    chosen = [line for line in lines if increment is None or line.get("increment") == increment]
    if not chosen:
        there = sorted({line["increment"] for line in lines if line.get("increment") is not None})
        raise UserError(f"--increment {increment}: no spans of it; there are those of {', '.join(map(str, there))}")
    return sorted(chosen, key=lambda line: line["start"])


def _lines(path: Path) -> Iterator[Line]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                line["start"], line["seconds"], line["rank"], line["name"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            yield line


def chrome_trace(lines: Sequence[Line]) -> Line:
    """The spans as Chrome's trace events (chrome://tracing, ui.perfetto.dev): a process a rank, microseconds."""
    events: list[Line] = []
    for line in lines:
        if line["name"] in ("clock", "dropped"):
            continue
        about = {key: line[key] for key in ("increment", "step", "task", "split", "sums") if line.get(key) is not None}
        event = {"name": line["name"], "ph": "X", "pid": line["rank"], "tid": 0, "args": about}
        events.append(event | {"ts": 1e6 * line["start"], "dur": 1e6 * line["seconds"]})
    hosts = {line["rank"]: line.get("host", "") for line in lines}
    names = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank} ({host})"}}
        for rank, host in sorted(hosts.items())
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}

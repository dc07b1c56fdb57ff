"""Case `data`: memory of a verdict at a tenth, once and five times the rows, and tokenising on one core and on all."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.benchmarks.children import child_environment, run_module
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, rates

SIZES = (0.1, 1, 5)  # times --validation-rows
ONE, ALL = "tokens, 1 core", "tokens, all cores"
_MOST_TOKENISED = 50_000


def measure_data(options: SpeedOptions, folder: Path) -> dict[str, Any]:
    """Reports 'verdict at size' and 'tokenising'. Every measurement is a process of its own."""
    notes = []
    for times in SIZES:
        rows = int(options.validation_rows * times)
        own = folder / f"rows-{rows}"
        own.mkdir(parents=True)
        notes.append(in_child({"what": "verdict", "folder": str(own), "rows": rows}, own))
        for file in own.glob("*.parquet"):
            file.unlink()
    names = [f"{note['rows']:,} rows" for note in notes]
    sizes = compare({name: [note["seconds"]] for name, note in zip(names, notes, strict=True)}, [])
    sizes["figures"] = {
        name: {
            "rows_per_second": rates([note["rows"]], [note["seconds"]]),
            "peak_bytes": note["peak_bytes"],
            "before_bytes": note["before_bytes"],
        }
        for name, note in zip(names, notes, strict=True)
    }
    small, large = notes[0], notes[-1]
    sizes["bytes_per_row"] = (large["peak_bytes"] - small["peak_bytes"]) / (large["rows"] - small["rows"])
    return {"verdict at size": sizes, "tokenising": measure_tokenising(options, folder)}


def measure_tokenising(options: SpeedOptions, folder: Path) -> dict[str, Any]:
    """Seconds by number of cores, by turns, with the ratio of each round."""
    rows = min(options.validation_rows, _MOST_TOKENISED)
    cores = {ONE: "1", ALL: str(os.cpu_count() or 1)}
    seconds: dict[str, list[float]] = {name: [] for name in cores}
    for _ in range(options.repeats):
        for name, number in cores.items():
            spec = {"what": "tokens", "backbone": options.backbone, "rows": rows}
            seconds[name].append(in_child(spec, folder, RAYON_NUM_THREADS=number)["seconds"])
    report = compare(seconds, [(ONE, ALL)])
    report["figures"] = {
        name: {"rows_per_second": rates([rows] * options.repeats, values)} for name, values in seconds.items()
    }
    return report


def in_child(spec: dict[str, Any], folder: Path, **variables: str) -> dict[str, Any]:
    """What a new process measured. Raises RuntimeError with the end of its output where it fails."""
    file = folder / "spec.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    return run_module("pipeline.benchmarks.speed.data_child", file, child_environment(**variables))

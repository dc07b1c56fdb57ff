"""A scale report: two windows of increments side by side, as a table and as curves."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.benchmarks.scale.options import ScaleOptions
from pipeline.files import write_atomic

# measured of every increment: name, heading, unit, divisor
FIGURES = (
    ("step_seconds", "optimizer step", "ms", 1e-3),
    ("publish_seconds", "publish: verify, rename, champion", "ms", 1e-3),
    ("register_seconds", "register: files, picture, publish", "ms", 1e-3),
    ("prepare_seconds", "validate and prepare", "ms", 1e-3),
    ("train_seconds", "train", "ms", 1e-3),
    ("evaluate_seconds", "evaluate", "ms", 1e-3),
    ("tracking_seconds", "MLflow: handing over to its thread", "ms", 1e-3),
    ("delivery_seconds", "MLflow: until it has taken the rest", "ms", 1e-3),
    ("total_seconds", "whole increment", "ms", 1e-3),
    ("resident_bytes", "resident memory", "MB", 1e6),
    ("manifest_bytes", "manifest.json", "bytes", 1),
    ("bank_bytes", "bank files", "bytes", 1),
    ("scored_tasks", "tasks scored", "", 1),
    ("run_json_bytes", "run.json (lists the stream's tasks)", "bytes", 1),
    ("champion_bytes", "champion.json (table of bundles)", "bytes", 1),
)
_DRAWN = ("step_seconds", "publish_seconds", "delivery_seconds", "total_seconds", "resident_bytes", "manifest_bytes")
_COLOUR, _SECOND = "#3d6fa8", "#d9822b"


def summarise(
    options: ScaleOptions, samples: Sequence[dict[str, float]], second: Sequence[dict[str, float]] = ()
) -> dict[str, Any]:
    """By figure the median of each window that the run has reached, with least and most, and last / first.

    Args:
        samples: the increments of the long stream.
        second: those of the second one, whose first window is compared once it is whole: it was measured by turns
            with the last window.
    """
    windows = {name: bounds for name, bounds in options.windows.items() if bounds[1] <= len(samples)}
    whole = len(second) >= options.windows["first"][1]
    streams = {"first": second if whole else samples, "last": samples}
    figures: dict[str, Any] = {}
    for name, *_ in FIGURES:
        if name not in samples[0]:
            continue
        parts = {
            window: [sample[name] for sample in streams[window][first - 1 : last]]
            for window, (first, last) in windows.items()
        }
        figures[name] = {
            window: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for window, values in parts.items()
        }
        if len(parts) == 2:
            figures[name]["ratio"] = figures[name]["last"]["median"] / figures[name]["first"]["median"]
    return {"windows": windows, "figures": figures}


def as_table(report: dict[str, Any]) -> str:
    """A line a figure: its median in both windows and the ratio of the two, in aligned columns."""
    machine = report["machine"]
    spans = [f"{first} to {last}" for first, last in report["windows"].values()]
    lines = [("median over increments", *spans, "ratio")]
    for name, heading, unit, divisor in FIGURES:
        values = report["figures"].get(name)
        if values is not None:
            cells = [f"{values[window]['median'] / divisor:,.{_places(unit)}f} {unit}" for window in report["windows"]]
            lines.append((heading, *cells, f"{values['ratio']:.3f}"))
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    header = f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} torch threads"
    return "\n".join([header, "", *rows])


def draw(report: dict[str, Any], path: Path) -> None:
    """A curve over the increments for each of the main figures, the second stream's beside it; a PNG."""
    samples, second = report["increments"], report["second_stream"]
    drawn = [figure for figure in FIGURES if figure[0] in _DRAWN and figure[0] in samples[0]]
    picture = Figure(figsize=(8.0, 1.5 * len(drawn)), dpi=120, layout="constrained")
    panels = picture.subplots(len(drawn), squeeze=False, sharex=True)[:, 0]
    numbers = range(1, len(samples) + 1)
    for axes, (name, heading, unit, divisor) in zip(panels, drawn, strict=True):
        axes.plot(numbers, [sample[name] / divisor for sample in samples], color=_COLOUR, linewidth=0.7)
        values = [sample[name] / divisor for sample in second]
        axes.plot(range(1, len(second) + 1), values, color=_SECOND, linewidth=0.7)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{heading}, {unit}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        for first, last in report["windows"].values():
            axes.axvspan(first, last, color="#e6e6e6", zorder=0)
    panels[-1].set_xlabel("increment" + ("; orange: a second stream, by turns with the last ones" if second else ""))
    png = io.BytesIO()
    picture.savefig(png, format="png", metadata={"Software": None})
    write_atomic(path, png.getvalue())


def _places(unit: str) -> int:
    return 1 if unit in ("ms", "MB") else 0

"""A suite's finished cells as pictures: matrices, each task along the stream, stored bytes."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.benchmarks.quality.report import by_setting
from pipeline.benchmarks.quality.statistics import Record, paired_matrix, whole_matrix
from pipeline.evaluation.plots import COLOURS
from pipeline.files import write_atomic

_ACROSS = 4  # panels in a row
_LINES = ("#10427a", "#c0504d", "#4f8f4f", "#d08a2e", "#7a5aa6", "#3aa0a8", "#8c6d46", "#b04a8f", "#777777", "#2e2e2e")


def draw_all(records: Sequence[Record], stem: Path) -> list[Path]:
    """Write <stem>-matrices.png, <stem>-tasks.png and <stem>-bytes.png; the paths. Nothing for no records."""
    if not records:
        return []
    first = [own[0] for own in by_setting(records).values()]  # one cell a setting, of its first order
    pictures = {"matrices": matrices(first), "tasks": along_the_stream(first), "bytes": stored(first)}
    paths = []
    for name, picture in pictures.items():
        png = io.BytesIO()
        picture.savefig(png, format="png", metadata={"Software": None})
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        write_atomic(paths[-1], png.getvalue())
    return paths


def matrices(records: Sequence[Record]) -> Figure:
    """R of one cell a setting, all on the same rows; right of the diagonal the next task, not yet learned."""
    picture, panels = _panels(records, 2.6)
    for axes, record in zip(panels, records, strict=False):
        R = whole_matrix(record)
        points = [[math.nan if value is None else 100 * value for value in row] for row in R]
        image = axes.imshow(points, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
        axes.set_facecolor("#e6e6e6")
        size = len(R)
        axes.set_xticks(range(size), record["tasks"], rotation=40, ha="right", fontsize=6)
        axes.set_yticks(range(size), [str(number + 1) for number in range(size)], fontsize=6)
        if size <= 7:
            for row, values in enumerate(points):
                for column, value in enumerate(values):
                    if not math.isnan(value):
                        colour = "white" if value > 55 else "black"
                        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=6)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    picture.colorbar(image, ax=panels, label="points of 100", shrink=0.6)
    return picture


def along_the_stream(records: Sequence[Record]) -> Figure:
    """The score of each task after every increment from the one that learned it, a panel a setting."""
    picture, panels = _panels(records, 2.2)
    for axes, record in zip(panels, records, strict=False):
        R = paired_matrix(record)
        for place, task in enumerate(record["tasks"]):
            steps = range(place, len(R))
            colour = _LINES[place % len(_LINES)]
            axes.plot(
                [step + 1 for step in steps],
                [100 * R[step][place] for step in steps],
                color=colour,
                marker="o",
                markersize=2.5,
                linewidth=1,
                label=task,
            )
        axes.set_ylim(0, 100)
        axes.set_xticks(range(1, len(R) + 1))
        _plain(axes)
    panels[0].legend(fontsize=6, frameon=False)
    picture.supxlabel("increment", fontsize=8)
    picture.supylabel("score on test, points of 100", fontsize=8)
    return picture


def stored(records: Sequence[Record]) -> Figure:
    """Bytes that serving and carrying on take, against the number of tasks."""
    picture = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = picture.add_subplot()
    for place, record in enumerate(records):
        megabytes = [count / 1e6 for count in record["served_bytes"]]
        style = "-" if place < len(_LINES) else "--"
        colour = _LINES[place % len(_LINES)]
        numbers = range(1, len(megabytes) + 1)
        axes.plot(numbers, megabytes, style, color=colour, linewidth=1.2, label=record["setting"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("experts and method state, MB")
    axes.set_xticks(range(1, len(records[0]["tasks"]) + 1))
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plain(axes)
    return picture


def _panels(records: Sequence[Record], height: float) -> tuple[Figure, list[Axes]]:
    """A panel a record, titled, in rows of at most four."""
    across = min(_ACROSS, len(records))
    down = math.ceil(len(records) / across)
    picture = Figure(figsize=(2.4 * across + 0.8, height * down + 0.4), dpi=120, layout="constrained")
    panels = list(picture.subplots(down, across, squeeze=False).flat)
    for axes, record in zip(panels, records, strict=False):
        axes.set_title(f"{record['setting']} {record['order']}", fontsize=8, loc="left")
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    return picture, panels


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)

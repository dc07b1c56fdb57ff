"""The accuracy matrix as a picture."""

import io
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pipeline.files import write_atomic

_LARGEST_ANNOTATED = 20  # rows or columns; beyond, numbers would overlap and the colours alone are shown
_LIGHT, _DARK = "#f2f6fb", "#10427a"
COLOURS = LinearSegmentedColormap.from_list("score", [_LIGHT, "#7fa8d6", _DARK])


def heat_map(
    tasks: list[str],
    R: list[list[float | None]],
    path_png: Path | str,
    title: str,
    row_names: list[str] | None = None,
) -> None:
    """Write R (scores in [0, 1]; a row an increment, a column a task, None = not evaluated) as an annotated heat map in
    points of 100.

    The colour scale is always 0 to 100, so that pictures can be compared. The same R gives the same bytes. `row_names`
    default to the task each increment learned.
    """
    names = row_names or [f"{t}: {tasks[t - 1]}" for t in range(1, len(R) + 1)]
    rows, columns = len(R), len(tasks)
    size = min(3.0 + 1.1 * columns, 14.0), min(2.0 + 0.6 * rows, 10.0)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    points = [[float("nan") if value is None else 100 * value for value in row] for row in R]
    image = axes.imshow(points, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor("#e6e6e6")  # cells without a score
    axes.set_xticks(range(columns), tasks, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), names)
    axes.set_xlabel("score on")
    axes.set_ylabel("after increment")
    axes.set_title(title)
    axes.vlines([column - 0.5 for column in range(1, columns)], -0.5, rows - 0.5, color="white", linewidth=2)
    axes.hlines([row - 0.5 for row in range(1, rows)], -0.5, columns - 0.5, color="white", linewidth=2)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if max(rows, columns) <= _LARGEST_ANNOTATED:
        for row, values in enumerate(points):
            for column, value in enumerate(values):
                if value == value:  # NaN is not itself: a cell without a score stays grey
                    colour = "white" if value > 55 else "black"
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="points of 100")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_atomic(path_png, png.getvalue())

"""The ranks' spans as one timeline."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.spans.read import Line
from pipeline.spans.record import COLLECTIVES

# Okabe and Ito's colours, told apart by most eyes; collectives warm, own work cool
COLOURS = {
    "data": "#000000",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#009E73",
    "gather": "#E69F00",
    "all_to_all": "#D55E00",
    "reduce": "#F0E442",
    "wait": "#CC79A7",
}
PARTS = {"train": "#d9e7f3", "evaluate": "#e3f1e3", "router": "#efe6f5", "publish": "#f6e4d8", "save": "#c9a27e"}
_OTHER = "#dddddd"
MOST_RANKS = 32  # rows: the first half and the last


def draw(lines: Sequence[Line], path: Path, title: str = "") -> None:
    """One row a rank: parts of increments as a band, steps within it, spans of the steps written whole above them.

    Above is the whole of `lines`, below the step written whole whose duration is the median of such steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks = sorted({line["rank"] for line in lines})
    if len(ranks) > MOST_RANKS:
        ranks = ranks[: MOST_RANKS // 2] + ranks[-MOST_RANKS // 2 :]
    rows = {rank: number for number, rank in enumerate(ranks)}
    hosts = {line["rank"]: line.get("host", "") for line in lines}
    shown = [line for line in lines if line["rank"] in rows]
    zero = min(line["start"] for line in shown)
    figure, axes = plt.subplots(2, 1, figsize=(14, 2.6 + 0.9 * len(ranks)), constrained_layout=True)
    used: dict[str, str] = {}
    _rows(axes[0], shown, rows, zero, used, 1.0)
    axes[0].set_xlabel("seconds since the first span")
    axes[0].set_title(title or "spans")
    step = whole_step(shown)
    if step is None:
        axes[1].set_axis_off()
        axes[1].text(0.5, 0.5, "no step was written span by span", ha="center", va="center")
    else:
        inside = [line for line in shown if line.get("step") == step[1] and line.get("increment") == step[0]]
        begin = min(line["start"] for line in inside if line["name"] == "step")
        _rows(axes[1], [line for line in inside if line["name"] != "save"], rows, begin, used, 1e3)
        axes[1].set_xlabel("milliseconds since the step's begin")
        axes[1].set_title(f"increment {step[0]}, step {step[1]}, span by span (collectives over the pass they lie in)")
    for axis in axes[: 1 if step is None else 2]:
        axis.set_yticks(range(len(ranks)), [f"rank {rank}\n{hosts[rank]}" for rank in ranks])
        axis.set_ylim(len(ranks) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    order = [name for name in (*COLOURS, *PARTS, "other part", "step") if name in used]
    patches = [Patch(color=used[name], label=name.replace("_", "-")) for name in order]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 9), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def whole_step(lines: Sequence[Line]) -> tuple[int | None, int] | None:
    """(increment, step) of the step written whole whose duration is the median; the first of an increment, which is
    not like the others, only where there is no other. None: there is none.
    """
    seconds: dict[tuple[int | None, int], float] = {}
    for line in lines:
        if line["name"] == "step" and line.get("detailed"):
            key = line.get("increment"), line["step"]
            seconds[key] = max(seconds.get(key, 0.0), line["seconds"])
    later = {key: s for key, s in seconds.items() if key[1] > 1} or seconds
    ordered = sorted(later, key=lambda key: later[key])
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def _rows(axis, lines: Sequence[Line], rows: dict[int, int], zero: float, used: dict[str, str], scale: float) -> None:
    """Bars of the lines: parts the full height of a row, steps below, spans of work, collectives in front."""
    bars: dict[tuple[float, float, str, float], list[tuple[float, float, int]]] = {}
    for line in lines:
        name = line["name"]
        if name in ("clock", "dropped", "score"):
            continue
        if name == "step":
            kind, colour, low, height, order = "step", "#9aa5b1", 0.28, 0.12, 2.0
        elif name in COLOURS:
            low, height = (-0.18, 0.32) if name in COLLECTIVES else (-0.28, 0.52)
            kind, colour, order = name, COLOURS[name], 4.0 if name in COLLECTIVES else 3.0
        else:
            kind = name if name in PARTS else "other part"
            colour, low, height, order = PARTS.get(name, _OTHER), -0.42, 0.84, 1.5 if name == "save" else 1.0
        used[kind] = colour
        begin = scale * (line["start"] - zero)
        bars.setdefault((low, height, colour, order), []).append((begin, scale * line["seconds"], rows[line["rank"]]))
    for (low, height, colour, order), spans in bars.items():
        for row in set(rows.values()):
            own = [(begin, width) for begin, width, place in spans if place == row]
            if own:
                axis.broken_barh(own, (row + low, height), color=colour, zorder=order, linewidth=0)

"""A speed report as a table and as a picture."""

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.files import write_atomic

_COLOUR = "#3d6fa8"


def as_table(report: dict[str, Any]) -> str:
    """Every case with its contenders (median, quartiles, rates, memory) and its ratios, in aligned columns."""
    machine = report["machine"]
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} torch threads"]
    for name, case in report["cases"].items():
        lines += ["", name, *_aligned(_contenders(case))]
        if case["ratios"]:
            lines += _aligned([("ratio", "median", "quartiles"), *map(_ratio, case["ratios"].items())])
        if "phases" in case:
            lines += _aligned(_phases(case["phases"]))
        if "imports" in case:
            lines += _aligned([("imports by package", ""), *((n, f"{s:.2f}") for n, s in case["imports"].items())])
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Horizontal bars of median seconds, one panel a case, with quartiles as whiskers; a PNG."""
    cases = report["cases"]
    heights = [1 + len(case["seconds"]) for case in cases.values()]
    figure = Figure(figsize=(8.0, 0.6 + 0.42 * sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, case) in zip(panels, cases.items(), strict=True):
        names = list(case["seconds"])
        medians = [case["seconds"][contender]["median"] for contender in names]
        low, high = zip(*(case["seconds"][contender]["quartiles"] for contender in names), strict=True)
        whiskers = [
            [median - bound for median, bound in zip(medians, low, strict=True)],
            [bound - median for median, bound in zip(medians, high, strict=True)],
        ]
        axes.barh(names, medians, xerr=whiskers, color=_COLOUR, height=0.6, error_kw={"lw": 1, "capsize": 2})
        axes.bar_label(axes.containers[-1], fmt="%.3g", padding=6)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_title(f"{name}: median seconds", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_atomic(path, png.getvalue())


def _contenders(case: dict[str, Any]) -> list[tuple[str, ...]]:
    """Header and one line a contender; a column that no contender fills is left out."""
    columns = {
        "rows/s": lambda figures: _number(figures.get("rows_per_second")),
        "tokens/s": lambda figures: _number(figures.get("tokens_per_second")),
        "GFLOP/s": lambda figures: _number(figures.get("flop_per_second"), 1e9),
        "of GEMM": lambda figures: f"{figures['share_of_gemm_rate']:.0%}" if "share_of_gemm_rate" in figures else "",
        "gathered MB (planned)": lambda figures: _beside_plan(figures, "gather_bytes"),
        "reduced MB (planned)": lambda figures: _beside_plan(figures, "reduce_bytes"),
        "peak MB": lambda figures: f"{figures['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in figures else "",
    }
    lines = [("", "seconds", "quartiles", *columns)]
    for name, seconds in case["seconds"].items():
        figures = case.get("figures", {}).get(name, {})
        low, high = seconds["quartiles"]
        cells = [column(figures) for column in columns.values()]
        lines.append((name, f"{seconds['median']:.4g}", f"{low:.4g} to {high:.4g}", *cells))
    kept = [place for place in range(len(lines[0])) if any(line[place] for line in lines[1:])]
    return [tuple(line[place] for place in kept) for line in lines]


def _phases(phases: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line a phase, a column a contender: median seconds."""
    names = list(dict.fromkeys(name for own in phases.values() for name in own))
    lines = [
        (name, *(f"{own[name]['median']:.2f}" if name in own else "" for own in phases.values())) for name in names
    ]
    return [("phase", *phases), *lines]


def _ratio(item: tuple[str, dict[str, Any]]) -> tuple[str, str, str]:
    name, values = item
    low, high = values["quartiles"]
    return name, f"{values['median']:.3f}", f"{low:.3f} to {high:.3f}"


def _number(rate: dict[str, Any] | None, unit: float = 1.0) -> str:
    """The median of a rate in units, with about four figures."""
    if rate is None:
        return ""
    value = rate["median"] / unit
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _beside_plan(figures: dict[str, Any], what: str) -> str:
    """Megabytes of one step of one rank, counted, and in brackets by the plan."""
    if "planned" not in figures:
        return ""
    return f"{figures['step'][what] / 1e6:.4g} ({figures['planned'][what] / 1e6:.4g})"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return ["  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]

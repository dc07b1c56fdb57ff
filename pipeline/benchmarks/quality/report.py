"""A suite's finished cells as Markdown tables."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.benchmarks.quality.cells import ANY_ORDER
from pipeline.benchmarks.quality.statistics import (
    Interval,
    Record,
    backward,
    bootstrap,
    decided_difference,
    difference,
    figures,
    macro_f1,
)
from pipeline.evaluation import matrix

REFERENCE = "moe_cl"  # the method in question
BARE, ALONE = "zero_shot", "per_task"  # what forward transfer and transfer are measured against
_POINTS = ("acc", "bwt", "fwt", "forgetting", "transfer", "validation_acc", "validation_bwt")
_SIGNED = {"bwt", "fwt", "transfer", "validation_bwt"}
_HEADINGS = ("ACC", "BWT", "FWT", "forgetting", "transfer", "ACC val.", "BWT val.")


def as_markdown(suite: str, records: Sequence[Record], budget: dict[str, Any]) -> str:
    """The whole report: settings, figures, differences with intervals, scores by task."""
    if not records:
        return f"# {suite}\n\nNo cell is finished yet.\n"
    parts = [f"# {suite}", describe(records, budget), figure_table(records)]
    for heading, table in (
        (f"{REFERENCE} less each other method: ACC over the orders both have", difference_table(records)),
        ("Backward transfer on test", backward_table(records)),
        ("Rows decided without review", review_table(records)),
        (f"{REFERENCE} less each other method: rows decided without review", review_difference_table(records)),
        ("With and without the task's name", inferred_table(records)),
        ("Scores by task after the last one, mean over orders and seeds", task_table(records)),
        ("Kept MB after each increment, first order and seed", growth_table(records)),
    ):
        if table:
            parts += [f"## {heading}", table]
    return "\n\n".join(parts) + "\n"


def describe(records: Sequence[Record], budget: dict[str, Any]) -> str:
    """What all cells have in common, and how to read the tables."""
    seeds = ", ".join(map(str, sorted({record["deciding"]["seed"] for record in records})))
    hours = sum(record["wall_seconds"] for record in records) / 3600
    return (
        f"Scores in points of 100. A task has {budget['train_rows']} training, {budget['validation_rows']} validation "
        f"and {budget['test_rows']} test rows, {budget['test_rows_stream']} of which are scored after every task but "
        f"the last; {budget['epochs']} epochs, batch {budget['batch_size']}, seeds {seeds}; {hours:.1f} hours in all. "
        "A row's task is known when it is answered. Everything is chosen on validation; test rows only measure. In "
        "brackets: the least and the most over orders and seeds. BWT, forgetting and transfer compare scores on the "
        "same rows."
    )


def figure_table(records: Sequence[Record]) -> str:
    """A line a setting: means and spread over its cells; cost."""
    bare, alone = (
        {record["deciding"]["seed"]: record for record in records if record["setting"] == name}
        for name in (BARE, ALONE)
    )
    lines = [
        ("method", "orders", *_HEADINGS, "learning rate", "trained parameters", "kept MB", "seconds"),
        ("---", "---", *["---:"] * (len(_HEADINGS) + 4)),
    ]
    for setting, own in by_setting(records).items():
        seeds = [record["deciding"]["seed"] for record in own]
        found = [figures(record, bare.get(s), alone.get(s)) for record, s in zip(own, seeds, strict=True)]
        points = [spread([f[name] for f in found], name in _SIGNED) for name in _POINTS]
        rates = sorted({record["deciding"]["learning_rate"] for record in own} - {None})
        lines.append(
            (
                setting,
                orders_of(own),
                *points,
                ", ".join(f"{rate:g}" for rate in rates) or "-",
                f"{max(max(record['trained_parameters']) for record in own):,}",
                f"{mean([record['served_bytes'][-1] for record in own]) / 1e6:.1f}",
                f"{mean([record['wall_seconds'] for record in own]):,.0f}",
            )
        )
    return markdown(lines)


def difference_table(records: Sequence[Record]) -> str:
    """ACC of the reference less each rival's, with a paired bootstrap interval over rows and orders.

    A rival without an order stands against the first order alone, and against all of them.
    """
    groups = by_setting(records)
    lines = [("less", "orders", "test rows", "difference", "95 % interval"), ("---", "---", "---:", "---:", "---")]
    for rival, own in groups.items():
        pairs = [] if rival == REFERENCE else pairs_of(groups.get(REFERENCE, []), own)
        first = [pair for pair in pairs if pair[0]["order"] == pairs[0][0]["order"]]
        sets = [first, pairs] if own[0]["order"] == ANY_ORDER and len(first) < len(pairs) else [pairs]
        for chosen in filter(None, sets):
            units = [difference(*pair) for pair in chosen]
            rows = sum(len(values) for values in units[0][1].values())
            lines.append((rival, orders_of([one for one, _ in chosen]), f"{rows:,}", *shown(bootstrap(units))))
    return markdown(lines) if len(lines) > 2 else ""


def backward_table(records: Sequence[Record]) -> str:
    """BWT on test by setting, with a bootstrap interval over rows and orders."""
    lines = [("method", "orders", "BWT", "95 % interval"), ("---", "---", "---:", "---")]
    for setting, own in by_setting(records).items():
        if len(own[0]["tasks"]) > 1:
            lines.append((setting, orders_of(own), *shown(bootstrap([backward(record) for record in own]))))
    return markdown(lines) if len(lines) > 2 else ""


def task_table(records: Sequence[Record]) -> str:
    """The last row of R by setting; of classification with few classes macro F1 too."""
    tasks = records[0]["tasks"]
    binary = [task for task in tasks if len(records[0]["labels"][task]) == 2]
    heads = [f"{task} ({records[0]['kinds'][task][1]})" for task in tasks] + [f"{task} (macro F1)" for task in binary]
    lines = [("method", *heads), ("---", *["---:"] * len(heads))]
    for setting, own in by_setting(records).items():
        cells: list[Callable[[Record], dict[str, float]]] = [
            lambda record: dict(zip(record["tasks"], record["R"][-1], strict=True)),
            lambda record: {task: macro_f1(record, task) for task in binary},
        ]
        values = [mean([cells[0](record)[task] for record in own]) for task in tasks]
        values += [mean([cells[1](record)[task] for record in own]) for task in binary]
        lines.append((setting, *(f"{100 * value:.1f}" for value in values)))
    return markdown(lines)


def growth_table(records: Sequence[Record]) -> str:
    """Bytes that serving and carrying on take after every increment; one cell a setting."""
    places = [str(number) for number in range(1, len(records[0]["tasks"]) + 1)]
    lines = [("method", *places), ("---", *["---:"] * len(places))]
    for setting, own in by_setting(records).items():
        lines.append((setting, *(f"{count / 1e6:.1f}" for count in own[0]["served_bytes"])))
    return markdown(lines)


def review_table(records: Sequence[Record]) -> str:
    """Share of test rows that thresholds chosen on validation decide, and how many of those are right, by task."""
    known = [record for record in records if "review" in record]
    if not known:
        return ""
    tasks = known[0]["tasks"]
    target = next(iter(known[0]["review"].values()))["target_precision"]
    lines = [
        ("method", *(f"{task}: decided, right" for task in tasks), f"mean decided (target {100 * target:.0f} right)")
    ]
    lines.append(("---", *["---:"] * (len(tasks) + 1)))
    for setting, own in by_setting(known).items():
        cells = []
        for task in tasks:
            shares = [record["review"][task]["test"]["stripping_rate"] for record in own]
            right = [p for record in own if (p := record["review"][task]["test"]["precision"]) is not None]
            cells.append(f"{100 * mean(shares):.1f}, {f'{100 * mean(right):.1f}' if right else '-'}")
        every = [entry["test"]["stripping_rate"] for record in own for entry in record["review"].values()]
        lines.append((setting, *cells, f"{100 * mean(every):.1f}"))
    return markdown(lines)


def review_difference_table(records: Sequence[Record]) -> str:
    """Share of rows decided by the reference less each rival's, with a paired bootstrap over rows and orders; the
    thresholds stay.
    """
    groups = by_setting([record for record in records if "review" in record])
    lines = [("less", "orders", "difference", "95 % interval"), ("---", "---", "---:", "---")]
    for rival, own in groups.items():
        pairs = [] if rival == REFERENCE else pairs_of(groups.get(REFERENCE, []), own)
        if pairs:
            units = [decided_difference(*pair) for pair in pairs]
            lines.append((rival, orders_of([one for one, _ in pairs]), *shown(bootstrap(units))))
    return markdown(lines) if len(lines) > 2 else ""


def inferred_table(records: Sequence[Record]) -> str:
    """ACC with the task named, and with the task that the router chose."""
    lines = [("method", "order", "task named", "task chosen by the router", "difference")]
    lines.append(("---", "---", "---:", "---:", "---:"))
    for record in records:
        if "R_inferred" in record:
            named, chosen = matrix.acc(record["R"]), matrix.acc(record["R_inferred"])
            shares = (f"{100 * named:.2f}", f"{100 * chosen:.2f}", f"{100 * (chosen - named):+.2f}")
            lines.append((record["setting"], record["order"], *shares))
    return markdown(lines) if len(lines) > 2 else ""


def by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by setting, in the order they come."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["setting"], []).append(record)
    return groups


def pairs_of(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Cells of the same order and seed; a setting without an order stands against every order."""
    return [
        (one, other)
        for one in first
        for other in second
        if one["deciding"]["seed"] == other["deciding"]["seed"] and other["order"] in (one["order"], ANY_ORDER)
    ]


def orders_of(records: Sequence[Record]) -> str:
    """The orders of some cells."""
    return " ".join(dict.fromkeys(record["order"] for record in records))


def spread(values: Sequence[float | None], signed: bool) -> str:
    """Mean in points, with least and most where they differ; `-` where nothing was measured."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    form = "+.1f" if signed else ".1f"
    bounds = f" [{min(known):{form}}, {max(known):{form}}]" if len(known) > 1 else ""
    return f"{mean(known):{form}}{bounds}"


def shown(interval: Interval) -> tuple[str, str]:
    """An interval in points."""
    return f"{100 * interval.mean:+.2f}", f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its second line is the rule."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

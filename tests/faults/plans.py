"""Which faults a run gets: drawn by seed from the places that the unbroken run passed, or by the clock."""

import random
from collections.abc import Sequence
from typing import Any

from tests.faults.runs import Unbroken
from tests.faults.watch import Fault, Point

KILLS = ("rank", "ranks", "group")
STAGES = ("validate", "prepare", "train", "evaluate", "gate", "register")
FILES = ("publish file", "register file", "bank file", "state file")


def kind_of(place: str) -> str:
    """What a place is counted as in the table: its stage's edge, the optimizer's steps, or a kind of file call."""
    first, *rest = place.split()
    if place.endswith("file"):
        return f"{first} file"
    if "step" in (first, *rest):
        return "optimizer step"
    return "stage edge" if first in ("before", "after") else place


def publish_sweep(unbroken: Unbroken, increment: int, seed: int, every: int = 1) -> list[Fault]:
    """A kill before each call (or every n-th) by which `publish` changes the disk."""
    draw = random.Random(seed)
    calls = [point for point in unbroken.points if (point["increment"], point["place"]) == (increment, "publish file")]
    return [at(point, draw.choice(KILLS)) for point in calls[draw.randrange(every) :: every]]


def at_edges(unbroken: Unbroken, count: int, seed: int) -> list[Fault]:
    """Kills at stage edges, steps and file calls, as many of each kind, in the order in which a run passes them."""
    draw = random.Random(seed)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for point in unbroken.points:
        kind = kind_of(point["place"])
        if kind in ("stage edge", "optimizer step", *FILES):
            kinds.setdefault(kind, []).append(point)
    names = sorted(kinds)
    draw.shuffle(names)
    chosen = [draw.choice(kinds[names[number % len(names)]]) for number in range(count)]
    return [at(point, draw.choice(KILLS)) for point in sorted(chosen, key=lambda point: point["at"])]


def at_edges_of_all_stages(unbroken: Unbroken, seed: int) -> list[Fault]:
    """A kill before and after each stage, each in an increment and on a rank drawn by seed, in the order of a run."""
    draw = random.Random(seed)
    edges: dict[str, list[dict[str, Any]]] = {}
    for point in unbroken.points:
        if kind_of(point["place"]) == "stage edge" and point["place"].split()[1] in STAGES:
            edges.setdefault(point["place"], []).append(point)
    chosen = [draw.choice(points) for points in edges.values()]
    return [at(point, draw.choice(KILLS)) for point in sorted(chosen, key=lambda point: point["at"])]


def by_the_clock(unbroken: Unbroken, count: int, seed: int) -> list[Fault]:
    """Kills at random moments of the time that an unbroken run takes: a launch that continues has what is left of it
    before it, and some part of a start again.
    """
    draw = random.Random(seed)
    whole = unbroken.outcome.seconds
    begun = next(point["at"] for point in unbroken.points if point["place"] == "before learn")
    start = begun - (unbroken.points[-1]["at"] - whole)
    moments = sorted(draw.uniform(0.05, 0.9) * whole for _ in range(count))
    faults = []
    for last, moment in zip([0.0, *moments], moments, strict=False):
        seconds = moment - last + (draw.uniform(0, start) if last else 0.0)
        faults.append(Fault(draw.choice(KILLS), seconds=seconds, rank=draw.randrange(2)))
    return faults


def at(point: dict[str, Any], how: str) -> Fault:
    """A fault at a point of a log."""
    return Fault(how, Point(*(point[name] for name in ("rank", "increment", "place", "nth"))))


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of text in columns; the first one is the heading."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

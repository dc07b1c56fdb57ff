"""Which rank the others waited for, from the sums of all optimizer steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.spans.read import Line
from pipeline.spans.record import COLLECTIVES

KINDS = ("data", "forward", "backward", "optimizer", *COLLECTIVES)
LEAST_SPREAD = 0.05  # of a step: below it no rank is called the slowest


@dataclass(frozen=True)
class RankTime:
    """One rank's seconds over its steps."""

    rank: int
    host: str
    steps: int
    seconds: float  # of all its steps
    by_kind: dict[str, float]  # as recorded: forward, backward and optimizer hold the collectives in them

    @property
    def in_collectives(self) -> float:
        """Seconds in collectives: sending, and waiting for ranks that come later."""
        return sum(self.by_kind.get(kind, 0.0) for kind in COLLECTIVES)

    @property
    def own(self) -> float:
        """Seconds of its own work, reading data included: what no other rank had a part in."""
        return self.seconds - self.in_collectives


def rank_times(lines: Iterable[Line]) -> list[RankTime]:
    """Of every rank that has steps, by rank. Steps trained twice (after a kill) count twice."""
    sums: dict[int, dict[str, float]] = {}
    hosts: dict[int, str] = {}
    steps: dict[int, int] = {}
    totals: dict[int, float] = {}
    for line in lines:
        if line["name"] != "step":
            continue
        rank = line["rank"]
        hosts[rank] = line.get("host", "")
        steps[rank] = steps.get(rank, 0) + 1
        totals[rank] = totals.get(rank, 0.0) + line["seconds"]
        own = sums.setdefault(rank, {})
        for kind, seconds in line.get("sums", {}).items():
            own[kind] = own.get(kind, 0.0) + seconds
    return [RankTime(rank, hosts[rank], steps[rank], totals[rank], sums[rank]) for rank in sorted(sums)]


def report(ranks: Sequence[RankTime]) -> str:
    """A table of seconds a step and shares, and what follows from it, in words."""
    if not ranks:
        return "no optimizer step was recorded"
    kinds = [kind for kind in KINDS if any(rank.by_kind.get(kind) for rank in ranks)]
    head = ["rank", "host", "steps", "steps/s", "s a step", *kinds, "in collectives", "own work"]
    rows = [head]
    for rank in ranks:
        each = [rank.by_kind.get(kind, 0.0) for kind in kinds]
        per_step = [f"{seconds / rank.steps:.4f} {seconds / rank.seconds:4.0%}" for seconds in each]
        first = [str(rank.rank), rank.host, str(rank.steps), f"{rank.steps / rank.seconds:.2f}"]
        own = f"{rank.own / rank.steps:.4f} {rank.own / rank.seconds:4.0%}"
        step = f"{rank.seconds / rank.steps:.4f}"
        rows.append([*first, step, *per_step, f"{rank.in_collectives / rank.seconds:.0%}", own])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    data = sum(rank.by_kind.get("data", 0.0) for rank in ranks) / sum(rank.seconds for rank in ranks)
    lines += ["", f"waiting for data: {data:.1%} of the ranks' time", verdict(ranks)]
    return "\n".join(lines)


def slowest(ranks: Sequence[RankTime]) -> RankTime | None:
    """The rank with the most work of its own a step, where it stands out by `LEAST_SPREAD` of a step."""
    if len(ranks) < 2:
        return None
    last = max(ranks, key=lambda rank: rank.own / rank.steps)
    others = [rank.own / rank.steps for rank in ranks if rank is not last]
    step = max(rank.seconds / rank.steps for rank in ranks)
    stands_out = last.own / last.steps - sum(others) / len(others) > LEAST_SPREAD * step
    return last if stands_out else None


def verdict(ranks: Sequence[RankTime]) -> str:
    """Whom the others waited for, and for what."""
    if len(ranks) < 2:
        return "one rank: nobody waits for another"
    last = slowest(ranks)
    if last is None:
        return f"no rank kept the others waiting (own work differs by less than {LEAST_SPREAD:.0%} of a step)"
    others = [rank for rank in ranks if rank is not last]
    own = sum(rank.own / rank.steps for rank in others) / len(others)
    waited = sum(rank.in_collectives for rank in others) / sum(rank.seconds for rank in others)
    reading = last.by_kind.get("data", 0.0) / last.seconds
    why = f", {reading:.0%} of its time waiting for data" if reading > LEAST_SPREAD else ""
    return (
        f"slowest: rank {last.rank} on {last.host}, {last.own / last.steps:.4f} s of its own work a step{why}; the "
        f"others did theirs in {own:.4f} s and were in collectives for {waited:.0%} of the time (it: "
        f"{last.in_collectives / last.seconds:.0%})"
    )

"""What the watchdog makes of what it sees: who stands still, and whose fault it is that a job does. Nothing is read
here.

A rank advances when it reports, when it (with its children) spends processor time or transfers data, and while it
waits for a disk. It is quiet when none of this happens. Quiet alone is no fault: a rank that waits in a collective for
one that is at work is quiet for as long as that takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.watch.processes import Process

EXIT_STOPPED = 75  # of a command that was asked to stop
FOUND = 0.8  # share of the limit after which a rank is found to stand still; the rest is for ending the job
LEAVE = 0.8  # share of the grace time after which ranks that have come to no next step are told to leave at once
# what is less is no work: threads that wake up now and then
BUSY_SHARE, BUSY_SECONDS, BUSY_BYTES = 0.02, 0.1, 1 << 20  # of one core; processor time; bytes


@dataclass(frozen=True)
class Sight:
    """One look at a rank's process."""

    state: str  # as in /proc; "" when it has ended
    cpu: float = 0.0  # seconds, with its children
    moved: int = 0  # bytes read and written


@dataclass
class Watched:
    """What is known of a rank. Times are seconds as the watchdog lived through them, so that a machine that was
    asleep does not count.
    """

    process: Process
    says: dict  # its own report, see rank.py
    below: Sequence[Process] = ()  # its children and theirs
    gone: bool = False
    state: str = ""
    stopped_for: float = 0.0
    quiet_for: float = 0.0
    silent_for: float = 0.0  # since its last report
    ended_for: float = 0.0  # since it said that its command was through
    _then: Sight | None = field(default=None, repr=False)  # when it became quiet

    @property
    def at_work(self) -> bool:
        return not self.gone and self.says["ended"] is None

    @property
    def name(self) -> str:
        return f"rank {self.says['rank']} (host {self.says['host']}, process {self.process.pid})"

    @property
    def seen(self) -> str:
        """What it was last seen doing."""
        return f"last seen: {self.says['doing']} ({self.silent_for:.0f} s ago)"

    def observe(self, seconds: float, says: dict, sight: Sight) -> None:
        """Take in a look, `seconds` after the one before."""
        reported = says["reports"] != self.says["reports"]
        running = sight.state == self.state == "R"  # it may wait long for a processor
        self.gone, self.state = not sight.state, sight.state
        self.says = says
        self.ended_for = self.ended_for + seconds if says["ended"] is not None else 0.0
        self.stopped_for = self.stopped_for + seconds if sight.state == "T" else 0.0
        self.silent_for = 0.0 if reported else self.silent_for + seconds
        if self._then is None or reported or running or sight.state in "Dt" or self._worked(sight, seconds):
            self.quiet_for, self._then = 0.0, sight
        else:
            self.quiet_for += seconds

    def _worked(self, sight: Sight, seconds: float) -> bool:
        spent = sight.cpu - self._then.cpu
        enough = max(BUSY_SECONDS, BUSY_SHARE * (self.quiet_for + seconds))
        return spent < 0 or spent >= enough or sight.moved - self._then.moved >= BUSY_BYTES


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: a line for people, and the ranks at fault."""

    line: str
    culprits: tuple[Watched, ...]


def fault(ranks: Sequence[Watched], limit: float | None, grace: float) -> Verdict | None:
    """The fault that needs no question: a rank that is gone, stopped, or does not end."""
    if lost := [rank for rank in ranks if rank.gone and rank.says["ended"] is None]:
        return _verdict(lost, lambda rank: "is gone, killed or crashed")
    if limit is not None and (held := [r for r in ranks if r.at_work and r.stopped_for >= FOUND * limit]):
        return _verdict(held, lambda rank: f"was stopped (SIGSTOP) for {rank.stopped_for:.0f} s")
    if staying := [rank for rank in ranks if not rank.gone and min(rank.ended_for, rank.quiet_for) >= grace]:
        return _verdict(staying, lambda rank: f"is through, exit code {rank.says['ended']}, but its process stays")
    done = (None, 0, EXIT_STOPPED)
    failed = [rank for rank in ranks if rank.says["ended"] not in done and rank.ended_for >= grace]
    if failed and any(rank.at_work for rank in ranks):
        return _verdict(failed, lambda rank: f"ended with exit code {rank.says['ended']} and the others did not follow")
    return None


def suspects(ranks: Sequence[Watched], limit: float | None) -> list[Watched]:
    """The ranks that have been quiet for too long; where they are tells whether that is a fault."""
    return [r for r in ranks if limit is not None and r.at_work and r.state != "T" and r.quiet_for >= FOUND * limit]


def standstill(
    ranks: Sequence[Watched], quiet: Sequence[Watched], places: Mapping[int, dict[str, str]]
) -> Verdict | None:
    """Whose fault it is that the ranks `quiet` are, given where they say they are (by rank; those that gave no answer
    are missing).

    Outside a collective, the rank itself is at fault. When all ranks of the job wait in collectives, nobody is left
    whom they could wait for: then it is the one that has not reported for the longest time.
    """

    def stuck(rank: Watched) -> str:
        place = places.get(rank.says["rank"])
        at = f"at {place['at']}" if place else "and gives no answer"
        return f"has stood still for {rank.quiet_for:.0f} s {at}"

    own = [rank for rank in quiet if places.get(rank.says["rank"], {"waits": ""})["waits"] == ""]
    if own:
        return _verdict(own, stuck)
    at_work = [rank for rank in ranks if rank.at_work]
    whole = {rank.says["rank"] for rank in ranks} >= set(range(ranks[0].says["world_size"]))
    waiting = [rank for rank in quiet if places[rank.says["rank"]]["waits"] == "ranks"]
    if whole and len(waiting) == len(at_work):
        return _verdict([max(waiting, key=lambda rank: rank.silent_for)], stuck)
    return None


def waiting(
    ranks: Sequence[Watched], quiet: Sequence[Watched], places: Mapping[int, dict[str, str]]
) -> list[dict] | None:
    """This host's ranks in words for other hosts, if all that are at work wait in collectives: `standstill` found
    nobody at fault here.
    """
    if {rank.says["rank"] for rank in quiet} != {rank.says["rank"] for rank in ranks if rank.at_work}:
        return None
    if any(places[rank.says["rank"]]["waits"] != "ranks" for rank in quiet):
        return None
    return [
        {"name": rank.name, "at": places[rank.says["rank"]]["at"], "seen": rank.seen, "silent_for": rank.silent_for}
        for rank in quiet
    ]


def everybody_waits(ranks: Sequence[dict]) -> Verdict:
    """The verdict on the ranks of all hosts, as `waiting` tells of them: nobody is left whom they could wait for."""
    last = max(ranks, key=lambda rank: rank["silent_for"])
    return Verdict(
        f"{last['name']} has stood still, as all ranks of all hosts, at {last['at']}, {last['seen']}; the job ends, "
        "the same command continues it",
        (),
    )


def _verdict(culprits: Sequence[Watched], what: Callable[[Watched], str]) -> Verdict:
    told = "; ".join(f"{rank.name} {what(rank)}, {rank.seen}" for rank in culprits)
    return Verdict(f"{told}; the job ends, the same command continues it", tuple(culprits))

"""The watchdog of a host's ranks: a process of its own, since one that is stopped or holds its interpreter cannot watch
itself. Started by the first rank (rank.py); ends when all of them have ended.

    python -I -S watchdog.py FOLDER

It needs the standard library alone, and is in nobody's process group: no signal to the job reaches it. It ends the
job's ranks of this host when one of them is lost (judge.py), and passes a request to stop on to all of them: a signal
to one rank, or the end of the process that started them. The watchdogs of several hosts tell each other (link.py).
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.watch import judge, processes
from pipeline.watch.judge import Sight, Verdict, Watched
from pipeline.watch.processes import MARK, Process

if TYPE_CHECKING:
    from pipeline.watch.link import Link

TICK = 0.25  # seconds between two looks
PEERS_SECONDS = 3.0  # at most, in which the peers of a rank at fault may end by themselves
FAMILY_SECONDS = 2.0  # between two looks for children of ranks
COMING_SECONDS = 20.0  # a rank that has not come by then after all others have ended will not come


class Watchdog:
    """Watches the ranks that meet in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: dict[int, Watched] = {}
        self.stopping_for: float | None = None  # seconds since the request to stop
        self.leaving = False
        self.ending_for: float | None = None  # seconds since the verdict
        self.verdict: str | None = None
        self.stop_reason: str | None = None
        self.link: Link | None = None  # to other hosts' watchdogs, once the ranks know of other hosts
        self._waiting: list[dict] | None = None  # this host's ranks, while all of them wait for others
        self._told: set[Process] = set()
        self._family_age = self._asked_age = FAMILY_SECONDS
        self._empty_for = 0.0

    @property
    def limit(self) -> float | None:
        """Seconds a rank may stand still."""
        return self._knowing["limit"]

    @property
    def grace(self) -> float:
        """Seconds a stop may take."""
        return self._knowing["grace"]

    @property
    def _knowing(self) -> dict:
        """What a rank that has read the configuration says, if there is one yet."""
        said = [rank.says for rank in self.ranks.values()]
        return next((says for says in said if says["configured"]), said[0])

    def watch(self) -> None:
        """Until the last rank has ended."""
        last = time.monotonic()
        while True:
            at_work = not self.ranks or any(rank.at_work for rank in self.ranks.values())
            time.sleep(TICK if at_work else TICK / 5)  # who waits for the job's end waits for this process too
            now = time.monotonic()
            seconds, last = min(now - last, 2 * TICK), now  # while this process was held up, nobody was watched
            self.look(seconds)
            if self.ranks:
                self.act(seconds)
            if self.all_ended(seconds):
                self._open_link()
                if self.link is not None:
                    self.link.close(self._state())
                return

    def look(self, seconds: float) -> None:
        """See what became of every rank."""
        self._family_age += seconds
        seconds = 0.0 if self._suspended() else seconds
        for path in self.folder.glob("*.state"):
            says = self._read(path)
            if says is not None:
                rank = self.ranks.setdefault(says["rank"], Watched(Process(*says["process"]), says))
                self._see(rank, path, says, seconds)
        if self._family_age >= FAMILY_SECONDS:
            self._family_age = 0.0
            found = processes.descendants([rank.process for rank in self.ranks.values() if not rank.gone])
            for rank in self.ranks.values():
                if rank.process in found:
                    rank.below = [child.process for child in found[rank.process]]

    def act(self, seconds: float) -> None:
        """Do what has to be done now."""
        ranks = list(self.ranks.values())
        self._asked_age += seconds
        self._open_link()
        if self.link is not None:
            self.link.tick(seconds, self._state())
        if self.ending_for is not None:
            self.ending_for += seconds
            if self.ending_for >= min(PEERS_SECONDS, (self.limit or 60.0) / 10):
                self.kill(ranks)
            return
        if self.stopping_for is None:
            self.stopping_for = self._stop_wanted(ranks)
        else:
            self._press(ranks, seconds)
        verdict = judge.fault(ranks, self.limit, self.grace) or self._standstill(ranks) or self._elsewhere(ranks)
        if verdict is not None:
            self.end(verdict)

    def end(self, verdict: Verdict) -> None:
        """End the job: those at fault now, the others when they have had a moment to see it themselves."""
        say(verdict.line)
        self.ending_for, self.verdict = 0.0, verdict.line
        self.kill(verdict.culprits)
        if self.link is not None:
            self.link.tick(0.0, self._state())

    def kill(self, ranks) -> None:
        """SIGKILL ranks and their children."""
        found = processes.descendants([rank.process for rank in ranks if not rank.gone])
        for rank in ranks:
            below = [child.process for child in found.get(rank.process, [])]
            processes.kill([rank.process, *rank.below, *below])

    def all_ended(self, seconds: float) -> bool:
        """Whether nobody is left to watch, and nobody will come; then children that outlived their rank are ended."""
        if any(not rank.gone for rank in self.ranks.values()):
            self._empty_for = 0.0
            return False
        self._empty_for += seconds
        complete = self.ranks and len(self.ranks) >= next(iter(self.ranks.values())).says["local_size"]
        if not complete and self._empty_for < COMING_SECONDS:
            return False
        orphans = processes.with_environment(f"{MARK}={self.folder}")
        processes.kill([*orphans, *(child for rank in self.ranks.values() for child in rank.below)])
        return True

    def _press(self, ranks: list[Watched], seconds: float) -> None:
        """A stop has begun: all ranks know of it, and none takes longer than the grace time."""
        self.stopping_for += seconds
        self._ask([rank for rank in ranks if rank.process not in self._told], b"t")
        self._told |= {rank.process for rank in ranks}
        if self.stopping_for >= judge.LEAVE * self.grace and not self.leaving:
            self.leaving = True
            self._ask(ranks, b"x")
        late = [rank for rank in ranks if not rank.gone]
        if self.stopping_for >= self.grace and late:
            names = "; ".join(f"{rank.name}, {rank.seen}" for rank in late)
            self.end(Verdict(f"not ended {self.grace:g} s after the request to stop: {names}; killed", tuple(late)))

    def _standstill(self, ranks: list[Watched]) -> Verdict | None:
        """Ask those who have been quiet for too long where they are."""
        quiet = judge.suspects(ranks, self.limit)
        if len(quiet) < sum(rank.at_work for rank in ranks):
            self._waiting = None
        if not quiet or self._asked_age < self.limit / 20:
            return None
        self._asked_age = 0.0
        answers = {rank.says["rank"]: self.folder / f"{rank.says['rank']}.stack" for rank in quiet}
        for answer in answers.values():
            answer.unlink(missing_ok=True)
        self._ask(quiet, b"s")
        end = time.monotonic() + max(1.0, self.limit / 20)
        while time.monotonic() < end and not all(answer.is_file() for answer in answers.values()):
            time.sleep(0.02)
        places = {number: json.loads(answer.read_text()) for number, answer in answers.items() if answer.is_file()}
        verdict = judge.standstill(ranks, quiet, places)
        if verdict is None:
            self._waiting = judge.waiting(ranks, quiet, places)
        return verdict

    def _elsewhere(self, ranks: list[Watched]) -> Verdict | None:
        """What other hosts say or show; whose fault it is that all ranks of all hosts wait."""
        if self.link is None:
            return None
        if self.link.verdict is not None:
            return Verdict(self.link.verdict, ())
        if not any(rank.at_work for rank in ranks):
            return None
        if (fault := self.link.fault(self.limit, self.grace)) is not None:
            return Verdict(fault, ())
        everyone = self.link.all_waiting(self._waiting) if self._waiting else None
        return judge.everybody_waits(everyone) if everyone else None

    def _open_link(self) -> None:
        """Get in touch with other hosts' watchdogs, once the ranks have said how."""
        if self.link is not None or not (self.folder / "link").is_file():
            return
        from pipeline.watch.link import Link  # one host needs neither sockets nor hashes

        with contextlib.suppress(OSError, ValueError):
            self.link = Link(json.loads((self.folder / "link").read_text()), self.folder)

    def _state(self) -> dict:
        """What other hosts are told."""
        said = [rank.says["ended"] for rank in self.ranks.values()]
        return {
            "stop": self.stop_reason,
            "verdict": self.verdict,
            "waiting": self._waiting,
            "ended": said if said and None not in said else None,
        }

    def _ask(self, ranks, request: bytes) -> None:
        for rank in ranks:
            with contextlib.suppress(OSError):  # it has ended
                pipe = os.open(self.folder / f"{rank.says['rank']}.ask", os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(pipe, request)
                finally:
                    os.close(pipe)

    def _stop_wanted(self, ranks: list[Watched]) -> float | None:
        """0 seconds when a rank was asked to stop, or who started the ranks is gone, here or elsewhere; else None."""
        host = ranks[0].says["host"]
        if asked := next((rank.name for rank in ranks if rank.says["asked"]), None):
            self.stop_reason = f"{asked} was asked to stop"
            return 0.0
        for pid, start, name in ranks[0].says["launchers"]:
            if processes.find(Process(pid, start)) is None and any(rank.at_work for rank in ranks):
                say(f"{name} (process {pid}) is gone; the ranks of this host stop at the next step")
                self.stop_reason = f"{name} (host {host}, process {pid}) is gone"
                return 0.0
        if self.link is not None and self.link.stop and any(rank.at_work for rank in ranks):
            say(f"told by another host: {self.link.stop}; the ranks stop at the next step")
            self.stop_reason = self.link.stop
            return 0.0
        return None

    def _suspended(self) -> bool:
        """Whether the whole job of this host is stopped, and not one rank: somebody will let it go on."""
        ranks = [rank for rank in self.ranks.values() if not rank.gone]
        by = [processes.find(Process(pid, start)) for rank in ranks[:1] for pid, start, _ in rank.says["launchers"]]
        return (
            bool(ranks)
            and all(stat is not None and stat.state == "T" for stat in by)
            and all((stat := processes.find(rank.process)) is not None and stat.state == "T" for rank in ranks)
        )

    def _see(self, rank: Watched, path: Path, says: dict, seconds: float) -> None:
        found = processes.find(rank.process)
        if found is None:  # its last word may have come after the first reading
            rank.observe(seconds, self._read(path) or says, Sight(""))
            return
        children = [stat for child in rank.below if (stat := processes.find(child)) is not None]
        moved = sum(processes.transferred(pid) for pid in (rank.process.pid, *(c.process.pid for c in children)))
        rank.observe(seconds, says, Sight(found.state, found.cpu + sum(child.cpu for child in children), moved))

    def _read(self, path: Path) -> dict | None:
        try:
            data = path.read_bytes()
            return json.loads(data[1:]) | {"asked": data[:1] == b"1"}
        except (OSError, ValueError):
            return None


def say(line: str) -> None:
    """One line to the job's standard error."""
    with contextlib.suppress(OSError):
        print(f"watch: {line}", file=sys.stderr, flush=True)


def main(folder: Path) -> None:
    """Watch, in a process that has no parent to be ended with."""
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    try:
        Watchdog(folder).watch()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

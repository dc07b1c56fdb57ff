"""The ranks' talk before there is a process group: who speaks for which host, what the others are told."""

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from pipeline.preflight.network import backend_address
from pipeline.preflight.rendezvous import Meeting, NotMet, Place


@dataclass(frozen=True)
class Hosts:
    """The hosts of the job, rank 0's first; the first rank of each speaks for it."""

    names: list[str]
    ranks: list[list[int]]  # of each host
    addresses: list[dict[str, dict[str, Any]]]  # of each host, by library (`network.Address` as JSON)

    @property
    def speakers(self) -> list[int]:
        """The first rank of each host."""
        return [ranks[0] for ranks in self.ranks]

    @property
    def of_rank(self) -> list[int]:
        """The host of each rank."""
        return [host for _, host in sorted((rank, host) for host, ranks in enumerate(self.ranks) for rank in ranks)]


class Talk:
    """What one rank says and hears; `limit` is the most seconds that ranks wait for each other."""

    def __init__(self, place: Place, limit: float, libraries: list[str]) -> None:
        """Meet all ranks. Raises NotMet naming those that did not come."""
        self.place, self.limit = place, limit
        self.meeting = Meeting(place, limit)
        self.hosts = self._meet(libraries)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which judges and prints."""
        return self.place.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its host."""
        return self.place.rank in self.hosts.speakers

    def say(self, key: str, value: Any) -> None:
        """Tell the others (JSON)."""
        self.meeting.say(key, value)

    def from_main(self, key: str, more: float = 0.0) -> Any:
        """What rank 0 says, within the limit and some `more` seconds. Raises NotMet where it says nothing."""
        try:
            return self.meeting.hear(key, 0, self.limit + more)
        except (TimeoutError, DistError) as error:
            raise NotMet(f"{socket.gethostname()}: rank 0 says nothing more; see its message") from error

    def from_hosts(self, key: str, more: float = 0.0) -> list[Any]:
        """What the speakers of all hosts say. Raises NotMet naming the hosts that say nothing."""
        heard, missing = self.meeting.hear_all(key, self.hosts.speakers, self.limit + more)
        if missing:
            names = [self.hosts.names[self.hosts.speakers.index(rank)] for rank in missing]
            raise NotMet(
                f"{', '.join(names)}: nothing heard of its {key} in {self.limit + more:g} s; see whether it still "
                "runs, or give it more --timeout"
            )
        return [heard[rank] for rank in self.hosts.speakers]

    def from_ranks(self, key: str, more: float = 0.0) -> tuple[dict[int, Any], list[int]]:
        """What all ranks say, and those that say nothing."""
        return self.meeting.hear_all(key, list(range(self.place.size)), self.limit + more)

    def leave(self, code: int | None = None) -> int:
        """The exit code, which rank 0 names, on every rank. The store is rank 0's: it stays until all have heard."""
        if self.is_main:
            self.say("verdict", code)
        code = self.from_main("verdict", 30.0)
        self.say("left", True)
        if self.is_main:
            self.meeting.hear_all("left", list(range(self.place.size)), 5.0)
        return code

    def _meet(self, libraries: list[str]) -> Hosts:
        place = self.place
        addresses = {name: asdict(backend_address(name, place.address)) for name in libraries}
        self.say("hello", {"host": socket.gethostname(), "key": host_key(), "addresses": addresses})
        if self.is_main:
            hellos, missing = self.from_ranks("hello")
            self.say("roster", [hellos.get(rank) for rank in range(place.size)])
            if missing:
                came = ", ".join(sorted({hello["host"] for hello in hellos.values()}))
                raise NotMet(
                    f"{place.named(missing)} did not come to {place.address}:{place.port} in {self.limit:g} s; there "
                    f"are {len(hellos)} of {place.size}, from {came}; see that the job was started on the other hosts "
                    "and that they reach this port"
                )
        roster = self.from_main("roster", self.limit)
        if None in roster:
            raise NotMet(f"{socket.gethostname()} (rank {place.rank}): not all ranks came; see rank 0's message")
        by_host: dict[str, list[int]] = {}
        for rank, hello in enumerate(roster):
            by_host.setdefault(hello["key"], []).append(rank)
        first = [roster[ranks[0]] for ranks in by_host.values()]
        names = told_apart([(hello["host"], hello["addresses"]["gloo"]["address"]) for hello in first])
        return Hosts(names, list(by_host.values()), [hello["addresses"] for hello in first])


def host_key() -> str:
    """What the ranks of a host have in common and those of another one do not: name, kernel and network namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/net"),
    ):
        try:
            parts.append(read())
        except OSError:
            continue
    return " ".join(parts)


def told_apart(hosts: list[tuple[str, str]]) -> list[str]:
    """Names of hosts, with the address where two have the same name."""
    names = [name for name, _ in hosts]
    return [f"{name} ({address})" if names.count(name) > 1 else name for name, address in hosts]

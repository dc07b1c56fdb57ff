"""Who is where, and one message for all: what one host refuses ends the job on every host with the same sentence."""

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.files import storage_error
from pipeline.hosts.launcher import several_hosts
from pipeline.placement.distributed import World, start_world
from pipeline.watch import rank as watch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job, in the order of their lowest rank: rank 0's host is the first."""

    world: World
    of_rank: tuple[int, ...]  # host by rank
    names: tuple[str, ...]  # by host

    @property
    def several(self) -> bool:
        return len(self.names) > 1

    @property
    def own(self) -> int:
        """This rank's host."""
        return self.of_rank[self.world.rank]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of this host."""
        return tuple(rank for rank, host in enumerate(self.of_rank) if host == self.own)

    def share(self, count: int) -> range:
        """Of `count` things that every host does, those that this rank does."""
        return range(self.ranks.index(self.world.rank), count, len(self.ranks))

    def on_each(self, work: Callable[[], Any]) -> list[Any]:
        """`work()` of every rank, in rank order, on every rank. Collective.

        Raises UserError on every rank where one raised it, or an OSError, naming its host if there are others.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        except OSError as raised:
            error = str(storage_error(raised))
        gathered = self.world.gather((result, error))
        self.refuse([error for _, error in gathered])
        return [result for result, _ in gathered]

    def refuse(self, errors: Sequence[str | None]) -> None:
        """Raise what ranks refused, by rank, as one UserError; each host says a thing once."""
        told = list(dict.fromkeys((self.of_rank[rank], error) for rank, error in enumerate(errors) if error))
        if not told:
            return
        if len({error for _, error in told}) == 1 and len(told) == len(self.names):
            raise UserError(told[0][1])
        raise UserError("; ".join(f"host {self.names[host]}: {error}" for host, error in told))


def meet(world: World, error: UserError | None = None) -> Hosts:
    """The hosts of a job, as the first thing that its ranks do together. Collective.

    `error` is what this rank refused before; it is raised on every rank.
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    found = world.gather((socket.gethostname(), boot, None if error is None else str(error)))
    places = list(dict.fromkeys(place[:2] for place in found))
    names = [name if [n for n, _ in places].count(name) == 1 else f"{name} ({boot[:8]})" for name, boot in places]
    hosts = Hosts(world, tuple(places.index(place[:2]) for place in found), tuple(names))
    hosts.refuse([refused for _, _, refused in found])
    if hosts.several:
        connect_watchdogs(hosts)
    return hosts


def connect_watchdogs(hosts: Hosts) -> None:
    """Let the watchdogs of all hosts know of each other; that of rank 0's host listens where rank 0 does, on a port of
    its own. Collective.
    """
    world = hosts.world
    ranks = [[str(rank) for rank, host in enumerate(hosts.of_rank) if host == own] for own in range(len(hosts.names))]
    told = [
        f"{name} (rank{'s' * (len(own) > 1)} {', '.join(own)})" for name, own in zip(hosts.names, ranks, strict=True)
    ]
    record = {"token": secrets.token_hex(32), "hosts": told}
    if world.is_main:
        watch.join_watchdogs(record | {"own": 0})
        record["port"] = watch.link_port()
    record = world.broadcast(record)
    if record["port"] is None:
        if world.is_main:
            print("watch: a host that is cut off is noticed by the collectives alone", file=sys.stderr, flush=True)
    elif hosts.own and world.rank == hosts.ranks[0]:
        watch.join_watchdogs(record | {"own": hosts.own, "address": os.environ["MASTER_ADDR"]})


@contextmanager
def refused_together() -> Iterator[None]:
    """For what ranks do before they meet: a UserError is also raised on the ranks of other hosts, which wait for this
    one in `start_world` and `meet`.
    """
    try:
        yield
    except UserError as error:
        if several_hosts():
            try:
                world = start_world()
            except UserError:
                raise error from None  # the others did not come
            meet(world, error)
        raise

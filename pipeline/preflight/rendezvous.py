"""Where the ranks meet before there is a process group: a key-value store at MASTER_ADDR:MASTER_PORT, every wait of
which has an end.

The store is torch's own, so that the process group that is formed afterwards uses the same one.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import DistError, PrefixStore, TCPStore


class NotMet(Exception):
    """The ranks cannot meet; the message is one sentence that names who or what is missing, with the remedy."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks, as the launcher's environment has it (`distributed.read_places`)."""

    rank: int
    size: int
    local_rank: int
    local_size: int | None  # ranks of this host, where the launcher says it
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> "Place":
        """Read from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and the launcher's LOCAL_WORLD_SIZE."""
        seen = os.environ
        local = seen.get("LOCAL_WORLD_SIZE") or seen.get("LOCAL_SIZE")
        numbers = int(seen["RANK"]), int(seen["WORLD_SIZE"]), int(seen["LOCAL_RANK"])
        return cls(*numbers, int(local) if local else None, seen["MASTER_ADDR"], int(seen["MASTER_PORT"]))

    def named(self, ranks: list[int]) -> str:
        """Ranks in words, with their nodes where all nodes have equally many."""
        if len(ranks) > 12:
            return f"{self.named(ranks[:12])} and {len(ranks) - 12} more"
        words = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        if self.local_size and self.size % self.local_size == 0:
            nodes = sorted({rank // self.local_size for rank in ranks})
            words += f" (node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))} of the host list, from 0)"
        return words


class Meeting:
    """The ranks' common store. Values are JSON, by key and rank."""

    def __init__(self, place: Place, limit: float) -> None:
        """Join within `limit` seconds. Raises NotMet: MASTER_ADDR:MASTER_PORT cannot be bound, reached, or is not
        ours.
        """
        self.place = place
        self._store: Any = None
        self.reached_after = 0.0  # seconds that connecting to rank 0's port took
        if place.size == 1:
            self._own: dict[str, Any] = {}
            return
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent holds the port already
        begin = time.monotonic()
        if agent or place.rank > 0:
            self.reached_after = reach(place.address, place.port, limit)
        store: list[Any] = []
        raised: list[Exception] = []

        def join() -> None:
            left = timedelta(seconds=max(3.0, limit - (time.monotonic() - begin)))
            host = not agent and place.rank == 0
            kind = {} if agent else {"multi_tenant": True}
            try:
                made = TCPStore(
                    place.address, place.port, place.size, host, timeout=left, wait_for_workers=False, **kind
                )
                store.append(PrefixStore("preflight", made))
                store[0].set(f"at the door/{place.rank}", "")  # a stranger at that port would not answer
            except (DistError, RuntimeError, OSError) as error:
                raised.append(error)

        # in a thread: a stranger who accepts and then says nothing is not waited for
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(max(4.0, limit - (time.monotonic() - begin) + 1.0))
        where = f"{place.address}:{place.port}"
        if raised and "EADDRINUSE" in str(raised[0]):
            raise NotMet(
                f"port {place.port} of {place.address} is taken by another process; end that process, or name a free "
                "port with --master_port (deepspeed), --master-port (torchrun) or MASTER_PORT"
            )
        if raised or thread.is_alive():
            why = " ".join(str(raised[0]).split())[:200] if raised else "no answer"
            raise NotMet(
                f"{socket.gethostname()} (rank {place.rank}): what listens at {where} is not this job's rendezvous "
                f"({why}); see what it is (ss -ltnp on that host) and name another MASTER_PORT"
            )
        self._store = store[0]

    def say(self, key: str, value: Any) -> None:
        """Tell all ranks something, once."""
        if self._store is None:
            self._own[key] = value
        else:
            self._store.set(f"{key}/{self.place.rank}", json.dumps(value))

    def hear(self, key: str, rank: int, limit: float) -> Any:
        """What a rank said. Raises TimeoutError after `limit` seconds."""
        if self._store is None:
            return self._own[key]
        name = f"{key}/{rank}"
        try:
            self._store.wait([name], timedelta(seconds=max(0.01, limit)))
        except torch.distributed.DistStoreError as error:
            raise TimeoutError(name) from error
        return json.loads(self._store.get(name))

    def hear_all(self, key: str, ranks: list[int], limit: float) -> tuple[dict[int, Any], list[int]]:
        """What each of the ranks said, and the ranks that said nothing within `limit` seconds altogether."""
        end = time.monotonic() + limit
        heard: dict[int, Any] = {}
        for rank in ranks:
            try:
                heard[rank] = self.hear(key, rank, end - time.monotonic())
            except TimeoutError:
                continue
        return heard, [rank for rank in ranks if rank not in heard]


def reach(address: str, port: int, limit: float) -> float:
    """Connect to rank 0's port, which may not be open yet; seconds the successful connection took.

    Raises NotMet after `limit` seconds, saying whether the name was unknown, the port closed or the way blocked.
    """
    end = time.monotonic() + limit
    why = "no answer"
    while (left := end - time.monotonic()) > 0:
        begin = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=min(left, 10.0)):
                return time.monotonic() - begin
        except socket.gaierror:
            why = f"the name {address} is unknown here; add it to DNS or /etc/hosts"
        except ConnectionRefusedError:
            why = "nobody listens there: rank 0 did not start, or the port is closed by a firewall that refuses"
        except TimeoutError:
            why = "no answer: a firewall drops the packets, or there is no route; open the port between the hosts"
        except OSError as error:
            why = f"{error.strerror}; check the route between the hosts"
        time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    raise NotMet(
        f"{socket.gethostname()}: {address}:{port} (MASTER_ADDR, MASTER_PORT) not reached in {limit:g} s: {why}"
    )

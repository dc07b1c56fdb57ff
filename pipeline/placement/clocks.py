"""How far apart the clocks of two processes are, from round trips of a message."""

import time
from dataclasses import dataclass

import torch

from pipeline.placement.distributed import World

ROUNDS = 9  # round trips of a measurement; the fastest one counts


@dataclass(frozen=True)
class Offset:
    """How far this clock is ahead of another one's: the truth lies within `seconds` +- `half_width`."""

    seconds: float
    half_width: float


def offset_of(trips: list[tuple[float, float, float]]) -> Offset:
    """Our clock against another's from round trips (sent, other's time, received), by the fastest one.

    The other read its clock somewhere between our two times: the middle, give or take half the trip (Cristian 1989).
    """
    sent, there, received = min(trips, key=lambda trip: trip[2] - trip[0])
    return Offset((sent + received) / 2 - there, (received - sent) / 2)


def offset_from_main(world: World) -> Offset:
    """This rank's clock against rank 0's, over the control group, one rank after another. Collective."""
    told = torch.zeros(1, dtype=torch.float64)
    offset = Offset(0.0, 0.0)
    for rank in range(1, world.size):
        if world.is_main:
            for _ in range(ROUNDS):
                torch.distributed.recv(told, src=rank, group=world.control)
                told[0] = time.time()
                torch.distributed.send(told, dst=rank, group=world.control)
        elif world.rank == rank:
            trips = []
            for _ in range(ROUNDS):
                sent = time.time()
                torch.distributed.send(told, dst=0, group=world.control)
                torch.distributed.recv(told, src=0, group=world.control)
                trips.append((sent, float(told), time.time()))
            offset = offset_of(trips)
    return offset

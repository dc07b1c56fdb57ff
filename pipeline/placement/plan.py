"""A run's memory and traffic before it is started, and the smallest world it fits into.

Pure functions of four descriptions: backbone, what is trained, cluster, work of a rank. docs/PLAN.md says what is
counted and what is not.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from pipeline.placement.architecture import Architecture
from pipeline.placement.cluster import Placement, Workload, check, degrees
from pipeline.placement.memory import Loading, Memory, loading_of, memory_of
from pipeline.placement.traffic import Traffic, traffic_of
from pipeline.placement.trainable import Trainable, bank_growth

USABLE = 0.9  # of a device's memory; the rest is left to the allocator and the libraries
MAX_NODES = 512  # that are searched for the smallest world


@dataclass(frozen=True)
class Plan:
    """All that is known before a run."""

    world: int
    parameters: int
    active_parameters: int
    parameters_by_kind: dict[str, int]
    trainable_parameters: int
    experts_per_rank: int
    memory: Memory
    loading: Loading
    traffic: Traffic
    fits: bool
    bank_growth: dict[str, int]  # bytes a task, by file


def plan(architecture: Architecture, trainable: Trainable, placement: Placement, workload: Workload) -> Plan:
    """What one rank holds and sends. Raises UserError where the degrees do not fit."""
    check(architecture, placement, workload)
    memory = memory_of(architecture, trainable, placement, workload)
    return Plan(
        world=placement.world,
        parameters=architecture.parameters,
        active_parameters=architecture.active_parameters,
        parameters_by_kind=architecture.parameters_by_kind,
        trainable_parameters=trainable.parameters,
        experts_per_rank=architecture.num_experts // placement.expert_parallel,
        memory=memory,
        loading=loading_of(architecture, placement, workload),
        traffic=traffic_of(architecture, trainable, placement, workload),
        fits=memory.total <= USABLE * placement.device_memory,
        bank_growth=bank_growth(architecture, trainable),
    )


def smallest_world(
    architecture: Architecture, trainable: Trainable, placement: Placement, workload: Workload
) -> Placement | None:
    """The fewest devices that fit, with the expert-parallel size of the least traffic time; None up to `MAX_NODES`.

    Part of one node, or whole nodes; ZeRO stage and all else as in `placement`.
    """
    per_node, experts = placement.devices_per_node, architecture.num_experts
    found = []
    for size in degrees(experts, max(experts, 1)):
        step = size // math.gcd(size, per_node)  # nodes whose devices make whole groups
        worlds = [replace(placement, nodes=n, expert_parallel=size) for n in range(step, MAX_NODES + 1, step)]
        # for a given size, more ranks never need more memory each
        first = bisect_left(worlds, True, key=lambda there: _fits(architecture, trainable, there, workload))
        found += worlds[first : first + 1]
    if any(there.nodes == 1 for there in found):
        for devices in range(1, per_node):
            for size in degrees(experts, devices):
                part = replace(placement, nodes=1, devices_per_node=devices, expert_parallel=size)
                if _fits(architecture, trainable, part, workload):
                    found.append(part)

    def cost(there: Placement) -> tuple[int, float]:
        return there.world, traffic_of(architecture, trainable, there, workload).total_seconds

    return min(found, key=cost, default=None)


def _fits(architecture: Architecture, trainable: Trainable, placement: Placement, workload: Workload) -> bool:
    total = memory_of(architecture, trainable, placement, workload).total
    return total <= USABLE * placement.device_memory

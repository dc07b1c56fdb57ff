"""A plan as a table for people and as JSON for programs. Bytes in GB are 10^9 bytes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline.placement.architecture import Architecture
from pipeline.placement.cluster import Placement, Workload
from pipeline.placement.plan import MAX_NODES, USABLE, Plan
from pipeline.placement.trainable import MethodChoice

Rows = list[tuple[str, str]]


def as_json(
    found: Plan, method: MethodChoice, placement: Placement, workload: Workload, smallest: Placement | None
) -> dict[str, Any]:
    """Everything of a plan, in bytes and seconds, with what it was made for."""
    traffic, memory, loading = found.traffic, found.memory, found.loading
    return {
        **asdict(found),
        "memory": {**asdict(memory), "weights": memory.weights, "total": memory.total},
        "loading": {**asdict(loading), "peak": loading.peak},
        "traffic": {**asdict(traffic), "seconds": traffic.seconds, "total_seconds": traffic.total_seconds},
        "usable_memory": USABLE * placement.device_memory,
        "smallest_world": None if smallest is None else {"world": smallest.world, **asdict(smallest)},
        "method": asdict(method),
        "placement": asdict(placement),
        "workload": asdict(workload),
    }


def as_table(
    found: Plan,
    architecture: Architecture,
    method: MethodChoice,
    placement: Placement,
    workload: Workload,
    smallest: Placement | None,
) -> str:
    """The plan in sections of aligned lines."""
    sections = {
        "Parameters": _parameters(found, architecture, method),
        f"Memory of each of {placement.world} ranks (ZeRO-{placement.zero_stage}, {workload.dtype})": _memory(found),
        f"Sent in one optimizer step of one rank, at {placement.bandwidth / 1e9:g} GB/s a device": _traffic(found),
        "Loading the backbone, each rank": _loading(found),
        "The bank grows with each task by": _growth(found),
        "Verdict": _verdict(found, placement, smallest),
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def _parameters(found: Plan, architecture: Architecture, method: MethodChoice) -> Rows:
    rows = [("backbone", f"{_count(found.parameters)}, of which a token passes {_count(found.active_parameters)}")]
    rows += [(f"  {kind.replace('_', ' ')}", _count(count)) for kind, count in found.parameters_by_kind.items()]
    rows.append(("trained", f"{_count(found.trainable_parameters)} ({method.name}, rank {method.rank})"))
    if architecture.num_experts:
        text = f"{found.experts_per_rank} of {architecture.num_experts} a layer, {architecture.top_k} a token"
        rows.append(("routed experts on a rank", text))
    return rows


def _memory(found: Plan) -> Rows:
    memory = found.memory
    return [
        ("frozen weights", _bytes(memory.weights_frozen)),
        ("trained weights", _bytes(memory.weights_trained)),
        ("  of both, small tensors kept whole", _bytes(memory.weights_whole)),
        ("gradients", _bytes(memory.gradients)),
        ("optimizer", _bytes(memory.optimizer)),
        ("gathered for use, at most (estimate)", _bytes(memory.gathered)),
        ("  largest layer gathered at once", _bytes(memory.largest_layer)),
        ("reduction buffers", _bytes(memory.buffers)),
        ("activations (estimate)", _bytes(memory.activations)),
        ("total", _bytes(memory.total)),
    ]


def _traffic(found: Plan) -> Rows:
    traffic = found.traffic
    seconds = {name: f"{value:.4g} s" for name, value in traffic.seconds.items()}
    return [
        ("all-to-all of token copies", f"{_bytes(traffic.all_to_all)}, {seconds['all_to_all']}"),
        ("  of it to other ranks, even routing", _bytes(traffic.all_to_all_leaving)),
        ("all-gather, received", f"{_bytes(traffic.all_gather_later)}, {seconds['all_gather']}"),
        ("  in the first step, which is traced", _bytes(_gathered(found))),
        ("    of it routed experts", _bytes(traffic.all_gather_experts)),
        ("gradients", f"{_bytes(traffic.gradients)}, {seconds['gradients']}"),
        ("time if nothing overlaps", f"{traffic.total_seconds:.4g} s"),
    ]


def _gathered(found: Plan) -> int:
    return found.traffic.all_gather_experts + found.traffic.all_gather_rest


def _loading(found: Plan) -> Rows:
    loading = found.loading
    return [
        ("read", _bytes(loading.requested)),
        ("held afterwards", _bytes(loading.resident)),
        ("at most, one layer being whole", _bytes(loading.peak)),
    ]


def _growth(found: Plan) -> Rows:
    rows = [(name, _bytes(size)) for name, size in found.bank_growth.items()]
    return [*rows, ("total", _bytes(sum(found.bank_growth.values())))]


def _verdict(found: Plan, placement: Placement, smallest: Placement | None) -> Rows:
    usable = _bytes(USABLE * placement.device_memory)
    word = "fits" if found.fits else "does NOT fit"
    rows = [("this world", f"{word}: {_bytes(found.memory.total)} of {usable} ({USABLE:.0%} of a device's memory)")]
    return [*rows, ("smallest world that fits", _smallest(found, smallest))]


def _smallest(found: Plan, smallest: Placement | None) -> str:
    if smallest is None:
        return (
            f"none of up to {MAX_NODES} nodes ({_bytes(found.memory.activations)} of activations do not shrink with "
            "the world); lower --tokens, or use ZeRO-3"
        )
    nodes, devices = smallest.nodes, smallest.devices_per_node
    return f"{smallest.world} ({nodes} x {devices}), expert-parallel size {smallest.expert_parallel}"


def _count(number: int) -> str:
    return next(_scaled(number, ((1e9, "B"), (1e6, "M"), (1e3, "K"))), str(number))


def _bytes(number: float) -> str:
    return next(_scaled(number, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"))), f"{number:g} B")


def _scaled(number: float, units: tuple[tuple[float, str], ...]) -> Iterator[str]:
    for size, unit in units:
        if number >= size:
            yield f"{number / size:,.2f}{unit}"

"""What the hosts said of themselves and of each other, held against each other: rows of the table and red lines."""

import json
from typing import Any

from pipeline.placement.plan import USABLE
from pipeline.preflight.collectives import Measured
from pipeline.preflight.findings import Findings
from pipeline.preflight.host import Facts
from pipeline.preflight.network import is_loopback
from pipeline.preflight.sizes import Sizes

MOST_APART = 1.0  # seconds between two clocks
SHORT = 12  # hex digits of a digest that are shown


def judge_addresses(found: Findings, addresses: list[dict[str, dict[str, Any]]], library: str) -> bool:
    """The address each host would use; whether all can be used between hosts."""
    problems = {}
    owns = [each[library] for each in addresses]
    for host, own in enumerate(owns):
        if own["problem"]:
            problems[host] = own["problem"]
        elif len(owns) > 1 and is_loopback(own["address"]):
            problems[host] = (
                f"{library} would use {own['address']} (by {own['chosen_by']}), which other hosts cannot reach; set "
                f"{library.upper()}_SOCKET_IFNAME to the interface between the hosts, in .deepspeed_env too"
            )
    cells = [f"{own['address'] or 'none'} (by {own['chosen_by']})" for own in owns]
    found.show(f"{library} address", cells, problems)
    return not problems


def judge_calls(found: Findings, library: str, calls: list[list[dict[str, Any] | None]]) -> bool:
    """Connections between each pair: calls[i][j] is what came of host i calling host j. Whether all went through."""
    cells, problems = [], {}
    for i, row in enumerate(calls):
        made = [call for call in row if call is not None]
        blocked = [f"to {found.hosts[j]}: {call['problem']}" for j, call in enumerate(row) if call and call["problem"]]
        slowest = max((call["seconds"] for call in made if not call["problem"]), default=0.0)
        cells.append(f"{len(made) - len(blocked)} of {len(made)}, at most {1e3 * slowest:.1f} ms")
        if blocked:
            problems[i] = (
                f"no connection {'; '.join(blocked)}; open all TCP ports between the hosts (the collectives choose "
                "theirs freely), or check the routes"
            )
    found.show(f"TCP to others ({library})", cells, problems)
    return not problems


def judge_clocks(found: Findings, offsets: list[dict[str, float] | None]) -> None:
    """How far each host's clock is from that of rank 0's host (None: not measured)."""
    cells, problems = ["reference"], {}
    for host, offset in enumerate(offsets[1:], 1):
        if offset is None:
            cells.append("not measured")
            continue
        seconds, width = offset["seconds"], offset["half_width"]
        cells.append(f"{1e3 * seconds:+.2f} ms ± {1e3 * width:.2f}")
        if abs(seconds) - width > MOST_APART:
            problems[host] = (
                f"its clock is {seconds:+.1f} s (± {width:.1f}) from that of {found.hosts[0]}; let chrony or ntpd set "
                "it (times of runs, locks and signed requests to an object store are judged by it)"
            )
    found.show("clock", cells, problems)


def judge_software(found: Findings, facts: list[Facts]) -> bool:
    """Versions and code; whether the ranks can form groups with each other."""
    together = True
    for package in facts[0]["versions"]:
        versions = [one["versions"][package] for one in facts]
        remedy = f"install the same {package} on every host, or the same container image"
        same = found.equal(package, versions, versions, remedy)
        together &= same or package not in ("python", "torch", "deepspeed")
    digests = [one["code"] for one in facts]
    found.equal("code", digests, [d[:SHORT] for d in digests], "deploy the same commit on every host")
    remedy = "copy stream and DeepSpeed file to every host"
    together &= _equal_or_error(found, "stream", [one["stream"] for one in facts], remedy)
    kinds = [f"{one['device']['name']}, {one['device']['backend']}" for one in facts]
    remedy = "set DS_ACCELERATOR alike on every host (.deepspeed_env), and see whether its driver is loaded"
    together &= found.equal("device, backend", kinds, kinds, remedy)
    return together


def judge_memory(found: Findings, facts: list[Facts], ranks: list[int], sizes: Sizes | None) -> None:
    """Devices and memory against the plan; `ranks` of each host. Without sizes memory is shown only."""
    cells, problems = [], {}
    for host, one in enumerate(facts):
        count, free = one["device"]["count"], one["device"]["free"]
        devices = "" if count is None else f"{count} devices, "
        needed = ranks[host] * sizes.memory if sizes else 0
        text = f"{devices}{ranks[host]} rank{'s' * (ranks[host] > 1)}, {_gb(free)} free"
        cells.append(text + f", about {_gb(needed)} needed" * bool(sizes))
        if count is not None and count < ranks[host]:
            problems[host] = f"{ranks[host]} ranks on {count} devices; correct its slots in the host list"
        elif needed > USABLE * free:
            problems[host] = (
                f"about {_gb(needed)} needed by {ranks[host]} ranks, {_gb(free)} free; end what holds it, use more "
                "hosts, or lower training.micro_batch_tokens (python jobs/plan.py shows what takes it)"
            )
    found.show("memory", cells, problems)


def judge_disk(found: Findings, facts: list[Facts], work_dir: Facts, shared: list[bool]) -> None:
    """The work_dir of rank 0's host, who shares it, and room on the disks."""
    problems: dict[int, str] = {}
    if "error" in work_dir:
        problems[0] = work_dir["error"]
    elif isinstance(work_dir.get("lock"), dict):
        problems[0] = work_dir["lock"]["error"]
    cells = ["writable" if not problems else "not usable"]
    cells += ["shared" if seen else "not shared (needs none)" for seen in shared[1:]]
    found.show("work_dir", cells, problems)
    free, needed = work_dir["free"], facts[0]["written"]
    if isinstance(free, int) and isinstance(needed, int):
        problem = f"{_gb(free)} free at {work_dir['path']}, about {_gb(needed)} are written; free some, or name another"
        cells = [f"{_gb(free)} free, about {_gb(needed)} needed"] + [""] * (len(facts) - 1)
        found.show("disk, work_dir", cells, {0: problem} if free < needed else {})
    if all(shared):
        return
    cells, problems = [], {}
    for host, one in enumerate(facts):
        cache, needed = one["cache"], one["written"]
        if shared[host]:
            cells.append("")
        elif "error" in cache:
            cells.append("unknown")
            problems[host] = cache["error"]
        else:
            cells.append(f"{_gb(cache['free'])} free at {cache['path']}")
            if isinstance(needed, int) and cache["free"] < needed:
                problems[host] = (
                    f"{_gb(cache['free'])} free at {cache['path']}, about {_gb(needed)} needed for prepared data and "
                    "copies of the experts; free some, or set PERENNIAL_CACHE to another disk"
                )
    found.show("disk, cache", cells, problems)


def judge_digests(found: Findings, facts: list[Facts]) -> None:
    """Backbone and data: equal on all hosts, or which host has another one, and in which file."""
    remedy = "copy it again from a host that has the right one"
    _equal_or_error(found, "backbone", [one["backbone"] for one in facts], remedy)
    for number in range(max(len(one["tasks"]) for one in facts)):
        none = {"error": f"its stream has no task {number + 1}; copy the stream file to every host"}
        told = [(one["tasks"][number : number + 1] or [none])[0] for one in facts]
        name = next((f"data {t['task']}" for t in told if "error" not in t), f"data of task {number + 1}")
        values = [json.dumps(t, sort_keys=True) for t in told]
        cells = [_data_cell(t) for t in told]
        problems = {host: t["error"] for host, t in enumerate(told) if "error" in t}
        right = [v for host, v in enumerate(values) if host not in problems]
        common = max(right, key=lambda v: (right.count(v), -right.index(v)), default=None)
        for host, value in enumerate(values):
            if host not in problems and value != common:
                other = values.index(common)
                problems[host] = f"{_differing(told[host], told[other])} not as on {found.hosts[other]}; {remedy}"
        found.show(name, cells, problems)


def judge_collectives(found: Findings, measured: list[list[Measured] | dict[str, str]], hosts_of: list[int]) -> None:
    """What each rank measured, or its {"error"}; `hosts_of` is the host of each rank."""
    failed = {rank: one["error"] for rank, one in enumerate(measured) if isinstance(one, dict)}
    if failed:
        problems = {hosts_of[rank]: f"rank {rank}: {why}" for rank, why in reversed(failed.items())}
        found.show("collectives", ["failed" if h in problems else "" for h in range(len(found.hosts))], problems)
        return
    for index, first in enumerate(measured[0]):
        cells, problems = [], {}
        for host in range(len(found.hosts)):
            own = [(rank, measured[rank][index]) for rank, place in enumerate(hosts_of) if place == host]
            slowest = max(one.seconds for _, one in own)
            speed = f", {first.bytes / slowest / 1e9:.2f} GB/s" if len(measured) > 1 and slowest else ""
            cells.append(f"{1e3 * slowest:.2f} ms{speed}")
            if wrong := [rank for rank, one in own if not one.right]:
                problems[host] = (
                    f"wrong values arrived at rank {', '.join(map(str, wrong))}; the network, a device or its driver "
                    "corrupts data: take this host out and test it alone"
                )
        found.show(f"{first.name} {_size(first.bytes)} ({first.note})", cells, problems)


def _equal_or_error(found: Findings, name: str, told: list[Any], remedy: str) -> bool:
    """A row of digests that must be equal; a host that has none says why. Whether they are."""
    failed = {host: one["error"] for host, one in enumerate(told) if isinstance(one, dict)}
    cells = ["cannot be used" if host in failed else one[:SHORT] for host, one in enumerate(told)]
    if failed:
        rest = [one for host, one in enumerate(told) if host not in failed]
        common = max(rest, key=rest.count, default=None)
        differ = {h: f"{cells[h]}, not {common[:SHORT]}; {remedy}" for h, one in enumerate(told) if one in rest}
        failed |= {host: text for host, text in differ.items() if told[host] != common}
        found.show(name, cells, failed)
        return False
    return found.equal(name, told, cells, remedy)


def _data_cell(told: dict[str, Any]) -> str:
    if "error" in told:
        return "cannot be used"
    digests = sorted(told["files"].values())
    return f"{len(digests)} files, {digests[0][:SHORT] if digests else ''}"


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What of a task's inputs differs: its contract, or files by name."""
    files = sorted(set(one["files"]) | set(other["files"]))
    names = [name for name in files if one["files"].get(name) != other["files"].get(name)]
    names = ["the contract"] * (one["contract"] != other["contract"]) + names
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def _size(number: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"

"""What a launcher says of this process, in the environment: `deepspeed`, `torchrun`, `srun`, or nobody.

Needs the standard library alone. `srun` names things in its own way and gives no rendezvous: the address is that of
the step's first node, where rank 0 runs unless the distribution of tasks is arbitrary, the port follows from the
numbers of job and step.
"""

import os
import re
from collections.abc import Iterator, MutableMapping

_RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
# below what Linux hands out for outgoing connections (32768 and up), above what services listen on
_FIRST_PORT, _NUM_PORTS = 15000, 17000
_PART = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")


def map_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK, LOCAL_SIZE, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what `srun` sets, where they are
    not set; nothing where another launcher or nobody started this process.
    """
    if "RANK" in environment or not set(_RANKS.values()) <= environment.keys():
        return
    for name, slurm in _RANKS.items():
        environment.setdefault(name, environment[slurm])
    if (local := _local_size(environment)) is not None:
        environment.setdefault("LOCAL_SIZE", str(local))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    first = next(expand_nodes(nodes), None) or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if first:
        environment.setdefault("MASTER_ADDR", first)
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 31 + step) % _NUM_PORTS))


def expand_nodes(nodes: str) -> Iterator[str]:
    """The names in a SLURM node list such as `gpu[01-03,7],login`, in its order."""
    for part in _PART.findall(nodes):
        before, bracket, rest = part.partition("[")
        inside, _, after = rest.partition("]")
        if not bracket:
            yield part
            continue
        for piece in inside.split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                for tail in expand_nodes(after) if after else [""]:
                    yield f"{before}{number:0{len(first)}d}{tail}"


def several_hosts(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank of a job that has ranks on other hosts too, or may have: who starts ranks without
    a launcher does not say how many are on a host.
    """
    map_slurm(environment)
    size = int(environment.get("WORLD_SIZE") or 1)
    return size > int(environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or 1)


def _local_size(environment: MutableMapping[str, str]) -> int | None:
    """Tasks of this node, from a list such as `2(x3),1`."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None

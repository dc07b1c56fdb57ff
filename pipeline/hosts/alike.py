"""Whether all hosts hold the same: each has its own copy of code, backbone, contracts and data.

A host hashes each of its files once: its ranks share the work out.
"""

from collections.abc import Mapping
from typing import Any

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest
from pipeline.config import StreamConfig
from pipeline.data.ingest import source_digests
from pipeline.data.tokens import PreparedTask
from pipeline.files import canonical_json
from pipeline.hosts.meeting import Hosts
from pipeline.placement.learner import read_deepspeed_config
from pipeline.tracking.versions import code_digest, library_versions
from pipeline.watch.rank import report

SHOWN = 6  # differences of a host that are told
ABSENT = "none"
# where a host has its files is its own affair; of the rest only what decides no number and no collective
_OWN_AFFAIR = {"work_dir", "data_roots", "tasks", "start_from", "deepspeed", "tracking", "watch", "spans"}


def check_alike(config: StreamConfig, hosts: Hosts) -> dict[str, dict[str, str]]:
    """Compare all hosts with that of rank 0; {contract path: its files' digests} of those that this rank hashed.
    Collective; on one host nothing is done.

    Raises UserError on every rank, naming hosts and what differs.
    """
    files: dict[str, dict[str, str]] = {}
    if hosts.several:
        report("comparing the hosts")
        gathered = hosts.on_each(lambda: own_facts(config, hosts, files))
        facts: list[dict[str, str]] = [{} for _ in hosts.names]
        for rank, found in enumerate(gathered):
            facts[hosts.of_rank[rank]].update(found)
        refuse_differences(facts, hosts.names)
    return files


def check_prepared_alike(hosts: Hosts, prepared: Mapping[str, PreparedTask]) -> None:
    """Compare the prepared tasks of all hosts, which may have made them each for itself. Collective; on one host
    nothing is done. Raises as `check_alike`.
    """
    if not hosts.several:
        return
    rows = {
        f"prepared {split} rows of {name}": digest
        for name, task in prepared.items()
        for split, digest in task.data_digests.items()
    }
    tokens = {f"label tokens of {name}": canonical_json(task.label_ids) for name, task in prepared.items()}
    gathered = hosts.world.gather(rows | tokens)
    refuse_differences([gathered[hosts.of_rank.index(host)] for host in range(len(hosts.names))], hosts.names)


def own_facts(config: StreamConfig, hosts: Hosts, files: dict[str, dict[str, str]]) -> dict[str, str]:
    """This rank's share of what its host holds, by name. What it hashed of a contract's data comes into `files`."""
    facts: dict[str, str] = {}
    share = hosts.share(1 + len(config.tasks))
    if 0 in share:
        facts |= {f"{name} version": version for name, version in library_versions().items()}
        facts["code of data_contracts/ and pipeline/"] = code_digest()
        facts |= settings(config)
        facts["the files of backbone.path"] = backbone_digest(config.backbone.path)
    for number in share:
        if number:
            path = config.tasks[number - 1]
            contract = load_contract(path)
            files[path] = source_digests(contract, list(config.data_roots))
            facts[f"contract of tasks[{number - 1}]"] = contract.digest
            facts |= {f"data file {name} of {contract.task}": digest for name, digest in files[path].items()}
    return facts


def settings(config: StreamConfig) -> dict[str, str]:
    """What the stream and the DeepSpeed file say, save where a host has its files."""
    sections: dict[str, Any] = config.model_dump(mode="json", exclude=_OWN_AFFAIR)
    sections["backbone"].pop("path")
    sections["tasks"] = len(config.tasks)
    sections["start_from"] = config.learning().get("start_from", {})
    sections["spans.enabled"] = config.spans.enabled
    sections["tracking.system_metrics"] = config.tracking.system_metrics
    sections["deepspeed"] = read_deepspeed_config(config.deepspeed)
    return {f"stream: {name}": canonical_json(section) for name, section in sections.items()}


def refuse_differences(facts: list[Mapping[str, str]], names: tuple[str, ...]) -> None:
    """Raise UserError where a host does not hold what the first one holds."""
    told = []
    for host in range(1, len(names)):
        keys = dict.fromkeys([*facts[0], *facts[host]])
        differing = [key for key in keys if facts[0].get(key) != facts[host].get(key)]
        if differing:
            pairs = [f"{key} ({short(facts[host].get(key))}, there {short(facts[0].get(key))})" for key in differing]
            more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
            told.append(f"host {names[host]} differs from host {names[0]} in {', '.join(pairs[:SHOWN])}{more}")
    if told:
        raise UserError(f"{'; '.join(told)}; make all hosts alike, then run the same command again")


def short(value: str | None) -> str:
    """A fact for a person: digests by their first digits."""
    if value is None:
        return ABSENT
    if len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"sha256 {value[:12]}..."
    return value if len(value) <= 80 else f"{value[:77]}..."

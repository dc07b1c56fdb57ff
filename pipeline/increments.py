"""What the chain says about the next increment. Functions of manifests (newest first) and the task at hand."""

from collections.abc import Mapping
from typing import Literal

from data_contracts.errors import UserError
from pipeline.config import StreamConfig
from pipeline.data.tokens import PreparedTask
from pipeline.files import canonical_json, sha256_text
from pipeline.methods.protocol import Bundle, Increment
from pipeline.stages.job import Job
from pipeline.stages.route import router_of
from pipeline.tracking.chain import fold
from pipeline.tracking.manifest import ROUTER, Manifest


def check_same_model(config: StreamConfig, backbone: dict[str, str], chain: list[Manifest]) -> None:
    """Raise UserError where the stream describes another model than the one the published experts belong to.

    An expert's tensors mean something only with their backbone, rank, scale and targets. A rejected increment binds
    nothing.
    """
    promoted = next((manifest for manifest in chain if manifest.verdict == "promoted"), None)
    if promoted is None:
        return
    then, now = promoted.learning["method"], config.method
    pairs = {
        "backbone.path": (promoted.backbone.digest, backbone["digest"]),
        "backbone.dtype": (promoted.backbone.dtype, backbone["dtype"]),
        "method.name": (then["name"], now["name"]),
    }
    if then["name"] == now["name"]:
        shape = {key: (value, now["lora"][key]) for key, value in then.get("lora", {}).items() if key != "dropout"}
        pairs |= {f"method.lora.{key}": pair for key, pair in shape.items()}
    for key, (old, new) in pairs.items():
        if old != new:
            raise UserError(
                f"{key}: increment {promoted.increment} of this work_dir was learned with {old}, the stream now has "
                f"{new}, which the published experts do not fit; set it back or name a new work_dir"
            )


def standing(task: PreparedTask, chain: list[Manifest], learning_digest: str) -> Literal["new", "learned", "rejected"]:
    """Whether this task with this contract and data is learned, was rejected with these very inputs, or is to be
    learned.

    A new contract version or new data makes a known task new again; a changed learning configuration gives a rejected
    one another try and leaves a learned one alone.
    """
    for manifest in chain:
        if manifest.task != task.task:
            continue
        data = {split: record.digest for split, record in manifest.data.items()}
        same = manifest.contract.digest == task.contract.digest and data == task.data_digests
        if manifest.verdict == "promoted":
            return "learned" if same else "new"
        if same and manifest.learning_digest == learning_digest:
            return "rejected"
    return "new"


def measurable(
    prepared: dict[str, PreparedTask], task: PreparedTask, chain: list[Manifest], learning_digest: str
) -> dict[str, PreparedTask]:
    """The tasks whose scores this increment's row may hold: its own, and those learned from the data at hand.

    A known task with new data that is still to be learned is left out: its old score was measured on other rows.
    """
    return {
        name: other
        for name, other in prepared.items()
        if name == task.task or standing(other, chain, learning_digest) == "learned"
    }


def next_increment(job: Job, task: str, chain: list[Manifest]) -> Increment:
    """The increment that learns `task` next, with the method state it asks for. Collective."""
    champion = fold(chain)
    promoted = [manifest.task for manifest in reversed(chain) if manifest.verdict == "promoted"]
    states = champion.state if champion else {}
    increment = Increment(
        number=len(chain) + 1,
        task=task,
        seed=job.config.seed,
        bundles=champion.bundles if champion else {},
        states=without_router(states),
        order=learned_order(promoted),
        router=router_of(states),
    )
    needed = {name: increment.states[name]["state"] for name in job.method.states_needed(increment)}
    files = job.read_bank(list(needed.values()))
    return increment.with_states({name: files[digest] for name, digest in needed.items()})


def without_router(states: Mapping[str, Bundle]) -> dict[str, Bundle]:
    """The states that are a method's own, by task."""
    own = {task: {name: sha for name, sha in names.items() if name != ROUTER} for task, names in states.items()}
    return {task: names for task, names in own.items() if names}


def learned_order(promoted: list[str]) -> tuple[str, ...]:
    """Tasks by their newest promoted increment, oldest first."""
    return tuple(reversed(dict.fromkeys(reversed(promoted))))


def champion_row(chain: list[Manifest]) -> dict[str, float]:
    """Each task's score in the newest promoted increment that measured it."""
    row: dict[str, float] = {}
    for manifest in reversed(chain):
        if manifest.verdict == "promoted":
            row |= manifest.row
    return row


def inputs_key(job: Job, task: PreparedTask, chain: list[Manifest], backbone: dict[str, str]) -> str:
    """Digest of everything an increment's result depends on, save placement: names its in-flight state and its run."""
    parent = chain[0].sha256 if chain else None
    parts = [parent, task.contract.digest, task.data_digests, job.learning_digest, backbone]
    return sha256_text(canonical_json(parts))

"""What the chain says about the next increment. Functions of its history and the task at hand."""

from collections.abc import Mapping
from typing import Literal

import torch

from data_contracts.errors import UserError
from pipeline.config import StreamConfig
from pipeline.data.tokens import PreparedTask
from pipeline.files import canonical_json, seed_of, sha256_text
from pipeline.methods.protocol import Bundle, Increment, Method
from pipeline.stages.job import Job
from pipeline.stages.route import router_of
from pipeline.tracking.history import History
from pipeline.tracking.manifest import ROUTER


def check_sampling(config: StreamConfig, method: Method) -> None:
    """Raise UserError where earlier tasks are sampled though all of them move: some would be served unmeasured."""
    if config.evaluation.earlier_tasks is not None and method.retention.policy == "follow":
        raise UserError(
            f"evaluation.earlier_tasks: with method {config.method['name']} and retention follow every earlier task "
            "moves in each increment and must be scored again; remove the key, or use moe_cl with retention best or pin"
        )


def check_same_model(config: StreamConfig, backbone: dict[str, str], history: History) -> None:
    """Raise UserError where the stream describes another model than the one the published experts belong to.

    An expert's tensors mean something only with their backbone, rank, scale and targets. A rejected increment binds
    nothing.
    """
    promoted = history.promoted
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


def standing(task: PreparedTask, history: History, learning_digest: str) -> Literal["new", "learned", "rejected"]:
    """Whether this task with this contract and data is learned, was rejected with these very inputs, or is to be
    learned.

    A new contract version or new data makes a known task new again; a changed learning configuration gives a rejected
    one another try and leaves a learned one alone.
    """
    for entry in history.of_task(task.task):
        if entry.increment not in history.in_effect:  # another champion was restored since, or the task retired
            continue
        same = entry.contract.digest == task.contract.digest and entry.data == task.data_digests
        if entry.verdict == "promoted":
            return "learned" if same else "new"
        if same and entry.learning_digest == learning_digest:
            return "rejected"
    return "new"


def measurable(
    prepared: dict[str, PreparedTask],
    task: PreparedTask,
    history: History,
    learning_digest: str,
    earlier_tasks: int | None = None,
    seed: int = 0,
) -> dict[str, PreparedTask]:
    """The tasks that this increment's row scores: its own, and those learned from the data at hand, or at most
    `earlier_tasks` of these, drawn by seed and increment.

    A known task with new data that is still to be learned is left out: its old score was measured on other rows.
    """
    chosen = {task.task: task}
    earlier = [name for name in history.learned if name != task.task]
    draw = seed_of(f"earlier_tasks/{seed}/{history.length + 1}")
    for place in torch.randperm(len(earlier), generator=torch.Generator().manual_seed(draw)).tolist():
        if earlier_tasks is not None and len(chosen) > earlier_tasks:
            break
        other = prepared.get(earlier[place])
        if other is not None and standing(other, history, learning_digest) == "learned":
            chosen[other.task] = other
    return chosen


def next_increment(job: Job, task: str, history: History) -> Increment:
    """The increment that learns `task` next, with the method state it asks for. Collective."""
    increment = Increment(
        number=history.length + 1,
        task=task,
        seed=job.config.seed,
        bundles=history.bundles,
        states=without_router(history.state),
        order=tuple(history.learned),
        router=router_of(history.state),
    )
    needed = {name: increment.states[name]["state"] for name in job.method.states_needed(increment)}
    files = job.read_bank(list(needed.values()))
    return increment.with_states({name: files[digest] for name, digest in needed.items()})


def without_router(states: Mapping[str, Bundle]) -> dict[str, Bundle]:
    """The states that are a method's own, by task: the one entry that holds the router is replaced, however many."""
    held = {
        task: {name: sha for name, sha in names.items() if name != ROUTER}
        for task, names in states.items()
        if ROUTER in names
    }
    return {**states, **held}


def inputs_key(job: Job, task: PreparedTask, history: History, backbone: dict[str, str]) -> str:
    """Digest of everything an increment's result depends on, save placement: names its in-flight state and its run."""
    parts = [history.head_sha256, task.contract.digest, task.data_digests, job.learning_digest, backbone]
    return sha256_text(canonical_json(parts))

"""Stage 3: train the active experts on one task; what they became goes into the bank."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from data_contracts.errors import UserError
from pipeline.data.mixing import JoinedRows
from pipeline.data.tokens import PreparedTask, RowView
from pipeline.experts.lora import initial_value
from pipeline.methods.protocol import PAST, PAST_WEIGHTS, Bundle, Increment, Tensors
from pipeline.placement.state import full_shape, gather_values, stream_values, write_weights
from pipeline.stages.job import Job
from pipeline.tensor_files import Experts, TensorFile, write_tensors
from pipeline.training.adapter_folder import start_tensors, started_role
from pipeline.training.loop import StepLog, train_rows
from pipeline.training.pooled import pooled_statistics
from pipeline.training.stop import StopFlag
from pipeline.training.study import RowStudy, answer_loss


@dataclass(frozen=True)
class Trained:
    """The new task's bundle and method state, by bank digest, and the account of training."""

    bundle: Bundle
    state: Bundle
    steps: int
    rows_consumed: int
    continuations: int
    account: dict[str, int] = field(default_factory=dict)  # the method's own numbers


def train(
    job: Job,
    increment: Increment,
    prepared: PreparedTask,
    key: str,
    stop: StopFlag,
    on_step: Callable[[StepLog], None],
    learned: Mapping[str, PreparedTask] | None = None,
) -> Trained:
    """Train one increment from the champion's experts, or go on from its in-flight state. Collective.

    `key` names the increment's inputs; `learned` are the earlier tasks whose rows are at hand. Raises StoppedOnRequest
    with the state saved, UserError where the method goes back to a task that is not at hand.
    """
    method, config, learner = job.method, job.config, job.learner
    if method.plan is None:
        return Trained({}, {}, 0, 0, 0)
    rows = prepared.rows("train", config.rows.train, config.seed)
    parts = [rows, *earlier_rows(job, increment, learned or {})]
    study = RowStudy(learner, rows, config.evaluation.batch_tokens)
    job.loaded.clear()
    past = method.past(increment, study)
    beside = {} if method.packs else add_past(job, increment, past)
    if method.packs:
        method.learn_beside(learner, [(job.open_bank(digest), weight) for digest, weight in past])
    start = start_values(job, increment, choose_start(job, increment, prepared))
    method.begin(increment, learner.ffns, start.drawn)
    learner.set_active(method.plan.roles)
    result = train_rows(
        learner,
        method,
        config,
        rows if len(parts) == 1 else JoinedRows(parts, method.learns_earlier_answers),
        start,
        seed=config.seed,
        inflight=job.inflight,
        read_here=job.read_here,
        key=key,
        title=f"increment {increment.number} {increment.task}",
        stop=stop,
        on_step=on_step,
        batches=method.batches(increment, [len(part) for part in parts], config.training),
    )
    job.loaded.clear()
    pooled = pooled_statistics(learner, rows, config.evaluation.batch_tokens) if method.wants_pooled() else None
    published = method.published()
    kept = {name: p for name, p in learner.parameters.items() if name.partition("/")[0] not in published}
    state = method.state(pooled, gather_values(kept)) | method.learned(study)
    account: dict[str, int] = {}
    if method.packs:
        bundle, account = publish_packed(job, increment.task, [digest for digest, _ in past])
    else:
        bundle = {component: publish(job, increment.task, component) for component in published} | beside
    states = {"state": put(job, increment.task, "state", state)} if state else {}
    return Trained(bundle, states, result.steps, result.rows_consumed, result.continuations, account)


def earlier_rows(job: Job, increment: Increment, learned: Mapping[str, PreparedTask]) -> list[RowView]:
    """Training rows of the earlier tasks that the method goes back to. Raises UserError for one that is not at hand."""
    tasks = job.method.rehearses(increment)
    if missing := [task for task in tasks if task not in learned]:
        raise UserError(
            f"method {job.config.method['name']} learns from the rows of {missing[0]} again, which is learned but not "
            "in the stream with the data it was learned from; name its contract in tasks, before "
            f"{increment.task}, or choose a method without old data"
        )
    return [learned[task].rows("train", job.config.rows.train, job.config.seed) for task in tasks]


def add_past(job: Job, increment: Increment, past: Sequence[tuple[str, float]]) -> Bundle:
    """Let the earlier experts that the method names speak along; returns how a bundle says so. Collective."""
    weights = None
    if any(weight != 1.0 for _, weight in past):
        weights = put(job, increment.task, PAST_WEIGHTS, {"weights": torch.tensor([weight for _, weight in past])})
    digests = [digest for digest, _ in past]
    job.add_past(digests, weights)
    return bundle_past(digests) | ({PAST_WEIGHTS: weights} if weights else {})


def bundle_past(digests: Sequence[str]) -> Bundle:
    """How a bundle names experts of earlier tasks."""
    return {f"{PAST}{number}": digest for number, digest in enumerate(digests, start=1)}


def publish_packed(job: Job, task: str, past: Sequence[str]) -> tuple[Bundle, dict[str, int]]:
    """Put what was trained into the bank in the method's own form; the bundle, and the account of it. Collective."""
    packed, role = job.method.pack(job.learner), job.method.plan.roles[0]
    if job.world.is_main:
        print("  " + ", ".join(f"{name} {number:,}" for name, number in packed.account.items()), flush=True)
    bundle = {role: put(job, task, role, packed.tensors)} | bundle_past([past[number] for number in packed.reads])
    return bundle, packed.account


def choose_start(job: Job, increment: Increment, prepared: PreparedTask) -> dict[str, str | None]:
    """Of the starts that the method names, the one with the least loss on validation rows. Collective."""
    choices = job.method.starts(increment)
    if len(choices) == 1:
        return choices[0]
    config, learner = job.config, job.learner
    rows = prepared.rows("validation", config.rows.validation, config.seed)
    learner.set_active(job.method.plan.roles)
    losses = []
    for choice in choices:
        write_weights(learner.parameters, start_values(job, increment, choice))
        losses.append(answer_loss(learner, rows, config.evaluation.batch_tokens))
    best = min(range(len(choices)), key=losses.__getitem__)
    if job.world.is_main:
        told = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"  start {best + 1} of {len(choices)} has the least validation loss: {told}", flush=True)
    return choices[best]


def put(job: Job, task: str, component: str, tensors: Tensors) -> str:
    """Put small tensors that every rank holds into the bank; returns their digest. Collective."""
    note = {"task": task, "method": job.config.method["name"], "component": component}
    return job.world.on_main(lambda: job.bank.put(tensors, note))


def publish(job: Job, task: str, component: str) -> str:
    """Put a component as it was trained into the bank, one tensor at a time; returns its digest. Collective."""
    parameters = job.learner.components[component]
    tensors = stream_values(parameters)
    shapes = {name: tuple(full_shape(parameter)) for name, parameter in parameters.items()}
    note = {"task": task, "method": job.config.method["name"], "component": component}
    return job.world.on_main(lambda: job.bank.put_stream(shapes, tensors, note), tensors)


@dataclass(frozen=True)
class Start:
    """What every trainable tensor starts from, by `<component>/<public name>`: a `Source`.

    A component goes on from a bank file, or is drawn by seed. `drawn` are the small tensors that a method may set.
    """

    files: dict[str, TensorFile]  # by component
    seed: str
    shapes: dict[str, torch.Size]
    drawn: Tensors

    def read(self, name: str, experts: Experts = None) -> torch.Tensor:
        component, _, tensor = name.partition("/")
        if name in self.drawn:
            return self.drawn[name]
        if component in self.files:
            return self.files[component].read(tensor, experts).float()
        shape = self.shapes[name] if experts is None else (experts[1] - experts[0], *self.shapes[name][1:])
        return initial_value(tensor, tuple(shape), f"{self.seed}/{component}", experts[0] if experts else 0)


def start_values(job: Job, increment: Increment, chosen: Mapping[str, str | None] | None = None) -> Start:
    """The bank files that the method names, or those of a start of its choice, and seeded values for the rest.
    Collective.
    """
    named = job.method.start(increment) if chosen is None else chosen
    files = {component: job.open_bank(digest) for component, digest in named.items() if digest}
    files |= from_adapter(job, increment)
    shapes = {name: full_shape(parameter) for name, parameter in job.learner.parameters.items()}
    start = Start(files, f"{job.config.seed}/{increment.number}", shapes, {})
    unpublished = [name for name in shapes if name.partition("/")[0] not in job.method.published()]
    return replace(start, drawn={name: start.read(name) for name in unpublished})


def from_adapter(job: Job, increment: Increment) -> dict[str, TensorFile]:
    """The adapter that the stream names for a task which is new, as a file of its LoRA expert beside the in-flight
    state; nothing for any other task. Collective.
    """
    task = increment.task
    if task not in job.config.start_from or task in increment.bundles:
        return {}
    role, path = started_role(job.method.plan), job.inflight / "start.safetensors"
    shapes = {name: tuple(full_shape(parameter)) for name, parameter in job.learner.components[role].items()}

    def convert() -> None:
        tensors = start_tensors(job.config, job.method, task, shapes)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # the file itself may be open already
        write_tensors(temporary, shapes, sorted(tensors.items()), None)
        os.replace(temporary, path)
        print(f"  {role} expert starts from {job.config.start_from[task]}", flush=True)

    job.world.on_main(convert)
    return {role: TensorFile(job.read_here(path))}

"""Stage 3: train the active experts on one task; what they became goes into the bank."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pipeline.data.tokens import PreparedTask
from pipeline.experts.lora import initial_value
from pipeline.methods.protocol import Bundle, Increment, Tensors
from pipeline.placement.state import full_shape, gather_values, stream_values
from pipeline.stages.job import Job
from pipeline.tensor_files import Experts, TensorFile, write_tensors
from pipeline.training.adapter_folder import start_tensors, started_role
from pipeline.training.loop import StepLog, train_rows
from pipeline.training.pooled import pooled_statistics
from pipeline.training.stop import StopFlag


@dataclass(frozen=True)
class Trained:
    """The new task's bundle and method state, by bank digest, and the account of training."""

    bundle: Bundle
    state: Bundle
    steps: int
    rows_consumed: int
    continuations: int


def train(
    job: Job, increment: Increment, prepared: PreparedTask, key: str, stop: StopFlag, on_step: Callable[[StepLog], None]
) -> Trained:
    """Train one increment from the champion's experts, or go on from its in-flight state. Collective.

    `key` names the increment's inputs. Raises StoppedOnRequest with the state saved.
    """
    method, config, learner = job.method, job.config, job.learner
    if method.plan is None:
        return Trained({}, {}, 0, 0, 0)
    start = start_values(job, increment)
    method.begin(increment, learner.ffns, start.drawn)
    learner.set_active(method.plan.roles)
    job.loaded.clear()
    rows = prepared.rows("train", config.rows.train, config.seed)
    result = train_rows(
        learner,
        method,
        config,
        rows,
        start,
        seed=config.seed,
        inflight=job.inflight,
        key=key,
        title=f"increment {increment.number} {increment.task}",
        stop=stop,
        on_step=on_step,
    )
    pooled = pooled_statistics(learner, rows, config.evaluation.batch_tokens) if method.wants_pooled() else None
    published = method.published()
    kept = {name: p for name, p in learner.parameters.items() if name.partition("/")[0] not in published}
    state = method.state(pooled, gather_values(kept))
    bundle = {component: publish(job, increment.task, component) for component in published}
    note = {"task": increment.task, "method": config.method["name"], "component": "state"}
    states = {"state": job.world.on_main(lambda: job.bank.put(state, note))} if state else {}
    return Trained(bundle, states, result.steps, result.rows_consumed, result.continuations)


def publish(job: Job, task: str, component: str) -> str:
    """Put a component as it was trained into the bank, one tensor at a time; returns its digest. Collective."""
    parameters = job.learner.components[component]
    tensors = stream_values(parameters)
    digest = None
    if job.world.is_main:
        note = {"task": task, "method": job.config.method["name"], "component": component}
        digest = job.bank.put_stream({name: tuple(full_shape(p)) for name, p in parameters.items()}, tensors, note)
    else:
        for _ in tensors:  # takes part in the gathering
            pass
    return job.world.broadcast(digest)


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


def start_values(job: Job, increment: Increment) -> Start:
    """The bank files that the method names, and seeded values for the rest. Collective."""
    files = {component: job.open_bank(digest) for component, digest in job.method.start(increment).items() if digest}
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
    return {role: TensorFile(path)}

"""Stage 3: train the active experts on one task; what they became goes into the bank."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.tokens import PreparedTask
from pipeline.experts.lora import initial_value
from pipeline.methods.protocol import Bundle, Increment, Tensors
from pipeline.placement.state import full_shape
from pipeline.stages.job import Job
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
    method.begin(increment, learner.ffns, start)
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
    state = method.state(pooled, result.values)
    files = {component: part(result.values, component) for component in method.published()}
    if state:
        files["state"] = state
    note = {"task": increment.task, "method": config.method["name"]}
    digests = job.world.on_main(
        lambda: {name: job.bank.put(tensors, {**note, "component": name}) for name, tensors in files.items()}
    )
    states = {"state": digests.pop("state")} if state else {}
    return Trained(digests, states, result.steps, result.rows_consumed, result.continuations)


def start_values(job: Job, increment: Increment) -> Tensors:
    """What every trainable tensor starts from: the bank file its method names, or a fresh seeded value. Collective."""
    start = job.method.start(increment)
    files = job.read_bank([digest for digest in start.values() if digest])
    values: Tensors = {}
    for component, parameters in job.learner.components.items():
        digest = start.get(component)
        for name, parameter in parameters.items():
            if digest:
                values[f"{component}/{name}"] = files[digest][name].float().clone()
            else:
                seed = f"{job.config.seed}/{increment.number}/{component}"
                values[f"{component}/{name}"] = initial_value(name, tuple(full_shape(parameter)), seed)
    return values


def part(values: Tensors, component: str) -> Tensors:
    """One component's tensors by public name."""
    prefix = f"{component}/"
    return {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}

"""After training: the task router learns the increment's task from its training rows alone."""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.backbones.load import load_config
from pipeline.data.tokens import PreparedTask
from pipeline.evaluation.task_router import TaskRouter
from pipeline.evaluation.text_states import sum_features, text_tokens, with_layers
from pipeline.methods.protocol import Increment
from pipeline.stages.job import Job
from pipeline.stages.train import Trained
from pipeline.tracking.manifest import ROUTER


def learn_router(job: Job, increment: Increment, tasks: Mapping[str, PreparedTask]) -> tuple[TaskRouter, str] | None:
    """The champion's router with the new task's rows added, and its bank digest; None without a `router` in the stream.
    Collective.

    A router starts anew where none was learned before or its features have changed; then, and for a task learned
    while there was none, the rows of the earlier tasks at hand are read as well.
    """
    if job.config.router is None:
        return None
    before = read_router(job, increment.router) if increment.router is not None else None
    config = with_layers(job.config.router, load_config(job.config.backbone), before)
    router = TaskRouter.empty(config)
    if before is not None and before.fits(config):
        router = TaskRouter(config, before.tasks, before.normal, before.moments)
    missing = [task for task in increment.order if task not in router.tasks and task in tasks]
    job.serve({})
    for task in dict.fromkeys([*missing, increment.task]):
        rows = tasks[task].rows("train", _least(config.rows, job.config.rows.train), job.config.seed)
        tokens = text_tokens(job.tokenizer, rows.column("text"), config.max_tokens)
        router = router.learn(task, *sum_features(job.learner, router, tokens, job.config.evaluation.batch_tokens))
    return router, job.world.on_main(lambda: job.bank.put(router.tensors(), router.note()))


def with_router(trained: Trained, learned: tuple[TaskRouter, str] | None) -> tuple[TaskRouter | None, Trained]:
    """The router alone, and the training's account with the router among the state it publishes."""
    if learned is None:
        return None, trained
    router, digest = learned
    return router, replace(trained, state=trained.state | {ROUTER: digest})


def read_router(job: Job, digest: str) -> TaskRouter:
    """A published router, verified, the same on every rank. Collective."""
    tensors = job.read_bank([digest])[digest]
    return TaskRouter.restore(tensors, job.world.on_main(lambda: job.bank.metadata(digest)))


def router_of(states: Mapping[str, Mapping[str, str]]) -> str | None:
    """The bank digest of the router in a champion's table of states; None where there is none."""
    return next((names[ROUTER] for names in states.values() if ROUTER in names), None)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)

"""Case `learn` of the worker: increments through `stages.train`; what every step saw is recorded, never compared."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

import pipeline.training.loop as loop
from pipeline.backbones.load import load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.data.tokens import PreparedTask, open_shards
from pipeline.evaluation.scoring import score_rows
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, sha256_file, write_atomic
from pipeline.methods.protocol import Increment
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner, build_learner, check_before_loading
from pipeline.placement.state import gather_values, gathered, local_shape, whole_over_experts
from pipeline.stages.job import Job
from pipeline.stages.prepare import prepare
from pipeline.stages.train import train
from pipeline.stages.validate import validate
from pipeline.tracking.history import History
from pipeline.training.checks import optimizer_parameters
from pipeline.training.stop import StopFlag, StoppedOnRequest

# what increment 1, 2, 3 learn: fresh experts; a discriminator with a prototype; a known task's own expert goes on
TASKS = {1: "first", 2: "second", 3: "first"}
Records = dict[str, dict[str, dict[str, str]]]  # {increment: {"bundle" | "state": {name: bank digest}}}


class Recorder:
    """Hooks around the product's loop for one increment: what each step saw, and the tensors of its first step."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.steps: list[dict[str, float]] = []
        self.passes: list[int] = []  # micro-batches this rank ran, a step
        self.tensors: dict[str, torch.Tensor] = {}
        self._batch, self._forward = loop.run_global_batch, loop.forward

    def __enter__(self) -> "Recorder":
        loop.run_global_batch, loop.forward = self.run_global_batch, self.forward
        return self

    def __exit__(self, *_: object) -> None:
        loop.run_global_batch, loop.forward = self._batch, self._forward

    def run_global_batch(self, learner: Learner, *arguments: Any):
        """The product's, with the values before it and the gradients after it where it is the increment's first."""
        step = arguments[4]
        self.passes.append(0)
        if step == 0:
            self.keep("start", gather_values(learner.parameters))
        sums = self._batch(learner, *arguments)
        if step == 0:
            self.keep("gradient", {name: full_gradient(p) for name, p in learner.parameters.items()})
        return sums

    def forward(self, *arguments: Any):
        """The product's, counted."""
        self.passes[-1] += 1
        return self._forward(*arguments)

    def keep(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember full tensors under their kind."""
        self.tensors |= {f"{kind}/{name}": tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


def full_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole gradient; that of routed experts is put together over their expert-parallel group. Collective."""
    return whole_over_experts(parameter, safe_get_full_grad(parameter).view(local_shape(parameter)))


def learn(
    world: World, case: dict[str, Any], folder: Path, tasks: Mapping[str, PreparedTask] | None = None
) -> dict[str, Any]:
    """Train the case's increments; `records` names an earlier case whose experts they start from (else their own).

    The tasks are those of the stream unless given. With `stop_after` the last rank alone is asked to stop during that
    step. Writes <increment>.safetensors and records.json.
    """
    config = StreamConfig.model_validate(case["stream"])
    method = build_method(config)
    check_before_loading(config, method.plan)
    tokenizer = load_tokenizer(config.backbone)
    tasks = tasks or open_tasks(config, tokenizer, world)
    learner = build_learner(config, method.plan, world, train=True)
    bank = Bank(case["bank"])
    job = Job(config, world, config.work_path(), method, tokenizer, learner, bank, {})
    own: Records = {}
    given: Records | None = world.on_main(lambda: read_json(case["records"])) if case.get("records") else None
    note: dict[str, Any] = {"increments": {}, "stopped": None}
    for number in case["increments"]:
        increment = with_states(job, increment_from(number, config.seed, own if given is None else given))
        before = backbone_digests(learner)
        bank_before = bank_digests(bank)
        stop = StopFlag()
        with Recorder(learner) as recorder:

            def on_step(log, recorder=recorder, stop=stop) -> None:
                step = {"loss": log.loss, "grad_norm": log.grad_norm, "rate": log.learning_rate, **log.terms}
                recorder.steps.append(step)
                if log.step + 1 == case.get("stop_after") and world.rank == world.size - 1:
                    stop.requested = True

            try:
                trained = train(job, increment, tasks[increment.task], f"increment-{number}", stop, on_step)
            except StoppedOnRequest as stopped:
                note["stopped"] = str(stopped)
                break
        recorder.keep("final", gather_values(learner.parameters))
        own[str(number)] = {"bundle": trained.bundle, "state": trained.state}
        note["increments"][str(number)] = {
            "steps": recorder.steps,
            "passes": recorder.passes,
            "continuations": trained.continuations,
            "backbone": {"before": before, "after": backbone_digests(learner)},
            "bank": {"before": bank_before, "after": bank_digests(bank)},
            "optimizer": optimizer_report(learner),
            "pinned": pinned_scores(job, tasks["first"], own) if case.get("serve") else None,
        }
        if world.is_main:
            save_file(recorder.tensors, folder / f"{number}.safetensors")
    if world.is_main:
        write_atomic(folder / "records.json", canonical_json(own).encode())
    learner.engine.destroy()
    return note


def increment_from(number: int, seed: int, records: Records) -> Increment:
    """Increment `number` after the recorded earlier ones; every task is served with its own newest bundle (pin)."""
    earlier = [n for n in TASKS if n < number]
    return Increment(
        number=number,
        task=TASKS[number],
        seed=seed,
        bundles={TASKS[n]: records[str(n)]["bundle"] for n in earlier},
        states={TASKS[n]: records[str(n)]["state"] for n in earlier},
        order=tuple(TASKS[n] for n in earlier),
    )


def with_states(job: Job, increment: Increment) -> Increment:
    """The increment with the method states it asks for, as `increments.next_increment` reads them."""
    needed = {task: increment.states[task]["state"] for task in job.method.states_needed(increment)}
    files = job.read_bank(list(needed.values()))
    return increment.with_states({task: files[digest] for task, digest in needed.items()})


def open_tasks(config: StreamConfig, tokenizer, world: World) -> dict[str, PreparedTask]:
    """The stream's tasks, validated and prepared by rank 0, by name."""

    def work() -> list[tuple]:
        done = [validate(path, config, tokenizer, History()) for path in config.tasks]
        for validated in done:
            prepare(validated, tokenizer)
        return [(validated.contract, validated.shards) for validated in done]

    tasks = [open_shards(*place) for place in world.on_main(work)]
    return {task.task: task for task in tasks}


def pinned_scores(job: Job, task: PreparedTask, records: Records) -> list[list[float]]:
    """Label scores of the first task's test rows under the bundle of increment 1."""
    job.serve(records["1"]["bundle"])
    rows = task.rows("test", None, job.config.seed)
    prompts, _ = rows.tokens(range(len(rows)))
    return score_rows(job.learner, prompts, task.label_ids, task.end_of_answer, batch_tokens=128).tolist()


def backbone_digests(learner: Learner) -> dict[str, str]:
    """sha256 over dtype, shape and bytes of every whole weight that is not an expert's, by its name in the backbone."""
    active = {id(parameter) for parameter in learner.parameters.values()}
    digests = {}
    for name, parameter in learner.model.backbone.named_parameters():
        if id(parameter) not in active:
            with gathered([parameter]):
                digests[name.replace(".mlp.ffn.", ".mlp.")] = tensor_digest(parameter.data)
    return digests


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes of a tensor."""
    data = tensor.detach().cpu().contiguous()
    head = f"{data.dtype} {tuple(data.shape)} ".encode()
    return hashlib.sha256(head + data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def bank_digests(bank: Bank) -> dict[str, str]:
    """sha256 of the bytes of every file in the bank, by file name."""
    return {path.name: sha256_file(path) for path in sorted(bank.root.glob("*.safetensors"))}


def optimizer_report(learner: Learner) -> dict[str, Any]:
    """What the live engine's Adam holds on this rank, and what asks for gradients."""
    adam = learner.engine.optimizer.optimizer
    by_id = {id(parameter): name for name, parameter in learner.parameters.items()}
    trained = [by_id.get(id(p), "unknown") for group in optimizer_parameters(learner) for p in group]
    names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
    return {
        "class": f"{type(adam).__module__}.{type(adam).__name__}",
        "elements": sum(state["exp_avg"].numel() for state in adam.state.values()),  # on this rank
        "trained": trained,
        "active": {name: names[id(parameter)] for name, parameter in learner.parameters.items()},
        "asking": [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad],
    }


def read_json(path: str) -> Any:
    """A JSON file."""
    import json

    return json.loads(Path(path).read_text(encoding="utf-8"))

"""Our methods with a live engine, ready for a step of the product's own loop."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract
from pipeline.backbones.load import load_tokenizer
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.config import BackboneConfig, StreamConfig, build_method
from pipeline.data.batching import global_batch, row_order
from pipeline.data.tokens import PreparedTask, RowView, open_shards
from pipeline.experts.bank import Bank
from pipeline.methods.protocol import Increment, Tensors
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner, build_learner, check_before_loading
from pipeline.placement.state import Source, restore_state
from pipeline.stages.job import Job
from pipeline.stages.train import start_values
from pipeline.training.loop import StepLog, run_global_batch, train_rows
from pipeline.training.stop import StopFlag

EARLIER = "earlier"  # the task learned before the measured increment


def stream_config(options: SpeedOptions, method: str, work_dir: Path) -> StreamConfig:
    """The configuration of a stream that learns with `method`; LoRA without dropout."""
    return StreamConfig(
        stream="speed",
        work_dir=str(work_dir),
        data_roots=(options.data,),
        backbone={"path": options.backbone, "dtype": options.dtype},
        tasks=("measured.yaml",),
        method={"name": method, "lora": {"rank": options.rank, "alpha": 2 * options.rank, "dropout": 0.0}},
        training={"epochs": 1, "batch_size": options.batch_size, "save_every": 10**9},
        deepspeed=options.deepspeed,
        seed=options.seed,
    )


def build_job(
    options: SpeedOptions, method: str, work_dir: Path, world: World, tokenizer: PreTrainedTokenizerFast, *, train: bool
) -> Job:
    """A job as `jobs/continual.py` builds it. Raises UserError for a backbone or file that cannot work."""
    config = stream_config(options, method, work_dir)
    built = build_method(config)
    check_before_loading(config, built.plan)
    learner = build_learner(config, built.plan, world, train=train)
    return Job(config, world, work_dir, built, tokenizer, learner, Bank(work_dir / "bank"), {})


def second_increment(job: Job) -> Source:
    """Begin an increment that follows one learned task; returns its start values.

    `moe_cl` then plays its game against the prototypes of that task. What they hold is drawn: it costs the same.
    """
    width = job.learner.model.backbone.config.hidden_size
    states = {EARLIER: earlier_state(len(job.learner.ffns), width)}
    increment = Increment(
        number=2, task="measured", seed=job.config.seed, bundles={EARLIER: {}}, states={}, order=(EARLIER,)
    )
    increment = increment.with_states(states)
    start = start_values(job, increment)
    job.method.begin(increment, job.learner.ffns, start.drawn)
    job.learner.set_active(job.method.plan.roles)
    return start


def earlier_state(num_layers: int, width: int) -> Tensors:
    """A method state of `moe_cl`: prototype and discriminator row of one earlier task."""
    draw = torch.Generator().manual_seed(0)
    return {
        "prototype_mean": torch.randn(num_layers, width, generator=draw),
        "prototype_variance": torch.ones(num_layers, width),
        "discriminator_weight": 0.02 * torch.randn(num_layers, width, generator=draw),
        "discriminator_bias": torch.zeros(num_layers),
    }


def write_spec(options: SpeedOptions, prepared: PreparedTask, shards: Path, folder: Path, **more: Any) -> Path:
    """What a training child reads (`Spec`); the run writes below `folder`."""
    folder.mkdir(parents=True)
    spec = {
        "options": asdict(options),
        "contract": prepared.contract.model_dump(mode="json", by_alias=True),
        "shards": str(shards.resolve()),
        "work_dir": str(folder.resolve()),
        **more,
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


@dataclass(frozen=True)
class Spec:
    """What a training child was asked for, from the file that `write_spec` made."""

    given: dict[str, Any]
    options: SpeedOptions
    prepared: PreparedTask
    work_dir: Path

    @classmethod
    def read(cls, file: str) -> "Spec":
        """The spec in `file`."""
        given = json.loads(Path(file).read_text(encoding="utf-8"))
        prepared = open_shards(TaskContract.model_validate(given["contract"]), Path(given["shards"]))
        return cls(given, SpeedOptions.of(given["options"]), prepared, Path(given["work_dir"]))


def train_by_loop(
    spec: Spec,
    method: str,
    rows: RowView,
    world: World,
    on_step: Callable[[StepLog], None],
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Train on `rows` by the product's own loop, in the second increment; `on_start` is called once all is built."""
    options = spec.options
    tokenizer = load_tokenizer(BackboneConfig(path=options.backbone, dtype=options.dtype))
    job = build_job(options, method, spec.work_dir, world, tokenizer, train=True)
    start = second_increment(job)
    on_start()
    train_rows(
        job.learner,
        job.method,
        job.config,
        rows,
        start,
        seed=options.seed,
        inflight=job.inflight,
        key="speed",
        title=method,
        stop=StopFlag(),
        on_step=on_step,
    )


@dataclass
class Batches:
    """The same global batches for every contender: batch k of seeded permutations of the rows."""

    rows: RowView
    batch_size: int
    seed: int

    def __call__(self, number: int):
        per_epoch = max(1, len(self.rows) // self.batch_size)  # whole batches only
        order = row_order(len(self.rows), number // per_epoch + 1, self.seed)[-len(self.rows) :]
        return global_batch(order, number % per_epoch, self.batch_size)


def loop_step(job: Job, batches: Batches) -> Callable[[int], None]:
    """One optimizer step of the product's loop on batch k; the engine starts from the second increment's values."""
    restore_state(job.learner.engine, job.learner.parameters, second_increment(job), {}, 0)
    job.learner.model.train()

    def step(number: int) -> None:
        chosen = batches(number)
        run_global_batch(job.learner, job.method, job.config, batches.rows, chosen, number, job.config.seed)
        job.learner.engine.step()

    return step


def held_bytes(learner: Learner) -> dict[str, int]:
    """Bytes that this rank holds: frozen weights, LoRA weights with gate and discriminator, optimizer state."""
    active = {id(parameter) for parameter in learner.parameters.values()}
    held = {"backbone": 0, "experts": 0, "optimizer": 0}
    for parameter in learner.model.parameters():
        tensor = getattr(parameter, "ds_tensor", parameter)  # of a parameter that ZeRO-3 cuts, this rank's part
        held["experts" if id(parameter) in active else "backbone"] += tensor.numel() * tensor.element_size()
    adam = learner.engine.optimizer.optimizer if learner.engine is not None else None
    for group in adam.param_groups if adam is not None else ():
        for master in group["params"]:
            tensors = [master, *(value for value in adam.state[master].values() if torch.is_tensor(value))]
            held["optimizer"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return held

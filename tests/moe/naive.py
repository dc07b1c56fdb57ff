"""The oracle's runs of each backbone and increment, from the start values that its reference case recorded."""

import functools
from collections.abc import Callable

import torch

from pipeline.backbones.load import load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.data.batching import global_batch, row_order
from pipeline.data.tokens import open_shards
from pipeline.experts.bank import Bank
from pipeline.stages.validate import validate
from pipeline.tracking.history import History
from tests.distributed.learning import TASKS, increment_from
from tests.distributed.oracle import Run, Setting
from tests.distributed.worlds import Case
from tests.helpers import micro_batch
from tests.moe.oracle import MoeOracle
from tests.moe.worlds import (
    ALPHA,
    CLIPPING,
    FRESH,
    GAME,
    RANK,
    RATES,
    STEPS,
    WEIGHT_DECAY,
    MoeWorlds,
    skewed_tasks,
)

REFERENCE = {"hunyuan": "ep2-zero3", "hy": "hy-ep2-zero3", "skew": "skew-ep2-zero3"}


class Naive:
    """Runs are made once a test session, when a test first asks."""

    def __init__(self, worlds: MoeWorlds) -> None:
        self.worlds = worlds
        self.bank = Bank(worlds.bank)
        self.config = functools.cache(self._config)
        self.tasks = functools.cache(self._tasks)
        self.run = functools.cache(self._run)

    def reference(self, backbone: str) -> Case:
        """The case whose start values the oracle takes."""
        return self.worlds.case("pair", REFERENCE[backbone])

    def rows(self, backbone: str, number: int, split: str = "train"):
        """What an increment learns from."""
        return self.tasks(backbone)[TASKS[number]].rows(split, None, self.config(backbone).seed)

    def batches(self, backbone: str, number: int, steps: int = STEPS) -> list[tuple]:
        """(prompts, answers) of each global batch."""
        rows, config = self.rows(backbone, number), self.config(backbone)
        order = row_order(len(rows), 1, config.seed)
        return [rows.tokens(global_batch(order, step, config.training.batch_size)) for step in range(steps)]

    def oracle(self, backbone: str, start: dict[str, torch.Tensor]) -> MoeOracle:
        """A fresh model with these experts."""
        rates = {"shared": 1e-3, "dedicated": 1e-3, **RATES}
        end = self.rows(backbone, FRESH).end_of_answer
        setting = Setting(ALPHA / RANK, rates, WEIGHT_DECAY, CLIPPING[backbone], GAME, STEPS, end)
        return MoeOracle(self.config(backbone).backbone.path, start, setting)

    def change(self, backbone: str, number: int) -> dict[str, torch.Tensor]:
        """What the oracle's training did to every tensor."""
        start = self.reference(backbone).tensors(number, "start")
        return {name: value - start[name].double() for name, value in self.run(backbone, number).final.items()}

    def first_step(self, backbone: str, number: int, **wrong) -> Run:
        """One step with something done wrong."""
        return self._run(backbone, number, steps=1, **wrong)

    def _config(self, backbone: str) -> StreamConfig:
        return StreamConfig.model_validate(self.worlds.stream(f"pair-{REFERENCE[backbone]}", 3, 2, backbone))

    def _tasks(self, backbone: str) -> dict:
        if backbone == "skew":
            return skewed_tasks()
        config = self.config(backbone)
        tokenizer = load_tokenizer(config.backbone)
        found = [validate(path, config, tokenizer, History()) for path in config.tasks]
        opened = [open_shards(task.contract, task.shards) for task in found]
        return {task.task: task for task in opened}

    def _run(
        self,
        backbone: str,
        number: int,
        steps: int = STEPS,
        with_game: bool = True,
        reversal: float = -1.0,
        spoil: Callable[[MoeOracle], None] = lambda oracle: None,
    ) -> Run:
        batches = self.batches(backbone, number, steps)
        reference = self.reference(backbone)
        oracle = self.oracle(backbone, reference.tensors(number, "start"))
        spoil(oracle)
        if number == FRESH or not with_game:
            return oracle.train(batches)
        method = build_method(self.config(backbone))
        increment = increment_from(number, self.config(backbone).seed, reference.records)
        needed = method.states_needed(increment)
        states = {task: self.bank.get(increment.states[task]["state"]) for task in needed}
        method.begin(increment.with_states(states), [], {})

        def negatives(step: int):
            drawn = method._draw(micro_batch(*batches[step], step=step))
            return drawn.features, drawn.classes

        return oracle.train(batches, negatives, 1 + len(needed), reversal)

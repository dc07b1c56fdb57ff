"""World size, ZeRO stage, sharding and accumulation change nothing: every world against a naive single process in fp64, and against
each other. fp32, dropout 0, learning rate 1e-3, no warm-up, clipping on, 2 micro-batches a rank or more, answers of 2, 4 and 6 tokens.

Increments: 1 fresh experts; 2 a new task, with discriminator and prototypes; 3 the first task goes on. From the second on all
worlds start from the experts that the reference (ZeRO-3 on 2 ranks) put into the bank, so that each increment is compared by itself.
"""

import functools
import itertools

import pytest
import torch

from pipeline.backbones.load import load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.data.batching import global_batch, row_order
from pipeline.data.tokens import open_shards
from pipeline.experts.bank import Bank
from pipeline.stages.validate import validate
from tests.distributed.learning import TASKS, increment_from
from tests.distributed.oracle import Oracle, Run, Setting
from tests.distributed.worlds import ALPHA, CLIPPING, FRESH, GAME, GOES_ON, PROTOTYPE, RANK, RATES, STEPS, WEIGHT_DECAY
from tests.helpers import micro_batch

WORLDS = {
    "zero3 x2": ("pair_a", "zero3"),
    "zero2 x2": ("pair_b", "zero2"),
    "zero3 sharded x2": ("pair_b", "zero3-sharded"),
    "zero3 offload x2": ("pair_b", "zero3-offload"),
    "zero3 x1": ("single", "zero3"),
    "zero2 x1": ("single", "zero2"),
}
INCREMENTS = (FRESH, PROTOTYPE, GOES_ON)
LOSS, GRADIENT, CHANGE, FACTOR = 1e-5, 1e-6, 1e-3, 100  # the bounds that issue and note speak of


class Naive:
    """The oracle's run of each increment, from the start values the reference recorded."""

    def __init__(self, worlds) -> None:
        self.reference = worlds.case(*WORLDS["zero3 x2"])
        self.config = StreamConfig.model_validate(worlds.stream("reference", 3))
        self.bank = Bank(worlds.bank)
        tokenizer = load_tokenizer(self.config.backbone)
        self.rows = {}
        for path in self.config.tasks:
            validated = validate(path, self.config, tokenizer, [])
            task = open_shards(validated.contract, validated.shards)
            self.rows[task.task] = task.rows("train", None, self.config.seed)
        self.end = tokenizer.eos_token_id
        self.run = functools.cache(self._run)

    def oracle(self, start) -> Oracle:
        """A fresh model with these experts."""
        rates = {"shared": 1e-3, "dedicated": 1e-3, **RATES}
        setting = Setting(ALPHA / RANK, rates, WEIGHT_DECAY, CLIPPING, GAME, STEPS, self.end)
        return Oracle(self.config.backbone.path, start, setting)

    def _run(self, number: int) -> Run:
        rows = self.rows[TASKS[number]]
        order = row_order(len(rows), 1, self.config.seed)
        batches = [rows.tokens(global_batch(order, step, 8)) for step in range(STEPS)]
        oracle = self.oracle(self.reference.tensors(number, "start"))
        if number == FRESH:
            return oracle.train(batches)
        method = build_method(self.config)
        increment = increment_from(number, self.config.seed, self.reference.records)
        needed = method.states_needed(increment)
        states = {task: self.bank.get(increment.states[task]["state"]) for task in needed}
        method.begin(increment.with_states(states), [], {})

        def negatives(step: int):
            drawn = method._draw(micro_batch(*batches[step], step=step))
            return drawn.features, drawn.classes

        return oracle.train(batches, negatives, 1 + len(needed))


@pytest.fixture(scope="module")
def naive(worlds) -> Naive:
    return Naive(worlds)


def worst(found: dict, expected: dict) -> tuple[float, str]:
    """Largest ||a - b|| / ||b|| (Frobenius) over tensors of the same names, and whose it is.

    A tensor that is expected to be nothing (B = 0 gives A no gradient; fp64 leaves dust) must be next to nothing: its size is
    taken relative to all tensors together.
    """
    assert found.keys() == expected.keys() and found
    whole = torch.stack([tensor.double().norm() for tensor in expected.values()]).norm().item()
    differences = []
    for name, tensor in expected.items():
        size = tensor.double().norm().item()
        size = size if size > 1e-14 * whole else whole
        differences.append((torch.dist(found[name].double(), tensor.double()).item() / size, name))
    return max(differences)


def change(case, number: int) -> dict[str, torch.Tensor]:
    """What training did to every tensor."""
    start, final = case.tensors(number, "start"), case.tensors(number, "final")
    return {name: final[name].double() - start[name].double() for name in start}


def column(case, number: int, name: str) -> list[float]:
    """One number of every step."""
    return [step[name] for step in case.increment(number)["steps"]]


def gap(first: list[float], second: list[float]) -> float:
    """Largest difference of two columns."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_losses_gradients_and_change_equal_the_naive_single_process(worlds, naive, record_property, world, number):
    case = worlds.case(*WORLDS[world])
    expected = naive.run(number)
    start = naive.reference.tensors(number, "start")
    expected_change = {name: value - start[name].double() for name, value in expected.final.items()}
    losses = gap(column(case, number, "loss"), expected.losses)
    games = gap(column(case, number, "adversary"), expected.games) if number != FRESH else 0.0
    norms = max(abs(a / b - 1) for a, b in zip(column(case, number, "grad_norm"), expected.norms, strict=True))
    gradient, whose = worst(case.tensors(number, "gradient"), expected.gradient)
    moved, mover = worst(change(case, number), expected_change)
    print(
        f"{world} {number}: loss {losses:.2e} game {games:.2e} norm {norms:.2e} "
        f"gradient {gradient:.2e} ({whose}) change {moved:.2e} ({mover})"
    )
    assert losses < LOSS and games < LOSS and norms < LOSS
    assert gradient < GRADIENT, whose
    assert moved < min(CHANGE, 1 / FACTOR), mover

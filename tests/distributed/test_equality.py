"""World size, ZeRO stage, sharding and accumulation change nothing: every world equals a naive single process in fp64.

fp32, dropout 0, learning rate 1e-3, no warm-up, clipping on, at least 2 micro-batches a rank, answers of 2, 4 and 6
tokens. Increments: 1 fresh experts; 2 a new task, with discriminator and prototypes; 3 the first task goes on. From the
second on all worlds start from the experts that the reference (ZeRO-3 on 2 ranks) put into the bank, so that each
increment is compared by itself.
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
from pipeline.tracking.history import History
from tests.distributed.learning import TASKS, increment_from
from tests.distributed.oracle import Oracle, Run, Setting
from tests.distributed.worlds import (
    ALPHA,
    BATCH,
    CLIPPING,
    FRESH,
    GAME,
    GOES_ON,
    PROTOTYPE,
    RANK,
    RATES,
    STEPS,
    WEIGHT_DECAY,
)
from tests.helpers import micro_batch

WORLDS = {
    "zero3 x2": ("pair_a", "zero3"),
    "zero2 x2": ("pair_b", "zero2"),
    "zero3 sharded x2": ("pair_b", "zero3-sharded"),
    "zero3 offload x2": ("pair_a", "zero3-offload"),
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
            validated = validate(path, self.config, tokenizer, History())
            task = open_shards(validated.contract, validated.shards)
            self.rows[task.task] = task.rows("train", None, self.config.seed)
        self.end = tokenizer.eos_token_id
        self.run = functools.cache(self._run)

    def oracle(self, start) -> Oracle:
        """A fresh model with these experts."""
        rates = {"shared": 1e-3, "dedicated": 1e-3, **RATES}
        setting = Setting(ALPHA / RANK, rates, WEIGHT_DECAY, CLIPPING, GAME, STEPS, self.end)
        return Oracle(self.config.backbone.path, start, setting)

    def change(self, number: int) -> dict[str, torch.Tensor]:
        """What the oracle's training did to every tensor."""
        start = self.reference.tensors(number, "start")
        return {name: value - start[name].double() for name, value in self.run(number).final.items()}

    def first_step(self, number: int, **wrong) -> Run:
        """One step with something done wrong."""
        return self._run(number, steps=1, **wrong)

    def _run(self, number: int, steps: int = STEPS, with_game: bool = True, reversal: float = -1.0) -> Run:
        rows = self.rows[TASKS[number]]
        order = row_order(len(rows), 1, self.config.seed)
        batches = [rows.tokens(global_batch(order, step, BATCH)) for step in range(steps)]
        oracle = self.oracle(self.reference.tensors(number, "start"))
        if number == FRESH or not with_game:
            return oracle.train(batches)
        method = build_method(self.config)
        increment = increment_from(number, self.config.seed, self.reference.records)
        needed = method.states_needed(increment)
        states = {task: self.bank.get(increment.states[task]["state"]) for task in needed}
        method.begin(increment.with_states(states), [], {})

        def negatives(step: int):
            drawn = method._draw(micro_batch(*batches[step], step=step))
            return drawn.features, drawn.classes

        return oracle.train(batches, negatives, 1 + len(needed), reversal)


@pytest.fixture(scope="module")
def naive(worlds) -> Naive:
    return Naive(worlds)


def worst(found: dict, expected: dict) -> tuple[float, str]:
    """Largest ||a - b|| / ||b|| (Frobenius) over tensors of the same names, and whose it is.

    A tensor that is expected to be nothing (B = 0 gives A no gradient; fp64 leaves dust) must be next to nothing: its
    size is taken relative to all tensors together.
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


@pytest.mark.parametrize("world", WORLDS)
def test_the_run_is_as_demanding_as_it_claims(worlds, naive, world):
    case = worlds.case(*WORLDS[world])
    size = len(case.notes)
    assert size == int(world[-1])
    for number in INCREMENTS:
        assert len(set(naive.rows[TASKS[number]].answer_lengths.tolist())) == 3
        steps = case.increment(number)["steps"]
        assert len(steps) == STEPS and steps[0]["rate"] == 1e-3
        # four passes of two rows on one rank, two on each of two; the last batch of five rows needs three on one rank
        assert all(case.increment(number, rank)["passes"] == [4 // size] * 4 + [4 - size] for rank in range(size))
    norms = [norm for number in INCREMENTS for norm in column(case, number, "grad_norm")]
    assert max(norms) > CLIPPING > min(norms)


@pytest.mark.parametrize("number", INCREMENTS)
def test_every_world_starts_from_the_same_bits(worlds, naive, number):
    expected = naive.reference.tensors(number, "start")
    for world in WORLDS.values():
        found = worlds.case(*world).tensors(number, "start")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_losses_equal_the_naive_single_process(worlds, naive, world, number):
    case, expected = worlds.case(*WORLDS[world]), naive.run(number)
    assert gap(column(case, number, "loss"), expected.losses) < LOSS
    assert gap(column(case, number, "grad_norm"), expected.norms) < LOSS
    if number == FRESH:
        assert "adversary" not in case.increment(number)["steps"][0]
    else:
        assert gap(column(case, number, "adversary"), expected.games) < LOSS


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_first_gradients_equal_the_naive_single_process(worlds, naive, world, number):
    found = worlds.case(*WORLDS[world]).tensors(number, "gradient")
    difference, whose = worst(found, naive.run(number).gradient)
    assert difference < GRADIENT, whose


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_what_was_learned_equals_the_naive_single_process(worlds, naive, world, number):
    difference, whose = worst(change(worlds.case(*WORLDS[world]), number), naive.change(number))
    assert difference < CHANGE and difference < 1 / FACTOR, whose


@pytest.mark.parametrize("number", INCREMENTS)
def test_worlds_agree_with_each_other(worlds, number):
    cases = {name: worlds.case(*place) for name, place in WORLDS.items()}
    gradients = {name: case.tensors(number, "gradient") for name, case in cases.items()}
    changes = {name: change(case, number) for name, case in cases.items()}
    for one, other in itertools.combinations(WORLDS, 2):
        pair = f"{one}, {other}"
        assert gap(column(cases[one], number, "loss"), column(cases[other], number, "loss")) < LOSS, pair
        difference, whose = worst(gradients[one], gradients[other])
        assert difference < GRADIENT, f"{pair}: {whose}"
        difference, whose = worst(changes[one], changes[other])
        assert difference < CHANGE and difference < 1 / FACTOR, f"{pair}: {whose}"


def test_layers_computed_again_in_backward_learn_the_same_to_the_bit(worlds):
    kept, again = (worlds.case("pair_b", name) for name in ("zero3-sharded", "zero3-recomputed"))
    for kind in ("start", "gradient", "final"):
        expected, found = kept.tensors(GOES_ON, kind), again.tensors(GOES_ON, kind)
        assert expected.keys() == found.keys() and expected
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.increment(GOES_ON)["steps"] == kept.increment(GOES_ON)["steps"]


def test_every_expert_and_gate_moves(naive):
    for number in INCREMENTS:
        still = {name for name, value in naive.change(number).items() if not value.any()}
        assert all(name.startswith("discriminator/") for name in still)
        assert bool(still) == (number == FRESH)  # one class: no game
    # from the second increment on the gate, from the third on every tensor has a gradient at the first step already
    assert all(value.norm() > 1e-4 for value in naive.run(GOES_ON).gradient.values())


def test_the_bounds_would_notice_a_game_left_out_or_not_reversed(naive):
    found = naive.run(GOES_ON)
    for wrong in (naive.first_step(GOES_ON, with_game=False), naive.first_step(GOES_ON, reversal=1.0)):
        for name, gradient in found.gradient.items():
            notices = torch.dist(wrong.gradient[name], gradient) > FACTOR * GRADIENT * gradient.norm()
            assert bool(notices) == (name.startswith("shared/") or (not wrong.games and "discriminator/" in name)), name


@pytest.mark.parametrize("number", INCREMENTS)
def test_prototypes_are_the_naive_mean_and_variance(naive, number):
    """fp32 passes on packed rows against fp64 on padded ones: 1e-5 of the largest entry."""
    state = naive.bank.get(naive.reference.records[str(number)]["state"]["state"])
    rows = naive.rows[TASKS[number]]
    oracle = naive.oracle(naive.reference.tensors(number, "final"))
    for name, expected in zip(("mean", "variance"), oracle.prototype(*rows.tokens(range(len(rows)))), strict=True):
        found = state[f"prototype_{name}"].double()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_earlier_tasks_bring_their_own_row_to_the_discriminator(naive):
    """Increment 3 tells `first` (row 0, fresh) from `second` (row 1: what increment 2 learned as its row 0)."""
    before, now = naive.reference.tensors(PROTOTYPE, "final"), naive.reference.tensors(GOES_ON, "start")
    rows = [name for name in now if name.startswith("discriminator/")]
    assert len(rows) == 6
    for name in rows:
        assert torch.equal(now[name][1], before[name][0]) and before[name][0].any()
        assert not now[name][0].any() and not now[name][2:].any()

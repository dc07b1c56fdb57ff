"""Expert-parallel degree, ZeRO stage, world size and accumulation change nothing: every case equals a naive single
process in fp64 that loops over routed experts and computes two whole networks in each.

fp32, dropout 0, learning rate 1e-3, no warm-up, clipping on, at least 2 micro-batches a rank and step, answers of 2, 4
and 6 tokens. Increments: 1 fresh experts; 2 a new task, with discriminator and prototypes; 3 the first task goes on.
From the second on all start from the experts that the backbone's reference case (EP 2 on 2 ranks) published.
"""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.learning import tensor_digest
from tests.distributed.test_equality import CHANGE, FACTOR, GRADIENT, LOSS, change, column, gap, worst
from tests.moe.oracle import MoeOracle, NaiveBlock
from tests.moe.worlds import CLIPPING, FRESH, GOES_ON, PROTOTYPE, STEPS

pytestmark = pytest.mark.timeout(900)  # a first test waits for up to three launches
CASES = {
    "hunyuan ep2 zero3 x2": ("pair", "ep2-zero3"),
    "hunyuan ep2 zero2 x2": ("pair", "ep2-zero2"),
    "hunyuan ep1 zero3 x1": ("single", "ep1-zero3"),
    "hunyuan ep1 zero2 x1": ("single", "ep1-zero2"),
    "hunyuan ep4 zero3 x4": ("four", "ep4-zero3"),
    "hunyuan ep2 zero2 x4": ("four", "ep2-zero2"),
    "hy ep2 zero3 x2": ("pair", "hy-ep2-zero3"),
    "skew ep2 zero3 x2": ("pair", "skew-ep2-zero3"),
    "skew ep4 zero3 x4": ("four", "skew-ep4-zero3"),
}
LONG = {
    "hunyuan ep1 zero2 x2": ("pair_long", "ep1-zero2"),
    "hunyuan ep1 zero3 x2": ("pair_long", "ep1-zero3"),
    "hunyuan ep1 zero2 x4": ("four_long", "ep1-zero2"),
    "hunyuan ep1 zero3 x4": ("four_long", "ep1-zero3"),
    "hunyuan ep2 zero3 x4": ("four_long", "ep2-zero3"),
    "hunyuan ep4 zero2 x4": ("four_long", "ep4-zero2"),
    "hy ep1 zero3 x1": ("single_long", "hy-ep1-zero3"),
    "hy ep2 zero2 x2": ("pair_long", "hy-ep2-zero2"),
    "hy ep4 zero3 x4": ("four_long", "hy-ep4-zero3"),
    "skew ep1 zero2 x1": ("single_long", "skew-ep1-zero2"),
    "skew ep2 zero2 x2": ("pair_long", "skew-ep2-zero2"),
    "skew ep2 zero2 x4": ("four_long", "skew-ep2-zero2"),
    "skew ep4 zero2 x4": ("four_long", "skew-ep4-zero2"),
}
every_case = pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])


@pytest.fixture
def backbone(name: str) -> str:
    """Which of the backbones a case runs."""
    return name.partition(" ")[0]


def increments(case) -> list[int]:
    """The increments that a case learned, at least two."""
    found = sorted(map(int, case.notes[0]["increments"]))
    assert found in ([FRESH, PROTOTYPE], [PROTOTYPE, GOES_ON], [FRESH, PROTOTYPE, GOES_ON])
    return found


@pytest.fixture
def case(moe_worlds, name: str):
    """What a case left."""
    return moe_worlds.case(*(CASES | LONG)[name])


@every_case
def test_the_run_is_as_demanding_as_it_claims(naive, case, name, backbone):
    size = len(case.notes)
    assert size == int(name[-1])
    for number in increments(case):
        rows = naive.rows(backbone, number)
        assert len(set(rows.answer_lengths.tolist())) >= 3
        steps = case.increment(number)["steps"]
        assert len(steps) == STEPS and steps[0]["rate"] == 1e-3
        passes = [case.increment(number, rank)["passes"] for rank in range(size)]
        assert all(own == passes[0] for own in passes)
        if backbone != "skew":
            # the last batch has five rows: three of four ranks run a spare pass
            assert passes[0] == {1: [4, 4, 4, 4, 3], 2: [2, 2, 2, 2, 2], 4: [2, 2, 2, 2, 2]}[size]
    norms = [norm for number in increments(case) for norm in column(case, number, "grad_norm")]
    assert max(norms) > CLIPPING[backbone] > min(norms)


@every_case
def test_every_case_starts_from_the_same_bits(naive, case, backbone, name):
    for number in increments(case):
        expected, found = naive.reference(backbone).tensors(number, "start"), case.tensors(number, "start")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)


@every_case
def test_losses_equal_the_naive_single_process(naive, case, backbone, name):
    for number in increments(case):
        expected = naive.run(backbone, number)
        assert gap(column(case, number, "loss"), expected.losses) < LOSS
        assert gap(column(case, number, "grad_norm"), expected.norms) < LOSS
        if number == FRESH:
            assert "adversary" not in case.increment(number)["steps"][0]
        else:
            assert gap(column(case, number, "adversary"), expected.games) < LOSS


@every_case
def test_first_gradients_equal_the_naive_single_process(naive, case, backbone, name):
    for number in increments(case):
        difference, whose = worst(case.tensors(number, "gradient"), naive.run(backbone, number).gradient)
        assert difference < GRADIENT, f"increment {number}: {whose}"


@every_case
def test_what_was_learned_equals_the_naive_single_process(naive, case, backbone, name):
    for number in increments(case):
        difference, whose = worst(change(case, number), naive.change(backbone, number))
        assert difference < CHANGE and difference < 1 / FACTOR, f"increment {number}: {whose}"


@every_case
def test_every_expert_and_gate_moves(naive, case, backbone, name):
    for number in increments(case):
        still = {tensor for tensor, value in change(case, number).items() if not value.any()}
        assert all(tensor.startswith("discriminator/") for tensor in still)
        assert bool(still) == (number == FRESH)  # one class: no game


def uncut(oracle: MoeOracle) -> None:
    """Each layer's game reaches what lies below it, and the router."""
    for layer in blocks(oracle):
        layer.pooled = functools.partial(pooled, layer, lambda b: b.expert("shared", b.x, b.route[0]))


def routed_alone(oracle: MoeOracle) -> None:
    """The always-on network is left out of the pooled features."""

    def routed(block: NaiveBlock) -> torch.Tensor:
        whole = block.expert("shared", block.x.detach(), block.route[0].detach())
        part = f"{block.path}.{block.always_on_name}"
        tokens = block.x.detach().flatten(0, 1)
        return whole - block.swiglu(tokens, block.always_on, "shared", part, None).view_as(whole)

    for layer in blocks(oracle):
        layer.pooled = functools.partial(pooled, layer, routed)


def unweighted(oracle: MoeOracle) -> None:
    """The routed experts count alike in the pooled features."""

    def alike(block: NaiveBlock) -> torch.Tensor:
        weights = block.route[0].detach()
        return block.expert("shared", block.x.detach(), torch.full_like(weights, 1 / weights.shape[1]))

    for layer in blocks(oracle):
        layer.pooled = functools.partial(pooled, layer, alike)


def blocks(oracle: MoeOracle) -> list[NaiveBlock]:
    return [layer for layer in oracle.layers if isinstance(layer, NaiveBlock)]


def pooled(block: NaiveBlock, features, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens."""
    return torch.stack([z[kept.bool()].mean(dim=0) for z, kept in zip(features(block), mask, strict=True)])


@pytest.mark.parametrize(
    "wrong",
    ({"with_game": False}, {"reversal": 1.0}, {"spoil": uncut}, {"spoil": routed_alone}, {"spoil": unweighted}),
    ids=("no game", "not reversed", "path not cut", "always-on left out", "route weights left out"),
)
def test_the_bounds_would_notice_a_game_done_wrong(naive, wrong):
    """In increment 3: from then on the discriminator is not zero at the first step."""
    found, spoilt = naive.run("hunyuan", GOES_ON), naive.first_step("hunyuan", GOES_ON, **wrong)
    shared = {name: value for name, value in found.gradient.items() if name.startswith("shared/")}
    noticing = {
        name
        for name, value in shared.items()
        if torch.dist(spoilt.gradient[name], value) > FACTOR * GRADIENT * value.norm()
    }
    assert any(".experts." in name for name in noticing) and len(noticing) > len(shared) / 4


@pytest.mark.parametrize("backbone", ("hunyuan", "hy", "skew"))
@pytest.mark.parametrize("number", (FRESH, PROTOTYPE))
def test_prototypes_are_the_naive_mean_and_variance(naive, backbone, number):
    """fp32 passes on packed rows, experts on two ranks, against fp64 on padded ones: 1e-5 of the largest entry."""
    reference = naive.reference(backbone)
    state = naive.bank.get(reference.records[str(number)]["state"]["state"])
    rows = naive.rows(backbone, number)
    oracle = naive.oracle(backbone, reference.tensors(number, "final"))
    for name, expected in zip(("mean", "variance"), oracle.prototype(*rows.tokens(range(len(rows)))), strict=True):
        found = state[f"prototype_{name}"].double()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@every_case
def test_every_rank_holds_its_own_routed_experts_and_no_weight_moves(moe_worlds, case, backbone, name):
    """Digests of every whole weight, and of each rank's run of the routed experts, against the stock model's."""
    model = AutoModelForCausalLM.from_pretrained(moe_worlds.backbones[backbone], dtype=torch.float32)
    ep = int(name.split()[1].removeprefix("ep"))
    for rank in range(len(case.notes)):
        expected = {}
        for tensor, value in model.named_parameters():
            if ".experts." in tensor:
                local = len(value) // ep
                value = value[rank % ep * local : (rank % ep + 1) * local]
            expected[tensor] = tensor_digest(value)
        for number in increments(case):
            found = case.increment(number, rank)["backbone"]
            assert found["before"] == expected
            assert found["after"] == expected

"""MoE-CL as the pipeline drives it: what an increment starts from, the game over a global batch, what is carried on."""

import pytest
import torch

from data_contracts import load_contract
from pipeline.data.batching import micro_batches
from pipeline.data.ingest import ingest
from pipeline.data.tokens import open_shards, write_shards
from pipeline.methods.moe_cl import MoeCL, Options, build
from pipeline.methods.protocol import Increment
from pipeline.training.pooled import pooled_statistics
from tests.helpers import largest_difference, light_learner, micro_batch, ragged, randomise, recorded_inputs, tiny_llama

VOCAB, LAYERS, WIDTH = 61, 2, 48
WEIGHT = 0.3
# prompt + answer lengths are powers of two, so that 1 / length is exact in fp32 and the oracle can be compared in fp64
PROMPTS = ragged([7, 3, 14, 1, 6, 13, 2], VOCAB, seed=1)
ANSWERS = ragged([1, 1, 2, 1, 2, 3, 2], VOCAB, seed=2)
ROWS = len(PROMPTS)
BUNDLES = {
    "a": {"shared": "s1", "dedicated": "d1", "gate": "g1"},
    "b": {"shared": "s2", "dedicated": "d2", "gate": "g2"},
}
STATES = {"a": {"state": "x1"}, "b": {"state": "x2"}}


def options(**changes) -> Options:
    fields = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}, "adversary": {"weight": WEIGHT, "outputs": 4}}
    return Options.model_validate(fields | changes)


def increment(task: str = "c", number: int = 3, seed: int = 17, **changes) -> Increment:
    fields = {"bundles": BUNDLES, "states": STATES, "order": ("a", "b")}
    return Increment(number=number, task=task, seed=seed, **(fields | changes))


def some_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "prototype_mean": torch.randn(LAYERS, WIDTH),
        "prototype_variance": torch.rand(LAYERS, WIDTH),
        "discriminator_weight": torch.randn(LAYERS, WIDTH),
        "discriminator_bias": torch.randn(LAYERS),
    }


def armed(method: MoeCL, learner, **changes) -> dict[str, torch.Tensor]:
    """Begin increment 3 with the states it asks for; returns the start values."""
    start = {name: torch.zeros(p.shape) for name, p in learner.parameters.items()}
    what = increment(**changes)
    states = {name: some_state(index) for index, name in enumerate(method.states_needed(what))}
    method.begin(what.with_states(states), learner.ffns, start)
    return start


@pytest.fixture
def learner():
    built = light_learner(tiny_llama(VOCAB, num_layers=LAYERS).double(), build(options()).plan)
    randomise(built, scale=0.3)
    built.model.train()
    return built


def part_of(places, *, step: int = 4, weight: float = 1.0, world_size: int = 1):
    places = tuple(places)
    return micro_batch(
        [PROMPTS[i] for i in places],
        [ANSWERS[i] for i in places],
        places=places,
        step=step,
        weight=weight,
        global_rows=ROWS,
        world_size=world_size,
    )


# ---------------------------------------------------------------- what an increment starts from


def test_the_first_increment_starts_fresh():
    method = build(options())
    first = increment("a", 1, bundles={}, states={}, order=())
    assert method.start(first) == {"shared": None, "dedicated": None, "gate": None}
    assert method.states_needed(first) == ()


@pytest.mark.parametrize("gate", ["per_task", "shared"])
def test_a_new_task_goes_on_from_the_latest_shared_expert_and_gate(gate):
    assert build(options(gate=gate)).start(increment()) == {"shared": "s2", "dedicated": None, "gate": "g2"}


@pytest.mark.parametrize(("gate", "expected"), [("per_task", "g1"), ("shared", "g2")])
def test_a_known_task_goes_on_from_its_own_dedicated_expert(gate, expected):
    start = build(options(gate=gate)).start(increment("a"))
    assert start == {"shared": "s2", "dedicated": "d1", "gate": expected}


def test_the_latest_is_the_task_learned_last_not_the_one_written_last():
    start = build(options()).start(increment("c", 4, order=("b", "a")))
    assert start == {"shared": "s1", "dedicated": None, "gate": "g1"}


def test_at_most_the_outputs_less_one_earlier_tasks_are_drawn_by_seed():
    method = build(options())
    names = tuple(f"t{i}" for i in range(10))
    states = {name: {"state": name} for name in names} | {"t3": {}}

    def drawn(number, seed=17):
        return method.states_needed(increment("t9", number, seed, states=states, order=names))

    draws = [drawn(number) for number in range(1, 40)]
    assert all(len(set(draw)) == 3 and set(draw) <= set(names) - {"t3", "t9"} for draw in draws)
    assert {name for draw in draws for name in draw} == set(names) - {"t3", "t9"}  # every task has its turn
    assert drawn(5) == drawn(5) and len(set(draws)) > 20 and drawn(5) != drawn(5, seed=18)
    assert all(list(draw) == sorted(draw, key=names.index) for draw in draws)


def test_moved_takes_the_new_shared_expert_and_only_with_one_gate_for_all_the_gate():
    old, new = BUNDLES["a"], {"shared": "s9", "dedicated": "d9", "gate": "g9"}
    assert build(options()).moved(old, new) == {"shared": "s9", "dedicated": "d1", "gate": "g1"}
    assert build(options(gate="shared")).moved(old, new) == {"shared": "s9", "dedicated": "d1", "gate": "g9"}
    assert BUNDLES["a"] == {"shared": "s1", "dedicated": "d1", "gate": "g1"}
    assert build(options()).published() == ("shared", "dedicated", "gate")


def test_weight_zero_leaves_the_discriminator_out():
    method = build(options(adversary={"weight": 0.0}))
    learner = light_learner(tiny_llama(VOCAB, num_layers=1), method.plan)
    assert "discriminator" not in learner.components
    assert method.states_needed(increment()) == () and not method.wants_pooled()
    method.begin(increment(), learner.ffns, {})
    method.before_forward(learner.ffns, part_of([0]))
    assert learner.ffns[0].adversary is None and method.after_forward(learner.ffns) == {}


# ---------------------------------------------------------------- the game


def test_on_the_first_task_the_game_is_off(learner):
    method = build(options())
    armed(method, learner, task="a", number=1, bundles={}, states={}, order=())
    method.before_forward(learner.ffns, part_of(range(ROWS)))
    assert all(ffn.adversary is None for ffn in learner.ffns)
    assert method.after_forward(learner.ffns) == {}


def test_each_drawn_task_gets_its_discriminator_row_and_the_current_one_starts_from_zero(learner):
    start = armed(build(options()), learner)
    for layer in range(LAYERS):
        prefix = f"discriminator/model.layers.{layer}.mlp.discriminator"
        weight, bias = start[f"{prefix}.weight"], start[f"{prefix}.bias"]
        for row, state in ((1, some_state(0)), (2, some_state(1))):
            assert torch.equal(weight[row], state["discriminator_weight"][layer])
            assert torch.equal(bias[row], state["discriminator_bias"][layer])
        assert not weight[[0, 3]].any() and not bias[[0, 3]].any()
    assert not any(value.any() for name, value in start.items() if not name.startswith("discriminator/"))


def naive_game(learner, negatives, sources=(0,) * ROWS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross-entropy over layers and sequences of the whole global batch, row by row and layer by layer, and its
    gradients. `negatives` is {place: (features (L, D), class)}, or None; `sources` are the rows' own classes."""
    total, sequences = 0, ROWS * (1 if negatives is None else 2)
    for place in range(ROWS):
        with recorded_inputs(learner) as states:
            learner.model.backbone(input_ids=torch.tensor([[*PROMPTS[place], *ANSWERS[place]]]))
        for layer, (ffn, x) in enumerate(zip(learner.ffns, states, strict=True)):

            def project(name, value, ffn=ffn):
                pair = ffn.experts["ffn"]["shared"][name]
                return value @ (getattr(ffn.ffn, name).weight.detach() + 4 / 2 * pair.lora_B @ pair.lora_A).T

            gate = project("gate_proj", x)
            z = project("down_proj", gate * torch.sigmoid(gate) * project("up_proj", x))
            played = [(z[0].mean(dim=0), sources[place])]
            if negatives is not None:
                features, cls = negatives[place]
                played.append((features[layer].double(), cls))
            for value, cls in played:
                logits = ffn.discriminator.weight[:3] @ value + ffn.discriminator.bias[:3]  # tasks c, a, b
                total = total + torch.logsumexp(logits, dim=0) - logits[cls]
    mean = total / (LAYERS * sequences)
    touched = {n: p for n, p in learner.parameters.items() if n.startswith(("shared/", "discriminator/"))}
    return mean.detach(), dict(zip(touched, torch.autograd.grad(mean, list(touched.values())), strict=True))


def play(method, learner, cuts, world_size: int):
    """Run all ranks' micro-batches (places, weight): gradients averaged over ranks, negatives by place, logged mean."""
    learner.model.zero_grad(set_to_none=True)
    drawn, logged = {}, 0.0
    for rank_parts in cuts:
        for places, weight in rank_parts:
            batch = part_of(places, weight=weight, world_size=world_size)
            method.before_forward(learner.ffns, batch)
            negatives = learner.ffns[0].adversary.negatives
            if negatives is not None and weight:
                for index, place in enumerate(places):
                    drawn[place] = (negatives.features[:, index], int(negatives.classes[index]))
            logits = learner.forward(batch.input_ids, None, batch.positions, batch.position_ids)
            logged += method.after_forward(learner.ffns)["adversary"]
            assert all(ffn.adversary is None for ffn in learner.ffns)
            (logits.sum() * 0).backward()  # nothing but the game
    grads = {name: p.grad / world_size for name, p in learner.parameters.items() if p.grad is not None}
    return grads, drawn, logged / ROWS


LENGTHS = [len(p) + len(a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
CUTS = {
    "whole": (1, [[(tuple(range(ROWS)), 1.0)]]),
    "one_by_one": (1, [[((i,), 1.0) for i in range(ROWS)]]),
    "uneven_with_a_spare": (1, [[((3, 0, 5), 1.0), ((1,), 1.0), ((2, 6, 4), 1.0), ((1,), 0.0)]]),
    **{
        f"{world}_ranks": (
            world,
            [
                [(part.places, part.weight) for part in micro_batches(LENGTHS, rank, world, 2, 24)]
                for rank in range(world)
            ],
        )
        for world in (2, 3)
    },
}


@pytest.mark.parametrize("negatives", ["prototypes", "none"])
@pytest.mark.parametrize("cut", CUTS)
def test_summed_over_any_cut_the_game_is_the_mean_over_layers_and_sequences_of_the_global_batch(
    learner, cut, negatives
):
    world_size, parts = CUTS[cut]
    method = build(options(adversary={"weight": WEIGHT, "outputs": 4, "negatives": negatives}))
    armed(method, learner)
    grads, drawn, logged = play(method, learner, parts, world_size)
    assert sorted(drawn) == (list(range(ROWS)) if negatives == "prototypes" else [])
    mean, expected = naive_game(learner, drawn or None)
    signed = {n: WEIGHT * (-g if n.startswith("shared/") else g) for n, g in expected.items()}
    assert largest_difference({name: grads[name] for name in signed}, signed) < 1e-12
    assert all(g.abs().max() > 1e-6 for g in signed.values())
    assert not any(g.any() for name, g in grads.items() if name not in signed)
    assert logged == pytest.approx(float(mean), abs=1e-9)


def test_negatives_come_from_seed_increment_step_and_row_alone(learner):
    def draw(places, *, seed=17, number=3, step=4, world_size=1):
        method = build(options())
        armed(method, learner, seed=seed, number=number)
        torch.manual_seed(len(places))  # the global generator has no say
        method.before_forward(learner.ffns, part_of(places, step=step, world_size=world_size))
        got = learner.ffns[1].adversary.negatives
        return {place: (got.features[:, i].tolist(), int(got.classes[i])) for i, place in enumerate(places)}

    whole = draw(range(ROWS))
    for cut in ([0, 1, 2], [6, 3], [5], [4]):
        assert draw(cut, world_size=2) == {place: whole[place] for place in cut}
    assert len({str(value) for value in whole.values()}) == ROWS
    for other in ({"seed": 18}, {"number": 4}, {"step": 5}):
        changed = draw(range(ROWS), **other)
        assert all(changed[place][0] != whole[place][0] for place in whole)


def test_negatives_follow_the_prototypes_mean_and_variance(learner):
    method = build(options())
    armed(method, learner)
    features, classes = [], []
    for step in range(400):
        method.before_forward(learner.ffns, part_of(range(ROWS), step=step))
        got = learner.ffns[0].adversary.negatives
        features.append(got.features)
        classes.append(got.classes)
    features, classes = torch.cat(features, dim=1), torch.cat(classes)
    counts = torch.bincount(classes, minlength=4).tolist()
    assert counts[0] == counts[3] == 0 and abs(counts[1] - counts[2]) < 4 * 2800**0.5
    for cls in (1, 2):
        state, mine = some_state(cls - 1), features[:, classes == cls]
        deviation = state["prototype_variance"].sqrt()
        error = (mine.mean(dim=1) - state["prototype_mean"]) / deviation * mine.shape[1] ** 0.5
        assert error.abs().max() < 5  # standard errors
        assert (mine.std(dim=1) / deviation - 1).abs().max() < 0.15


# ---------------------------------------------------------------- what is carried on


def test_state_is_prototype_and_own_discriminator_row_and_comes_back_as_an_earlier_class(learner):
    method = build(options())
    armed(method, learner)
    values = {name: p.detach().float() for name, p in learner.parameters.items()}
    pooled = torch.randn(LAYERS, WIDTH), torch.rand(LAYERS, WIDTH)
    state = method.state(pooled, values)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "prototype_mean": (LAYERS, WIDTH),
        "prototype_variance": (LAYERS, WIDTH),
        "discriminator_weight": (LAYERS, WIDTH),
        "discriminator_bias": (LAYERS,),
    }
    assert torch.equal(state["prototype_mean"], pooled[0]) and torch.equal(state["prototype_variance"], pooled[1])
    for layer, ffn in enumerate(learner.ffns):
        assert torch.equal(state["discriminator_weight"][layer], ffn.discriminator.weight[0].float())
        assert torch.equal(state["discriminator_bias"][layer], ffn.discriminator.bias[0].float())
    assert method.state(None, values) == {}
    start = {name: torch.zeros(p.shape) for name, p in learner.parameters.items()}
    later = build(options())
    later.begin(increment("d", 4).with_states({"c": state}), learner.ffns, start)
    for ffn in learner.ffns:
        assert torch.equal(
            start[f"discriminator/{ffn.path}.discriminator.weight"][1], ffn.discriminator.weight[0].float()
        )


def test_prototypes_are_mean_and_variance_of_the_pooled_rows(data_root, tokenizer, tmp_path):
    contract = load_contract(data_root / "first.yaml")
    write_shards(ingest(contract, [str(data_root)], tokenizer=tokenizer), tokenizer, tmp_path / "shards")
    rows = open_shards(contract, tmp_path / "shards").rows("validation", None, 0)
    learner = light_learner(tiny_llama(len(tokenizer), num_layers=LAYERS).double(), build(options()).plan)
    randomise(learner, scale=0.3)
    mean, variance = pooled_statistics(learner, rows, batch_tokens=150)
    pooled = []
    for prompt, answer in zip(*rows.tokens(range(len(rows))), strict=True):
        with torch.no_grad(), recorded_inputs(learner) as states:
            learner.model.backbone(input_ids=torch.tensor([[*prompt, *answer]]))
        learner.set_active(("shared",))
        with torch.no_grad():
            pooled.append(torch.stack([ffn(x)[0].mean(dim=0) for ffn, x in zip(learner.ffns, states, strict=True)]))
        learner.set_active(("shared", "dedicated"))
    pooled = torch.stack(pooled)
    assert (mean - pooled.mean(dim=0)).abs().max() < 1e-5
    assert (variance - pooled.var(dim=0, unbiased=False)).abs().max() < 1e-5
    assert variance.min() > 0 and all(ffn.pool is None and ffn.pooled is None for ffn in learner.ffns)

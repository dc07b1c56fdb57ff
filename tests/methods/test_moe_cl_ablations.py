"""MoE-CL's ablations: rows of earlier tasks as negatives, and the warm start of a dedicated expert."""

import numpy as np
import pytest

from pipeline.config import TrainingConfig
from pipeline.data.mixing import plain_batches, rehearsal_batches
from pipeline.methods.moe_cl import MAX_STARTS, build
from tests.helpers import largest_difference, light_learner, micro_batch, randomise, tiny_llama
from tests.methods.test_moe_cl import (
    ANSWERS,
    BUNDLES,
    LAYERS,
    PROMPTS,
    ROWS,
    VOCAB,
    WEIGHT,
    armed,
    increment,
    naive_game,
    options,
)

REPLAY = {"adversary": {"weight": WEIGHT, "outputs": 4, "negatives": "replay"}}
SOURCES = (0, 2, 0, 1, 1, 0, 2)  # rows of the new task c, of a and of b
TRAINING = TrainingConfig(epochs=2, batch_size=8)


def test_replayed_negatives_are_one_old_row_for_every_new_one_and_nobody_learns_their_answers():
    method = build(options(**REPLAY))
    assert method.rehearses(increment()) == method.states_needed(increment()) == ("a", "b")
    assert not method.learns_earlier_answers
    found = method.batches(increment(), [20, 10, 30], TRAINING)
    assert all(map(np.array_equal, found, rehearsal_batches([20, 10, 30], 2, 8, 1.0, 17, 3)))


@pytest.mark.parametrize("negatives", ["none", "prototypes"])
def test_other_negatives_need_no_old_rows(negatives):
    method = build(options(adversary={"negatives": negatives}))
    assert method.rehearses(increment()) == ()
    assert all(map(np.array_equal, method.batches(increment(), [20], TRAINING), plain_batches(20, 2, 8, 17)))


@pytest.mark.parametrize("cut", [[range(ROWS)], [(0, 2, 5), (1, 3), (4, 6)]], ids=["whole", "cut"])
def test_the_discriminator_tells_the_rows_own_tasks_apart(cut):
    method = build(options(**REPLAY))
    learner = light_learner(tiny_llama(VOCAB, num_layers=LAYERS).double(), method.plan)
    randomise(learner, scale=0.3)
    learner.model.train()
    armed(method, learner)
    logged = 0.0
    for places in cut:
        batch = micro_batch(
            [PROMPTS[i] for i in places],
            [ANSWERS[i] for i in places],
            places=tuple(places),
            sources=[SOURCES[i] for i in places],
            global_rows=ROWS,
        )
        method.before_forward(learner.ffns, batch)
        assert learner.ffns[0].adversary.negatives is None
        logits = learner.forward(batch.input_ids, None, batch.positions, batch.position_ids)
        logged += method.after_forward(learner.ffns)["adversary"] / ROWS
        (logits.sum() * 0).backward()
    grads = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    mean, expected = naive_game(learner, None, SOURCES)
    signed = {n: WEIGHT * (-g if n.startswith("shared/") else g) for n, g in expected.items()}
    assert largest_difference({name: grads[name] for name in signed}, signed) < 1e-12
    assert logged == pytest.approx(float(mean), abs=1e-9)


def test_a_fresh_dedicated_expert_is_the_default_and_the_only_start():
    method = build(options())
    assert method.starts(increment()) == [method.start(increment())]


@pytest.mark.parametrize("gate", ["per_task", "shared"])
def test_a_warm_start_tries_a_fresh_expert_and_every_earlier_one_with_its_gate(gate):
    method = build(options(warm_start="similar", gate=gate))
    fresh, first, second = method.starts(increment())
    assert fresh == {"shared": "s2", "dedicated": None, "gate": "g2"}
    own = gate == "per_task"
    assert first == {"shared": "s2", "dedicated": "d1", "gate": "g1" if own else "g2"}
    assert second == {"shared": "s2", "dedicated": "d2", "gate": "g2"}
    assert method.starts(increment("a")) == [method.start(increment("a"))]  # a known task has its own
    assert method.starts(increment("a", 1, bundles={}, states={}, order=())) == [dict.fromkeys(fresh)]


def test_a_warm_start_tries_no_more_than_a_fixed_number_drawn_by_seed():
    names = tuple(f"t{i}" for i in range(30))
    bundles = {name: BUNDLES["a"] | {"dedicated": name} for name in names}
    method = build(options(warm_start="similar"))

    def tried(number):
        starts = method.starts(increment("new", number, bundles=bundles, states={}, order=names))
        return [start["dedicated"] for start in starts[1:]]

    assert len(set(tried(31))) == MAX_STARTS and tried(31) == tried(31) != tried(32)

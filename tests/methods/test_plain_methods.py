"""The methods with one LoRA expert or none: what they start from, publish, and serve earlier tasks with."""

import pytest

from pipeline.config import build_method, method_module, method_names
from pipeline.methods.protocol import Increment
from tests.helpers import light_learner, micro_batch, tiny_llama

BUNDLES = {"a": {"adapter": "x1"}, "b": {"adapter": "x2"}}


def built(name: str):
    module = method_module(name)
    return module.build(module.Options())


def increment(task: str, **changes) -> Increment:
    fields = {"bundles": BUNDLES, "states": {}, "order": ("a", "b")}
    return Increment(number=3, task=task, seed=17, **(fields | changes))


FIRST = {"bundles": {}, "states": {}, "order": ()}


def test_sequential_goes_on_from_the_latest_expert_and_every_task_moves_to_it():
    method = built("sequential")
    assert method.start(increment("a", **FIRST)) == {"adapter": None}
    assert method.start(increment("c")) == method.start(increment("a")) == {"adapter": "x2"}
    assert method.start(increment("c", order=("b", "a"))) == {"adapter": "x1"}
    assert method.retention.policy == "follow"
    assert method.moved({"adapter": "x1"}, {"adapter": "x3"}) == {"adapter": "x3"}


def test_per_task_starts_fresh_or_from_its_own_expert_and_nothing_moves():
    method = built("per_task")
    assert method.start(increment("a", **FIRST)) == method.start(increment("c")) == {"adapter": None}
    assert method.start(increment("a")) == {"adapter": "x1"}
    assert method.retention.policy == "pin"
    assert method.moved({"adapter": "x1"}, {"adapter": "x3"}) is None


def test_zero_shot_has_no_expert_at_all():
    method = built("zero_shot")
    assert method.plan is None and method.published() == () and method.start(increment("c")) == {}
    assert method.retention.policy == "pin" and method.moved({}, {}) is None


@pytest.mark.parametrize("name", ["sequential", "per_task"])
def test_one_role_one_file_no_gate_no_discriminator(name):
    method = built(name)
    learner = light_learner(tiny_llama(40, num_layers=1), method.plan)
    assert set(learner.components) == {"adapter"} == set(method.published())


@pytest.mark.parametrize("name", ["sequential", "per_task", "zero_shot"])
def test_nothing_is_added_to_the_loss_and_no_state_is_carried(name):
    method = built(name)
    learner = light_learner(tiny_llama(40, num_layers=1), method.plan)
    what = increment("c")
    start = {}
    assert method.states_needed(what) == () and not method.wants_pooled()
    method.begin(what, learner.ffns, start)
    method.before_forward(learner.ffns, micro_batch([[3, 4]], [[5]]))
    assert all(ffn.adversary is None for ffn in learner.ffns) and start == {}
    assert method.after_forward(learner.ffns) == {} and method.state(None, {}) == {}


def test_every_method_file_is_built_by_its_name():
    assert {"moe_cl", "sequential", "per_task", "zero_shot"} <= set(method_names())
    hooks = ("start", "states_needed", "begin", "before_forward", "after_forward", "wants_pooled", "state", "published")
    for name in method_names():
        config = type("Config", (), {"method": {"name": name}})
        method = build_method(config)
        assert all(callable(getattr(method, hook)) for hook in (*hooks, "moved"))
        assert method.retention.policy in ("follow", "pin", "best")

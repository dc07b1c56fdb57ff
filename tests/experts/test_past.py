"""Experts of earlier tasks that speak along with a task's own: one summed low-rank pair in every projection."""

import pytest
import torch
from torch import nn

from pipeline.experts.attach import ExpertPlan, pairs_of
from pipeline.experts.lora import LoraOptions
from pipeline.placement.state import Whole
from tests.helpers import gradients, light_learner, ragged, randomise, tiny_llama
from tests.moe_helpers import tiny_moe

VOCAB, SCALING = 61, 3.0
TARGETS = ("gate_proj", "up_proj", "down_proj", "q_proj", "o_proj")
PLAN = ExpertPlan(LoraOptions(rank=2, alpha=2 * SCALING, dropout=0.0, targets=TARGETS), ("adapter",))
TWICE = {"rank": 4, "alpha": 4 * SCALING}
IDS = torch.tensor(ragged([9, 9, 9], VOCAB, seed=4))
MODELS = {
    "llama": lambda: tiny_llama(VOCAB, num_layers=2),
    "gelu": lambda: tiny_llama(VOCAB, num_layers=2, hidden_act="gelu"),  # in plain autograd
    "hunyuan_v1_moe": lambda: tiny_moe("hunyuan_v1_moe", VOCAB),
    "hy_v3": lambda: tiny_moe("hy_v3", VOCAB),
}
# the stock routed blocks multiply in fp32 at most
ROUNDING = {"llama": 1e-11, "gelu": 1e-11, "hunyuan_v1_moe": 1e-4, "hy_v3": 1e-4}


def expert(learner, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    part = learner.components["adapter"]
    return {name: torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.1 for name, p in part.items()}


@torch.no_grad()
def merge(model: nn.Module, experts: list[tuple[dict[str, torch.Tensor], float]]) -> nn.Module:
    """A stock model with W + scaling * sum_k w_k B_k A_k in its weights, stacked weights of routed experts included."""
    for values, weight in experts:
        for name in values:
            if not name.endswith("lora_A"):
                continue
            path, _, projection = name.removesuffix(".lora_A").rpartition(".")
            delta = SCALING * weight * values[name.replace("lora_A", "lora_B")] @ values[name]
            module = model.get_submodule(path)
            if hasattr(module, "gate_up_proj"):
                half = module.gate_up_proj.shape[1] // 2
                first = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
                where = module.down_proj if projection == "down_proj" else module.gate_up_proj[:, first[projection]]
                where += delta
            else:
                getattr(module, projection).weight += delta
    return model


@torch.no_grad()
def merged_logits(name: str, experts: list[tuple[dict[str, torch.Tensor], float]]) -> torch.Tensor:
    model = merge(MODELS[name]().double(), experts)
    return (model.float() if name.endswith(("moe", "v3")) else model)(input_ids=IDS).logits.double()


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_of_experts_is_served_as_if_all_were_merged_into_the_weights(name):
    learner = light_learner(MODELS[name]().double(), PLAN)
    own, *earlier = (expert(learner, seed) for seed in (1, 2, 3))
    learner.fill("adapter", Whole(own))

    def off(experts: list[tuple[dict[str, torch.Tensor], float]]) -> float:
        with torch.no_grad():
            found = learner.model.backbone(input_ids=IDS).logits
        return float((found - merged_logits(name, experts)).abs().max())

    learner.set_past("adapter", [(Whole(earlier[0]), 1.0), (Whole(earlier[1]), 0.3)])
    assert off([(own, 1.0), (earlier[0], 1.0), (earlier[1], 0.3)]) < ROUNDING[name] < 1e-2 < off([(own, 1.0)])
    learner.set_past("adapter", [])
    assert off([(own, 1.0)]) < ROUNDING[name]
    learner.set_past("adapter", [(Whole(earlier[0]), 1.0)])
    learner.set_active(())  # who is silent says nothing of the past either
    assert off([]) < ROUNDING[name]


@pytest.mark.parametrize("name", MODELS)
def test_only_the_tasks_own_expert_learns_and_its_gradient_is_that_of_the_sum(name):
    learner = light_learner(MODELS[name]().double(), PLAN)
    randomise(learner, seed=1)
    past = expert(learner, 2)
    learner.set_past("adapter", [(Whole(past), 0.6)])
    assert learner.parameters.keys() == {f"adapter/{key}" for key in past}  # the past is no parameter
    learner.model.train()
    learner.model.backbone(input_ids=IDS).logits.square().mean().backward()
    found = gradients(learner.parameters)
    for pairs in pairs_of(learner.experts).values():
        assert not any(tensor.requires_grad for pair in pairs.values() for tensor in pair.past)

    # one pair of twice the rank, all of it trained, of which the second half is the task's own
    wide = light_learner(MODELS[name]().double(), ExpertPlan(PLAN.lora.model_copy(update=TWICE), PLAN.roles))
    own = {key: p.detach() for key, p in learner.components["adapter"].items()}
    stacked = {
        key: torch.cat([past[key] * (1 if key.endswith("A") else 0.6), value], dim=-2 if key.endswith("A") else -1)
        for key, value in own.items()
    }
    wide.fill("adapter", Whole(stacked))
    wide.model.train()
    wide.model.backbone(input_ids=IDS).logits.square().mean().backward()
    for key, gradient in gradients(wide.parameters).items():
        dim = -2 if key.endswith("A") else -1
        assert (gradient.narrow(dim, 2, 2) - found[key]).abs().max() <= 1e-12 * gradient.abs().max() > 0, key

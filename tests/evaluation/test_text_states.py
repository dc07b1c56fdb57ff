"""The task router's reading of a text: the first layers of the stock model, dense and routed, and nothing else."""

import pytest
import torch

from data_contracts.errors import UserError
from pipeline.config import RouterConfig
from pipeline.evaluation.task_router import TaskRouter
from pipeline.evaluation.text_states import (
    check_router,
    pooled_texts,
    score_texts,
    sum_features,
    text_tokens,
    with_layers,
)
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from tests.helpers import light_learner, ragged, randomise, tiny_llama
from tests.moe_helpers import tiny_moe

TEXTS = ragged([3, 17, 1, 9, 12], vocab_size=90)
FAMILIES = ("llama", "mixtral", "qwen3_moe", "hunyuan_v1_moe", "hy_v3")
TWO_LAYERS = ("mixtral", "hunyuan_v1_moe")  # the stock model tells its last layer's states only behind the norm


def model_of(family: str):
    return tiny_llama(90) if family == "llama" else tiny_moe(family, 90)


@torch.no_grad()
def stock_states(model, texts, layers: int) -> torch.Tensor:
    """By the stock model, one text at a time: mean of the token states of unit root mean square, made so again."""
    pooled = []
    for ids in texts:
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layers][0]
        states = states / states.pow(2).mean(dim=1, keepdim=True).sqrt()
        pooled.append(states.mean(dim=0) / states.mean(dim=0).pow(2).mean().sqrt())
    return torch.stack(pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_states_are_those_of_the_stock_models_first_layers_with_experts_attached_and_silent(family):
    expected = [stock_states(model_of(family), TEXTS, depth) for depth in ((1,) if family in TWO_LAYERS else (1, 2))]
    learner = light_learner(model_of(family), ExpertPlan(LoraOptions(rank=2), ("shared", "dedicated")))
    randomise(learner)
    learner.set_active(())
    before = learner.forward(torch.tensor([TEXTS[1]]), None, torch.tensor([16]))
    found = pooled_texts(learner, range(1, len(expected) + 1), TEXTS, 24)
    for ours, stock in zip(found, expected, strict=True):
        assert (ours - stock).abs().max() < 2e-4
    after = learner.forward(torch.tensor([TEXTS[1]]), None, torch.tensor([16]))
    assert torch.equal(before, after)  # the whole model answers again


def test_sums_and_scores_come_from_the_pooled_states_whatever_the_batches():
    learner = light_learner(tiny_llama(90))
    router = TaskRouter.empty(RouterConfig(layers=2, features=40))
    features = router.features(stock_states(tiny_llama(90), TEXTS, 2))
    for budget in (18, 4096):
        normal, moment = sum_features(learner, router, TEXTS, budget)
        assert torch.allclose(normal, features.T @ features, atol=1e-3)
        assert torch.allclose(moment, features.sum(dim=0), atol=1e-3)
        learned = router.learn("a", normal, moment).learn("b", normal / 2, moment / 3)
        assert torch.allclose(score_texts(learner, learned, TEXTS, budget), features @ learned.weights, atol=1e-3)


def test_a_text_is_read_as_it_is_up_to_the_limit(tokenizer):
    whole = tokenizer("the parcel was late again")["input_ids"]
    assert text_tokens(tokenizer, ["the parcel was late again", ""], 99) == [whole, [tokenizer.eos_token_id]]
    assert text_tokens(tokenizer, ["the parcel was late again"], 2) == [whole[:2]]


def test_more_layers_than_the_backbone_has_are_refused():
    config = tiny_llama(90).config
    check_router(None, config)
    check_router(RouterConfig(layers=3), config)
    with pytest.raises(UserError, match=r"router\.layers is 4, but the backbone has 3 layers"):
        check_router(RouterConfig(layers=4), config)


def test_layers_left_open_are_half_of_the_backbones_or_those_of_the_router_there_is():
    config = tiny_llama(90).config  # three layers
    assert with_layers(RouterConfig(), config).layers == 1
    assert with_layers(RouterConfig(layers=3), config).layers == 3
    config.num_hidden_layers = 30
    assert with_layers(RouterConfig(features=7), config) == RouterConfig(layers=15, features=7)
    assert with_layers(RouterConfig(), config, TaskRouter.empty(RouterConfig(layers=4, features=7))).layers == 4

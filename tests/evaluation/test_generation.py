"""Batched greedy generation equals transformers' own, prompt by prompt and without padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.evaluation.generation import generate_rows, greedy
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.placement.learner import Learner
from tests.helpers import light_learner, ragged, randomise, tiny_llama

VOCAB, LIMIT = 53, 7
PLAN = ExpertPlan(LoraOptions(rank=3, alpha=6, dropout=0.0), ("shared", "dedicated"))
PROMPTS = ragged([11, 2, 6, 1, 9, 4, 11, 3], VOCAB, seed=7)
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},  # shorter than some prompts
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 12},
}


def build(model_type: str) -> Learner:
    sizes = tiny_llama(VOCAB).config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type,
        **{k: sizes[k] for k in keys},
        num_hidden_layers=2,
        initializer_range=0.15,
        eos_token_id=None,
        pad_token_id=None,
        **FAMILIES[model_type],
    )
    learner = light_learner(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), PLAN)
    randomise(learner, scale=0.3)
    return learner


def stock_answer(learner: Learner, prompt: list[int], end: int | None, limit: int = LIMIT) -> list[int]:
    """New tokens of transformers' greedy search, the end included where it came."""
    ids = torch.tensor([prompt])
    out = learner.model.backbone.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=end,
        pad_token_id=1,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def mean_log_probability(learner: Learner, prompt: list[int], new: list[int]) -> float:
    """Mean over the new tokens, from one stock forward pass over all of them."""
    logits = learner.model.backbone(input_ids=torch.tensor([[*prompt, *new]])).logits[0].double()
    log_p = [
        float(logits[len(prompt) - 1 + i][token] - torch.logsumexp(logits[len(prompt) - 1 + i], 0))
        for i, token in enumerate(new)
    ]
    return sum(log_p) / len(log_p)


def an_end_that_comes(learner: Learner) -> int:
    """A token that greedy search writes in some answers, not in all, so that rows end at different steps."""
    free = [stock_answer(learner, prompt, None, LIMIT + 1) for prompt in PROMPTS]
    counts = {token: sum(token in answer for answer in free) for answer in free for token in answer}
    return next(token for token, count in sorted(counts.items()) if 2 <= count < len(PROMPTS))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_answers_equal_transformers_greedy_search_one_by_one(model_type):
    learner = build(model_type)
    end = an_end_that_comes(learner)
    ours = greedy(learner, PROMPTS, end, LIMIT)
    ended = 0
    for prompt, (answer, score) in zip(PROMPTS, ours, strict=True):
        new = stock_answer(learner, prompt, end)
        if new[-1] != end and len(new) == LIMIT:  # one more step tells whether the answer ends just there
            more = stock_answer(learner, prompt, end, LIMIT + 1)
            new = more if more[-1] == end else new
        ended += new[-1] == end
        assert answer == [token for token in new if token != end]
        assert score == pytest.approx(mean_log_probability(learner, prompt, new), abs=1e-4)
    assert 0 < ended < len(PROMPTS)


@pytest.mark.parametrize("batch_tokens", [18, 40, 1000])
def test_any_cut_into_batches_gives_the_same_texts(batch_tokens, tiny_model, tokenizer):
    learner = light_learner(tiny_model, PLAN)
    randomise(learner, scale=0.3)
    prompts = ragged([11, 2, 6, 1, 9], len(tokenizer), seed=8)
    texts, scores = generate_rows(learner, prompts, tokenizer, 0, LIMIT, batch_tokens)
    expected = [
        tokenizer.decode([token for token in stock_answer(learner, prompt, 0) if token != 0], skip_special_tokens=True)
        for prompt in prompts
    ]
    assert texts == expected and len(set(texts)) > 1
    assert len(scores) == 5 and max(scores) < 0


def test_a_budget_of_one_token_gives_one_token():
    learner = build("llama")
    end = an_end_that_comes(learner)
    for prompt, (answer, _) in zip(PROMPTS, greedy(learner, PROMPTS, end, 1), strict=True):
        assert answer == [token for token in stock_answer(learner, prompt, end, 1) if token != end]

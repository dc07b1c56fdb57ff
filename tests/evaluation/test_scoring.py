"""Scoring label texts in one pass equals one stock forward pass per label (METHODS section 5)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.data.tokens import answer_tokens, prompt_tokens
from pipeline.evaluation.answers import answer_rows, row_scores, task_score
from pipeline.evaluation.scoring import build_trie, score_prompts, score_rows, trie_attention
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.placement.learner import Learner
from tests.helpers import light_learner, ragged, randomise, tiny_llama

VOCAB, END = 67, 0
PLAN = ExpertPlan(LoraOptions(rank=3, alpha=6, dropout=0.0), ("shared", "dedicated"))
# shared beginnings; the first is a beginning of the second and the second of the third; different lengths; one alone
LABELS = ((5,), (5, 6), (5, 6, 7, 8), (5, 9, 7), (10, 11), (10, 12), (13,), (6, 5))
PROMPTS = ragged([12, 3, 7, 1, 12, 20, 2], VOCAB, seed=2)


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = light_learner(tiny_llama(VOCAB, num_layers=2), PLAN)
    randomise(learner, scale=0.3)
    return learner


@torch.no_grad()
def naive_score(learner: Learner, prompt, label, end: int = END) -> float:
    """One unpadded stock forward pass over prompt + label; log-probabilities of the label's tokens and of the end."""
    logits = learner.model.backbone(input_ids=torch.tensor([[*prompt, *label]])).logits[0].double()
    total = 0.0
    for offset, token in enumerate([*label, end]):
        state = logits[len(prompt) - 1 + offset]
        total += float(state[token] - torch.logsumexp(state, dim=0))
    return total


def naive_scores(learner: Learner, prompts, labels) -> np.ndarray:
    return np.array([[naive_score(learner, prompt, label) for label in labels] for prompt in prompts])


def test_scores_equal_one_forward_pass_per_label_with_learned_experts(learner):
    ours = score_rows(learner, PROMPTS, LABELS, END, batch_tokens=10_000)
    expected = naive_scores(learner, PROMPTS, LABELS)
    assert ours.shape == (7, 8) and np.ptp(expected, axis=1).min() > 1
    assert np.abs(ours - expected).max() < 1e-4


@pytest.mark.parametrize("roles", [("shared",), ("dedicated",), ()], ids=["shared", "dedicated", "backbone"])
def test_scores_follow_the_experts_that_speak(learner, roles):
    learner.set_active(roles)
    ours = score_rows(learner, PROMPTS, LABELS, END, batch_tokens=10_000)
    expected = naive_scores(learner, PROMPTS, LABELS)
    learner.set_active(("shared", "dedicated"))
    assert np.abs(ours - expected).max() < 1e-4
    assert np.abs(expected - naive_scores(learner, PROMPTS, LABELS)).max() > 0.1


@pytest.mark.parametrize("batch_tokens", [16, 45, 90])
def test_any_cut_into_batches_gives_the_same_scores(learner, batch_tokens):
    ours = score_rows(learner, PROMPTS, LABELS, END, batch_tokens)
    assert np.abs(ours - naive_scores(learner, PROMPTS, LABELS)).max() < 1e-4


def test_the_same_batch_gives_the_same_bits(learner):
    first = score_rows(learner, PROMPTS, LABELS, END, 90)
    learner.set_active(())
    score_rows(learner, PROMPTS[::-1], LABELS[:3], END, 500)
    learner.set_active(("shared", "dedicated"))
    assert np.array_equal(first, score_rows(learner, PROMPTS, LABELS, END, 90))


def test_the_order_of_labels_does_not_matter(learner):
    order = [3, 0, 7, 2, 5, 1, 6, 4]
    ours = score_rows(learner, PROMPTS, [LABELS[i] for i in order], END, 1000)
    assert np.abs(ours - naive_scores(learner, PROMPTS, LABELS)[:, order]).max() < 1e-4


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 12}),
        ("hunyuan_v1_dense", {"head_dim": 12}),
    ],
)
def test_scores_are_right_in_every_family_up_to_the_attention_window(model_type, settings):
    sizes = tiny_llama(VOCAB).config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{k: sizes[k] for k in keys}, num_hidden_layers=2, initializer_range=0.12, **settings
    )
    learner = light_learner(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), PLAN)
    randomise(learner, scale=0.3)
    prompts = ragged([12, 3, 7], VOCAB, seed=5)  # 12 + 4 label tokens fill a window of 16
    ours = score_rows(learner, prompts, LABELS, END, 1000)
    assert np.abs(ours - naive_scores(learner, prompts, LABELS)).max() < 1e-4
    if "sliding_window" in settings:
        with pytest.raises(UserError, match=r"a row of 17 tokens exceeds the backbone's attention window of 16"):
            score_rows(learner, ragged([13], VOCAB), LABELS, END, 1000)


def test_the_trie_shares_beginnings_and_keeps_every_label():
    trie = build_trie(LABELS)
    assert trie.size == 12  # 19 tokens in all
    for label, path in zip(LABELS, trie.paths, strict=True):
        assert tuple(trie.tokens[node] for node in path) == label
        assert [trie.depths[node] for node in path] == list(range(len(label)))
        assert [trie.parents[node] for node in path] == [-1, *path[:-1]]


def test_a_node_sees_the_real_prompt_its_ancestors_and_itself():
    trie = build_trie([(5, 6), (5, 7), (8,)])  # nodes 0: 5, 1: 6, 2: 7, 3: 8
    seen = trie_attention(torch.tensor([[1, 1, 0]]), trie)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]


def test_the_prompt_is_computed_once_whatever_the_number_of_labels(learner):
    shapes = []
    hook = learner.ffns[0].register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    score_prompts(learner, PROMPTS[:2], build_trie(LABELS), END)
    hook.remove()
    assert shapes == [(2, 12 + 12, 48)]


def test_answers_are_the_likeliest_labels_with_their_probability(tiny_model, tokenizer, data_root):
    learner = light_learner(tiny_model, PLAN)
    randomise(learner, scale=0.3)
    contract = load_contract(data_root / "first.yaml")
    texts = [f"Note {n}: the {'parcel ' * n}was odd.\nAnswer:" for n in range(1, 6)]
    prompts = prompt_tokens(tokenizer, texts)
    label_ids = answer_tokens(tokenizer, list(contract.labels.values()))
    answers = answer_rows(learner, contract, prompts, label_ids, END, tokenizer, 200)
    names = list(contract.labels)
    for row, prompt in enumerate(prompts):
        scores = [naive_score(learner, prompt, label) for label in label_ids]
        weights = [math.exp(score) for score in scores]
        best = max(range(3), key=scores.__getitem__)
        assert answers.answers[row] == names[best]
        assert answers.scores[row] == pytest.approx(weights[best] / sum(weights), abs=1e-4)
        assert answers.label_scores[row] == pytest.approx(scores, abs=1e-4)
    table = answers.table([f"r{n}" for n in range(5)], ["neutral"] * 5)
    assert table.column_names == ["row_id", "answer", "score", "label_scores", "reference"]
    assert table["answer"].to_pylist() == answers.answers


def test_the_metric_of_the_rows_is_the_metric_of_the_task(data_root):
    contract = load_contract(data_root / "first.yaml")
    answers = SimpleNamespace(answers=["negative", "neutral", "positive", "neutral"])
    references = ["negative", "positive", "positive", "neutral"]
    assert task_score(contract, answers, references, [""] * 4) == 0.75
    assert row_scores(contract, answers, references, [""] * 4).tolist() == [1.0, 0.0, 1.0, 1.0]
    macro = contract.model_copy(update={"metric": "macro_f1"})
    # F1 by hand: negative 1, neutral 2/3, positive 2/3
    assert task_score(macro, answers, references, [""] * 4) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert row_scores(macro, answers, references, [""] * 4).tolist() == [1.0, 0.0, 1.0, 1.0]

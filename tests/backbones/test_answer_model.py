"""The answer model gives the stock model's logits, at the asked positions only."""

import pytest
import torch
from transformers import DynamicCache

from pipeline.backbones.answer_model import AnswerModel
from tests.helpers import ragged, tiny_llama

VOCAB = 71


@pytest.fixture(scope="module")
def backbone():
    return tiny_llama(VOCAB)


@torch.no_grad()
def test_logits_at_any_positions_in_any_order_equal_the_stock_model(backbone):
    ids = torch.tensor(ragged([6, 6, 6], VOCAB))
    expected = backbone(input_ids=ids).logits.reshape(-1, VOCAB)
    positions = torch.tensor([17, 0, 6, 6, 11])
    assert (AnswerModel(backbone)(ids, None, positions) - expected[positions]).abs().max() < 1e-5


def test_the_head_sees_the_asked_positions_only(backbone):
    seen = []
    hook = backbone.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    AnswerModel(backbone)(torch.tensor(ragged([8, 8], VOCAB)), None, torch.tensor([3, 9, 15]))
    hook.remove()
    assert seen == [(3, 48)]


@torch.no_grad()
def test_a_boolean_mask_over_queries_and_keys_is_taken_as_it_is(backbone):
    ids = torch.tensor(ragged([5], VOCAB))
    # token 4 sees tokens 0, 1 and itself and stands third: the row is then the sequence 0, 1, 4
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    allowed[4, 2:4] = False
    ours = AnswerModel(backbone)(ids, allowed[None, None], torch.tensor([4]), torch.tensor([[0, 1, 2, 3, 2]]))
    assert (ours - backbone(input_ids=ids[:, [0, 1, 4]]).logits[:, -1]).abs().max() < 1e-5


@torch.no_grad()
def test_a_cache_is_read_and_extended(backbone):
    ids = torch.tensor(ragged([7, 7], VOCAB))
    expected = backbone(input_ids=ids).logits
    model, cache = AnswerModel(backbone), DynamicCache(config=backbone.config)
    model(ids[:, :4], torch.ones(2, 4, dtype=torch.long), torch.tensor([3]), past_key_values=cache)
    places = torch.arange(4, 7).expand(2, -1)
    ours = model(ids[:, 4:], torch.ones(2, 7, dtype=torch.long), torch.arange(6), places, cache)
    assert cache.get_seq_length() == 7
    assert (ours - expected[:, 4:].reshape(-1, VOCAB)).abs().max() < 1e-5


def test_gradients_reach_the_states_behind_the_asked_positions_only(backbone):
    ids = torch.tensor(ragged([6], VOCAB))
    inputs = []
    hook = backbone.model.embed_tokens.register_forward_hook(
        lambda _, args, out: inputs.append(out) or out.retain_grad()
    )
    AnswerModel(backbone)(ids, None, torch.tensor([2])).sum().backward()
    hook.remove()
    gradient = inputs[0].grad[0]
    assert gradient[:3].abs().sum(dim=1).min() > 0 and not gradient[3:].any()

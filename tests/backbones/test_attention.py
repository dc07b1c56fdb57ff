"""Attention by matrix products against torch's own function, and who gets it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipeline.backbones import attention


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "boolean_mask"])
def test_values_and_gradients_equal_torchs_attention(key_heads, masked):
    torch.manual_seed(0)
    query = torch.randn(3, 6, 17, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(3, key_heads, 17, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    if masked:  # two sequences packed into each row
        mask = (mask & (torch.arange(17)[:, None] // 9 == torch.arange(17) // 9)).expand(3, 1, 17, 17)
    ours = attention.matmul_attention(query, key, value, mask if masked else None, 0.3, 0.0)
    repeated = [tensor.repeat_interleave(6 // key_heads, dim=1) for tensor in (key, value)]
    theirs = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    out = torch.randn_like(ours)
    found = torch.autograd.grad((ours * out).sum(), (query, key, value))
    wanted = torch.autograd.grad((theirs * out).sum(), (query, key, value))
    for mine, other in zip(found, wanted, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)


def test_a_pass_that_learns_on_short_rows_takes_it_and_every_other_the_stock_function(backbone_dir, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(backbone_dir, attn_implementation=attention.NAME)
    taken = []
    own = attention.matmul_attention
    monkeypatch.setattr(attention, "matmul_attention", lambda *given: taken.append(given[0].shape[2]) or own(*given))
    ids = torch.randint(5, 50, (2, 12))
    model(input_ids=ids)
    assert taken == [12] * model.config.num_hidden_layers
    with torch.no_grad():
        model(input_ids=ids)
    monkeypatch.setattr(attention, "MAX_TOKENS", 8)
    model(input_ids=ids)
    assert len(taken) == model.config.num_hidden_layers

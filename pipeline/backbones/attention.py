"""Attention of short sequences in training on a CPU, as batched matrix products.

torch's fused CPU kernel takes three to four times as long for rows of up to a few hundred tokens, nearly all of it in
backward: a third of a plain LoRA step. Every other pass (another device, longer rows, evaluation, generation) goes to
the stock `sdpa` function. Masks are made as for `sdpa`.

Legend: B rows, H query heads, K key and value heads, S tokens, d head width.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "matmul_on_cpu"
MAX_TOKENS = 256  # of a row: (B, H, S, S) probabilities are kept for backward, which grows with S at the same B S


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query (B, H, S, d), key and value (B, K, S, d), mask (B, 1, S, S) boolean, or
    None for causal; returns (B, S, H, d).
    """
    short = query.device.type == "cpu" and query.shape[2] == key.shape[2] <= MAX_TOKENS and query.requires_grad
    if not short or settings.get("position_bias") is not None or settings.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return matmul_attention(
        query, key, value, attention_mask, settings.get("scaling"), settings.get("dropout", 0.0)
    ).transpose(1, 2), None


def matmul_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """softmax(scaling q k^T) v with a boolean mask, or causal without one: (B, H, S, d). Query heads that share a key
    head are rows of one product.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    scaling = width**-0.5 if scaling is None else scaling
    scores = (query * scaling).reshape(batch, -1, groups * length, width) @ key.transpose(-1, -2)
    hidden = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    scores = scores.view(batch, heads, length, length).add_(hidden)
    shares = F.dropout(torch.softmax(scores, dim=-1), dropout)
    return (shares.view(batch, -1, groups * length, length) @ value).view(batch, heads, length, -1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Tiny mixture-of-experts backbones of every routed family, random and of awkward sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.backbones.families import FAMILIES, family_of
from tests.helpers import build_tokenizer

MOE_TYPES = ("mixtral", "qwen3_moe", "hunyuan_v1_moe", "hy_v3")
NUM_EXPERTS, TOP_K = 4, 2
ROUTER_STD = 0.3  # of a router's weights: over 48 normed numbers its logits spread by about 2
_SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
_OWN = {  # widths of a dense FFN (92) and of a routed expert (40); an always-on FFN is as wide as a routed expert
    "mixtral": {"intermediate_size": 40, "num_hidden_layers": 2},
    "qwen3_moe": {
        "intermediate_size": 92,
        "moe_intermediate_size": 40,
        "head_dim": 14,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "hunyuan_v1_moe": {"intermediate_size": 40, "head_dim": 14, "num_hidden_layers": 2},
    "hy_v3": {
        "intermediate_size": 92,
        "moe_intermediate_size": 40,
        "head_dim": 14,
        "router_scaling_factor": 2.826,
    },
}


def tiny_moe(model_type: str, vocab_size: int, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random MoE backbone, fp32, eval mode; weights large enough that predictions and routes differ.

    Dense layers: layer 1 of 3 in qwen3_moe, layer 0 of 3 in hy_v3, none in the others (2 layers). No norm is 1, no
    correction bias 0. `num_experts` and `top_k` are set under these names in every family; other `changes` are keys of
    the family's own configuration.
    """
    routed = FAMILIES[model_type].routed
    counts = {
        routed.num_experts: changes.pop("num_experts", NUM_EXPERTS),
        routed.top_k: changes.pop("top_k", TOP_K),
    }
    settings = {**_SIZES, **_OWN[model_type], **counts, "vocab_size": vocab_size, **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    _draw(model, seed)
    return model


@torch.no_grad()
def _draw(model: PreTrainedModel, seed: int) -> None:
    """Draw what stock models start at 1 or 0 (norms, correction biases), and routers whose choices are clear."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for block in routed_blocks(model):
        router = getattr(block, family_of(model.config).routed.router)
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * ROUTER_STD)
        name = family_of(model.config).routed.correction_bias
        if name:
            bias = getattr(block, name)
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)


def routed_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The routed blocks of a stock model, first layer first."""
    family = family_of(model.config)
    return [ffn for _, _, ffn in family.feed_forwards(model) if family.is_routed(ffn)]


def save_moe_backbone(folder: Path, model_type: str, **changes: Any) -> Path:
    """Save a tiny MoE backbone (safetensors, fp32) and its tokenizer as a backbone folder; returns the folder."""
    tokenizer = build_tokenizer()
    tiny_moe(model_type, len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def recorded_margins(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The top-k margins (T,) of each routed block's forward inside the context, in the order of the calls.

    A token's margin is the difference of the chosen experts' lowest router logit and the others' highest one; where a
    correction bias takes part in the choice, the same of sigmoid(logit) + bias. Works on stock models.
    """
    routed = family_of(model.config).routed
    margins: list[torch.Tensor] = []
    hooks = []
    for block in routed_blocks(model):
        bias = getattr(block, routed.correction_bias) if routed.correction_bias else None

        def record(_module: Any, _arguments: Any, outputs: Any, bias: torch.Tensor | None = bias) -> None:
            logits, _, chosen = outputs
            scores = logits.detach() if bias is None else logits.detach().sigmoid() + bias
            is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
            lowest = scores.masked_fill(~is_chosen, float("inf")).amin(1)
            highest = scores.masked_fill(is_chosen, float("-inf")).amax(1)
            margins.append(lowest - highest)

        hooks.append(getattr(block, routed.router).register_forward_hook(record))
    try:
        yield margins
    finally:
        for hook in hooks:
            hook.remove()

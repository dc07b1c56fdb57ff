"""Backbone families: where each keeps its decoder layers, feed-forward networks, routers and routed experts.

A family is a small description; code elsewhere asks the description, never the model type. What its checkpoints call
the tensors stands beside it, so that each rank can read its own slices.

Legend: T tokens, E routed experts, K top-k, D model width, F width of one routed expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from data_contracts.errors import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of a SwiGLU network: down(act(gate(x)) * up(x))
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class RoutedBlock:
    """A mixture-of-experts block: a router, E routed SwiGLU experts, and perhaps an always-on SwiGLU beside them.

    transformers keeps the experts' weights stacked: `gate_up_proj` (E, 2F, D), gate first, and `down_proj` (E, D, F).
    Checkpoints keep them apart: `experts.<e>.<name>.weight`.
    """

    num_experts: str = "num_experts"  # key of the configuration
    top_k: str = "num_experts_per_tok"  # key of the configuration
    router: str = "gate"  # module of the block
    experts: str = "experts"  # module of the block
    always_on: str | None = None  # module of the block
    correction_bias: str | None = None  # buffer of the block: added to the scores that choose, not to those that weigh
    saved_experts: tuple[str, str, str] = PROJECTIONS  # what a checkpoint calls gate, up and down
    # (part of a tensor's name in a checkpoint, part of its name in the model)
    renamed: tuple[tuple[str, str], ...] = ()
    float32: tuple[str, ...] = ()  # parts of names of parameters that stay in fp32 whatever the backbone's dtype

    def route(self, block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stock router's choice for tokens (T, D): weights (T, K), routed and scaled, and experts (T, K)."""
        bias = (getattr(block, self.correction_bias),) if self.correction_bias else ()
        _, weights, chosen = getattr(block, self.router)(x, *bias)
        return weights, chosen


@dataclass(frozen=True)
class Family:
    """A decoder whose every layer has one feed-forward network: a SwiGLU, or a block of routed ones."""

    model_type: str
    routed: RoutedBlock | None = None  # None: no layer has routed experts
    layers: str = "model.layers"  # path of the decoder layers in the causal model
    ffn: str = "mlp"  # name of the feed-forward network in a layer
    attention: str = "self_attn"  # name of the attention in a layer

    def feed_forwards(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Yield (path of the FFN, its parent layer, the FFN or routed block) for every layer, first layer first."""
        for index, layer in enumerate(model.get_submodule(self.layers)):
            yield f"{self.layers}.{index}.{self.ffn}", layer, getattr(layer, self.ffn)

    def attentions(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (path of the attention, the attention) for every layer, first layer first."""
        for index, layer in enumerate(model.get_submodule(self.layers)):
            yield f"{self.layers}.{index}.{self.attention}", getattr(layer, self.attention)

    def is_routed(self, ffn: nn.Module) -> bool:
        """Whether this feed-forward network is a block of routed experts (a first dense layer is none)."""
        return self.routed is not None and hasattr(ffn, self.routed.experts)


_DENSE = [Family(name) for name in ("llama", "mistral", "qwen2", "qwen3", "hunyuan_v1_dense")]
_ROUTED = [
    Family(
        "mixtral",
        RoutedBlock(
            num_experts="num_local_experts",
            saved_experts=("w1", "w3", "w2"),
            renamed=((".block_sparse_moe.", ".mlp."),),
        ),
    ),
    Family("qwen3_moe", RoutedBlock()),
    Family(
        "hunyuan_v1_moe",
        RoutedBlock(
            top_k="moe_topk",
            always_on="shared_mlp",
            float32=(".mlp.gate.wg.",),
        ),
    ),
    Family(
        "hy_v3",
        RoutedBlock(
            always_on="shared_experts",
            correction_bias="e_score_correction_bias",
            renamed=(
                (".mlp.router.gate.", ".mlp.gate."),
                (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
                (".mlp.shared_mlp.", ".mlp.shared_experts."),
            ),
        ),
    ),
]
FAMILIES = {family.model_type: family for family in [*_DENSE, *_ROUTED]}
_REFUSED = {
    "hy_v4": "its sparse latent attention and clamped experts have not been held against the stock model here",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone configuration.

    Raises UserError, naming the model type and the families there are, for a backbone that is not known.
    """
    name = config.model_type
    if name not in FAMILIES:
        why = _REFUSED.get(name, "it has no feed-forward network this pipeline knows")
        raise UserError(f"backbone of type '{name}' is refused: {why}; choose one of: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The attention window in tokens, or None where every token sees all earlier ones."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)

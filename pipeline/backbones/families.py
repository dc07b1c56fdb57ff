"""Backbone families: where each keeps its decoder layers and feed-forward networks.

A family is a small description; code elsewhere asks the description, never the model type. Families with routed experts
describe more (router, routed experts, always-on part) in the same place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from data_contracts.errors import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DenseFamily:
    """A decoder whose every layer has one SwiGLU feed-forward network: `down(act(gate(x)) * up(x))`."""

    model_type: str
    layers: str = "model.layers"  # path of the decoder layers in the causal model
    ffn: str = "mlp"  # name of the feed-forward network in a layer

    def feed_forwards(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Yield (path of the FFN, its parent layer, the FFN) for every layer, first layer first."""
        for index, layer in enumerate(model.get_submodule(self.layers)):
            yield f"{self.layers}.{index}.{self.ffn}", layer, getattr(layer, self.ffn)


FAMILIES = {name: DenseFamily(name) for name in ("llama", "mistral", "qwen2", "qwen3", "hunyuan_v1_dense")}


def family_of(config: PreTrainedConfig) -> DenseFamily:
    """The family of a backbone configuration.

    Raises UserError, naming the model type and the families there are, for a backbone without an FFN we know.
    """
    if config.model_type not in FAMILIES:
        raise UserError(
            f"backbone of type '{config.model_type}' has no feed-forward network this pipeline knows; "
            f"choose one of: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The attention window in tokens, or None where every token sees all earlier ones."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)

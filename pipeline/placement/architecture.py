"""A backbone's tensors from its config.json alone: no weights, no device, no transformers.

Names and shapes are those of transformers' models (routed experts stacked along the expert dimension). Hunyuan-Large
(`hunyuan`), which transformers does not know, is described the way of `hunyuan_v1_moe`.

Legend: D model width, F FFN width, V vocabulary, H heads, E routed experts, K top-k.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.backbones.fetch import read_config_text

PRESETS = Path(__file__).parent / "presets"
KINDS = ("embeddings", "attention", "norms", "dense_ffn", "router", "always_on", "routed_experts")


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: its name, whole shape and how it is placed."""

    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int | None = None  # None: outside the decoder layers
    expert_owned: bool = False  # the first dimension is the experts, cut over the expert-parallel ranks
    component: str | None = None  # what it is trained and published with; None: frozen
    float32: bool = False  # whatever the backbone's dtype

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Family:
    """What config.json does not say: keys and names of one model type."""

    qk_norms: tuple[str, str] | None = None
    biased: tuple[str, ...] | None = None  # attention projections with a bias; None: all, if `attention_bias` says so
    mlp_bias: bool = False  # the key `mlp_bias` is read
    head_dim_required: bool = False  # transformers' default is not D // H
    num_experts: str | None = None  # key; None: no routed experts
    top_k: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    router: str = "gate"
    router_float32: bool = False
    always_on: str | None = None
    num_always_on: str | None = None  # key: the always-on FFN is so many experts wide; None or absent: one
    norms_if: str | None = None  # key that turns the query and key norms on


_HUNYUAN_NORMS = ("query_layernorm", "key_layernorm")
_HUNYUAN_MOE = {
    "qk_norms": _HUNYUAN_NORMS,
    "num_experts": "num_experts",
    "top_k": "moe_topk",
    "expert_width": "intermediate_size",
    "router": "gate.wg",
    "router_float32": True,
    "always_on": "shared_mlp",
}
_FAMILIES = {
    "llama": _Family(mlp_bias=True),
    "mistral": _Family(biased=()),
    "qwen2": _Family(biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": _Family(qk_norms=("q_norm", "k_norm"), head_dim_required=True),
    "hunyuan_v1_dense": _Family(qk_norms=_HUNYUAN_NORMS),
    "mixtral": _Family(biased=(), num_experts="num_local_experts", expert_width="intermediate_size"),
    "qwen3_moe": _Family(qk_norms=("q_norm", "k_norm"), num_experts="num_experts"),
    "hunyuan_v1_moe": _Family(**_HUNYUAN_MOE),
    "hunyuan": _Family(**_HUNYUAN_MOE, num_always_on="num_shared_expert", norms_if="use_qk_norm"),
    "hy_v3": _Family(
        qk_norms=("q_norm", "k_norm"),
        mlp_bias=True,
        head_dim_required=True,
        num_experts="num_experts",
        always_on="shared_experts",
        num_always_on="num_shared_experts",
    ),
}


# what transformers also writes for it
_ALIASES = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "moe_topk": "num_experts_per_tok",
    "num_experts_per_tok": "moe_topk",
}


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder that decide its parameters."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool  # the output head is the embedding table
    biased: tuple[str, ...]  # attention projections with a bias
    qk_norms: tuple[str, str] | None  # names of the norms on queries and keys
    mlp_bias: bool
    dense_layers: frozenset[int]  # layers with one dense FFN
    dense_width: int  # F of a dense FFN
    num_experts: int  # E; 0: no routed experts
    top_k: int
    expert_width: int  # F of a routed expert
    router: str  # module of the router in the FFN block
    router_float32: bool
    always_on: str | None  # module of the always-on FFN in the FFN block
    always_on_width: int
    kv_share: int = 1  # every so many layers, the first alone has K and V projections (cross-layer attention)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    @property
    def parameters(self) -> int:
        """Elements of all parameters (a tied table once; buffers are none)."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Elements of all parameters of each kind."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.kind] += tensor.numel
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def active_parameters(self) -> int:
        """Elements one token passes: K of E routed experts and all else; a tied table as embedding and as head."""
        routed = sum(tensor.numel for tensor in self.tensors if tensor.expert_owned)
        idle = routed // self.num_experts * (self.num_experts - self.top_k) if self.num_experts else 0
        return self.parameters - idle + self.tied * self.vocab_size * self.hidden_size

    def attention_projections(self, layer: int) -> dict[str, tuple[int, int]]:
        """{projection: (out features, in features)} of one layer's attention."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"q_proj": (queries, self.hidden_size)}
        if layer % self.kv_share == 0:
            shapes |= {"k_proj": (keys, self.hidden_size), "v_proj": (keys, self.hidden_size)}
        return shapes | {"o_proj": (self.hidden_size, queries)}

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every parameter of the backbone, in layer order."""
        width, table = self.hidden_size, (self.vocab_size, self.hidden_size)
        found = [TensorSpec("model.embed_tokens.weight", table, "embeddings")]
        for layer in range(self.num_layers):
            path = f"model.layers.{layer}"
            found += self._attention(f"{path}.self_attn", layer)
            if layer in self.dense_layers:
                found += self._swiglu(f"{path}.mlp", self.dense_width, "dense_ffn", layer)
            else:
                found += self._routed(f"{path}.mlp", layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found.append(TensorSpec(f"{path}.{norm}.weight", (width,), "norms", layer))
        found.append(TensorSpec("model.norm.weight", (width,), "norms"))
        if not self.tied:
            found.append(TensorSpec("lm_head.weight", table, "embeddings"))
        return tuple(found)

    def _attention(self, path: str, layer: int) -> list[TensorSpec]:
        found = []
        for name, shape in self.attention_projections(layer).items():
            found.append(TensorSpec(f"{path}.{name}.weight", shape, "attention", layer))
            if name in self.biased:
                found.append(TensorSpec(f"{path}.{name}.bias", shape[:1], "attention", layer))
        for norm in self.qk_norms or ():
            found.append(TensorSpec(f"{path}.{norm}.weight", (self.head_dim,), "norms", layer))
        return found

    def _swiglu(self, path: str, ffn_width: int, kind: str, layer: int) -> list[TensorSpec]:
        wide, narrow = (ffn_width, self.hidden_size), (self.hidden_size, ffn_width)
        found = []
        for name, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow)):
            found.append(TensorSpec(f"{path}.{name}.weight", shape, kind, layer))
            if self.mlp_bias:
                found.append(TensorSpec(f"{path}.{name}.bias", shape[:1], kind, layer))
        return found

    def _routed(self, path: str, layer: int) -> list[TensorSpec]:
        experts, width, ffn_width = self.num_experts, self.hidden_size, self.expert_width
        router, kind = f"{path}.{self.router}.weight", "routed_experts"
        found = [
            TensorSpec(router, (experts, width), "router", layer, float32=self.router_float32),
            TensorSpec(f"{path}.experts.gate_up_proj", (experts, 2 * ffn_width, width), kind, layer, expert_owned=True),
            TensorSpec(f"{path}.experts.down_proj", (experts, width, ffn_width), kind, layer, expert_owned=True),
        ]
        if self.always_on:
            found += self._swiglu(f"{path}.{self.always_on}", self.always_on_width, "always_on", layer)
        return found


def load_architecture(backbone: str) -> Architecture:
    """The architecture of a preset's name, a model folder or a config.json, here or behind a URI. Raises
    UserError naming what there is.
    """
    presets = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{backbone}.json" if backbone in presets else Path(backbone)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = read_config_text(backbone) if "://" in backbone else path.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--backbone {backbone} is neither a readable config.json, nor a folder with one, "
            f"nor a preset; the presets are {', '.join(presets)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--backbone: {path} is not valid JSON ({error}); correct the file") from error
    if not isinstance(config, dict):
        raise UserError(f"--backbone: {path} must hold a JSON object; it is not a model's config.json")
    return read_architecture(config)


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture a config.json describes.

    Raises UserError naming a missing or unusable key, or the model types there are.
    """
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(
            f"a backbone of type {model_type!r} cannot be planned: its tensors are not described here; "
            f"the types are {', '.join(sorted(_FAMILIES))}"
        )
    family = _FAMILIES[model_type]
    hidden_size, num_layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    num_heads = _count(config, "num_attention_heads")
    # null means as many as query heads, in every family
    num_kv_heads = num_heads if _absent(config, "num_key_value_heads") else _count(config, "num_key_value_heads")
    own_head_dim = family.head_dim_required or config.get("head_dim") is not None
    head_dim = _count(config, "head_dim") if own_head_dim else hidden_size // num_heads
    every = ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    num_experts = _count(config, family.num_experts) if family.num_experts else 0
    expert_width = _count(config, family.expert_width) if num_experts else 0
    times = 1
    if family.num_always_on and config.get(family.num_always_on) is not None:
        times = _count(config, family.num_always_on)
    dense_layers = _dense_layers(config, family, num_layers)
    top_k = _count(config, family.top_k) if num_experts else 0
    if top_k > num_experts:
        raise UserError(f"the backbone's {family.top_k} is {top_k} of {num_experts} experts; correct its config.json")
    return Architecture(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=_count(config, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", False)),
        biased=every if family.biased is None else family.biased,
        qk_norms=family.qk_norms if family.norms_if is None or config.get(family.norms_if) else None,
        mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
        dense_layers=dense_layers,
        dense_width=_count(config, "intermediate_size") if dense_layers else 0,
        num_experts=num_experts,
        top_k=top_k,
        expert_width=expert_width,
        router=family.router,
        router_float32=family.router_float32,
        always_on=family.always_on,
        always_on_width=expert_width * times if family.always_on else 0,
        kv_share=_count(config, "cla_share_factor") if config.get("use_cla") else 1,
    )


def _dense_layers(config: Mapping[str, Any], family: _Family, num_layers: int) -> frozenset[int]:
    """Which layers have one dense FFN, as transformers' models decide it."""
    if family.num_experts is None:
        return frozenset(range(num_layers))
    if config["model_type"] == "hy_v3":
        types = config.get("mlp_layer_types") or ["dense"] + ["sparse"] * (num_layers - 1)
        return frozenset(layer for layer, name in enumerate(types[:num_layers]) if name != "sparse")
    if config["model_type"] == "qwen3_moe":
        step, named = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        return frozenset(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    return frozenset()


def _absent(config: Mapping[str, Any], key: str) -> bool:
    # these write null or nothing for "as many as query heads"; the other families have a default of their own
    optional = config["model_type"] == "llama" or config["model_type"].startswith("hunyuan")
    return config.get(key) is None and (optional or key in config)


def _count(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number of the configuration; a list, one entry a layer, is read where all are equal."""
    if key not in config and _ALIASES.get(key) in config:
        key = _ALIASES[key]
    if key not in config:
        raise UserError(f"the backbone's config.json has no '{key}'; add it, a plan needs it")
    value = config[key]
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"the backbone's config.json has {key} {value!r}; a plan needs one whole number of at least 1")
    return value

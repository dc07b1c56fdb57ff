"""Upcycle: a dense checkpoint becomes a Mixtral-shaped mixture of experts that computes the same function.

Every routed expert is the dense feed-forward network. A router's renormalised top-k weights sum to one, so without
noise the output is the dense one whatever the router chooses (sparse upcycling, arXiv 2212.05055, section 2).

The dense checkpoint is read one tensor at a time and the result is written shard by shard: memory holds one shard.

Legend: E routed experts, D model width, F FFN width.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig, PreTrainedConfig

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES, PROJECTIONS, sliding_window
from pipeline.backbones.load import load_config
from pipeline.config import BackboneConfig

SHARD_BYTES = 500_000_000
ROUTER_LOGIT_STD = 1.0  # about 0.7 and 0.3 for the two best of four experts

_CARRIED = (  # configuration keys that mean the same in all three families
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)
_SOURCES = ("llama", "mistral")
_OTHERS = {
    "qwen2": "its attention has biases and Mixtral's has none",
    "qwen3": "its attention normalises queries and keys and Mixtral's does not",
    "hunyuan_v1_dense": "its attention normalises queries and keys and Mixtral's does not",
}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "recipe.json"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the result: its name, where it comes from, its size in bytes.

    `kind` is "copy", "expert" (the dense tensor, with noise if asked) or "router" (drawn for the norm before it).
    """

    name: str
    source: str
    kind: str
    num_bytes: int


def upcycle(
    dense: Path,
    target: Path,
    *,
    num_experts: int,
    top_k: int,
    noise: float = 0.0,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write into the folder `target` the Mixtral checkpoint of `num_experts` copies of `dense`'s feed-forward networks.

    Experts: each weight tensor W of each expert gets noise * rms(W) * N(0, 1) added, drawn from the seed and the
    tensor's name; so the expected relative Frobenius change is `noise`, and 0 keeps all experts equal. Routers are
    normal, of a size that gives the logits a standard deviation of ROUTER_LOGIT_STD on inputs whose normalised
    coordinates are independent. Tensors keep the dense checkpoint's dtype; the tokenizer, generation configuration and
    licence files are copied. The same arguments write the same bytes.

    Raises UserError for numbers that do not fit, a target that is not empty, a family other than Llama and Mistral, and
    a checkpoint with biases, with quantised weights, or with tensors missing or unknown.
    """
    _check_numbers(num_experts, top_k, noise)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: choose a new folder")
    config = load_config(BackboneConfig(path=str(dense)))
    _check_family(config)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(dense.glob("*.safetensors"))]
        opened = {name: file for file in files for name in list(file.keys())}
        _check_tensors(opened, config)
        target.mkdir(parents=True, exist_ok=True)
        shards = list(_shards(_tensors(opened, num_experts), shard_bytes))
        weight_map = {}
        for index, shard in enumerate(shards, start=1):
            file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            made = (_make(tensor, opened[tensor.source], num_experts, noise, seed) for tensor in shard)
            save_file(dict(made), target / file_name, metadata={"format": "pt"})
            weight_map.update((tensor.name, file_name) for tensor in shard)
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    _moe_config(config, num_experts, top_k).save_pretrained(target)
    _copy_files(dense, target)


def _check_numbers(num_experts: int, top_k: int, noise: float) -> None:
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top-k is {top_k} of {num_experts} experts: choose 1 <= top-k <= experts")
    if not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"noise is {noise}: choose 0 (equal experts) or a small positive number such as 0.02")


def _check_family(config: PreTrainedConfig) -> None:
    """Raise UserError where Mixtral has no place for what the dense model computes."""
    name = config.model_type
    if name not in _SOURCES:
        is_moe = name in FAMILIES and FAMILIES[name].routed is not None
        why = "it has routed experts already" if is_moe else _OTHERS.get(name, "Mixtral has no place for its layers")
        raise UserError(f"a backbone of type '{name}' cannot be upcycled: {why}; choose one of: {', '.join(_SOURCES)}")
    biases = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if biases:
        raise UserError(f"this backbone cannot be upcycled: it has biases ({', '.join(biases)}) and Mixtral has none")
    if getattr(config, "quantization_config", None):
        raise UserError("this backbone cannot be upcycled: its weights are quantised; save it in bfloat16 first")


def _check_tensors(opened: dict, config: PreTrainedConfig) -> None:
    """Hold the names and dtypes in the files against the configuration. Raises UserError naming what does not fit."""
    layer = ["input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{projection}" for projection in PROJECTIONS]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(expected - optional - opened.keys())
    unknown = sorted(name for name in opened.keys() - expected if not _is_derived(name))
    if missing or unknown:
        what, names = ("misses", missing) if missing else ("has a tensor Mixtral has no place for:", unknown)
        raise UserError(f"this backbone cannot be upcycled: its checkpoint {what} {names[0]} ({len(names)} in all)")
    for name in sorted(expected & opened.keys()):
        dtype = opened[name].get_slice(name).get_dtype()
        if dtype not in _BYTES:
            raise UserError(
                f"this backbone cannot be upcycled: {name} is stored as {dtype}; save it in bfloat16 or float32 first"
            )


def _is_derived(name: str) -> bool:
    """Whether a tensor of an old checkpoint is computed from the configuration nowadays."""
    return name.endswith("rotary_emb.inv_freq")


def _tensors(opened: dict, num_experts: int) -> Iterator[_Tensor]:
    """Every tensor of the result, layer by layer."""
    routed = FAMILIES["mixtral"].routed
    renamed = {f"mlp.{ours}": theirs for ours, theirs in zip(PROJECTIONS, routed.saved_experts, strict=True)}

    def num_bytes(name: str) -> int:
        read = opened[name].get_slice(name)
        return math.prod(read.get_shape()) * _BYTES[read.get_dtype()]

    for name in sorted((name for name in opened if not _is_derived(name)), key=_natural):
        path, _, part = name.removesuffix(".weight").rpartition(".mlp.")
        if not path:
            yield _Tensor(name, name, "copy", num_bytes(name))
            continue
        block = f"{path}.block_sparse_moe"
        for expert in range(num_experts):
            new = f"{block}.experts.{expert}.{renamed[f'mlp.{part}']}.weight"
            yield _Tensor(new, name, "expert", num_bytes(name))
        if part == PROJECTIONS[0]:
            norm = f"{path}.post_attention_layernorm.weight"
            yield _Tensor(f"{block}.gate.weight", norm, "router", num_experts * num_bytes(norm))


def _natural(name: str) -> list:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shards(tensors: Iterator[_Tensor], shard_bytes: int) -> Iterator[list[_Tensor]]:
    """Cut the list into shards of at most `shard_bytes`; a larger tensor is a shard of its own."""
    shard: list[_Tensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.num_bytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.num_bytes
    if shard:
        yield shard


def _make(tensor: _Tensor, file: safe_open, num_experts: int, noise: float, seed: int) -> tuple[str, torch.Tensor]:
    """Name and values, in the dense dtype: copied, copied with noise, or a router (E, D) for a norm (D,)."""
    source = file.get_tensor(tensor.source)
    if tensor.kind == "copy" or (tensor.kind == "expert" and noise == 0):
        return tensor.name, source.clone()
    digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    values = source.float()
    if tensor.kind == "router":
        # A logit sums router_d * norm_d * x_d over coordinates x of mean square 1: its variance is std^2 * |norm|^2.
        drawn = torch.randn(num_experts, len(values), generator=generator)
        return tensor.name, (drawn * (ROUTER_LOGIT_STD / values.norm())).to(source.dtype)
    rms = values.square().mean().sqrt()
    return tensor.name, (values + noise * rms * torch.randn(values.shape, generator=generator)).to(source.dtype)


def _moe_config(config: PreTrainedConfig, num_experts: int, top_k: int) -> MixtralConfig:
    carried = {key: getattr(config, key) for key in _CARRIED}
    return MixtralConfig(
        **carried,
        sliding_window=sliding_window(config),
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        architectures=["MixtralForCausalLM"],
    )


def _copy_files(dense: Path, target: Path) -> None:
    """Copy the tokenizer, generation configuration and licence files."""
    for file in sorted(dense.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.name.upper().startswith(_COPIED_NAMES)
        if file.is_file() and wanted and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)

"""A backbone, a folder or behind a URI: configuration, stock model without weights, tokenizer, and digest."""

import functools
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from data_contracts.errors import UserError, one_line
from pipeline.backbones import attention
from pipeline.backbones.families import Family, family_of
from pipeline.backbones.fetch import SUFFIXES, local_backbone
from pipeline.config import BackboneConfig
from pipeline.files import canonical_json, sha256_file, sha256_text


def load_config(config: BackboneConfig) -> PreTrainedConfig:
    """The backbone's configuration, read before any weight. Raises UserError naming the folder and what is missing."""
    path = local_backbone(config.path)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"backbone.path '{config.path}' is not a folder with a config.json; "
            "correct it, or run 'python jobs/demo.py' to make the demo backbone"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"backbone.path '{config.path}' has no *.safetensors; convert the weights (pickles are never read)"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # reads the header and holds it against the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({one_line(error)}); fetch the backbone again") from error
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"backbone.path '{config.path}': transformers cannot read its config.json ({one_line(error)}); "
            "fetch the backbone again or name another"
        ) from error


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerFast:
    """The backbone's fast tokenizer. Raises UserError where there is none or it names no end-of-sequence token."""
    path = local_backbone(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"backbone.path '{config.path}': transformers cannot read its tokenizer ({one_line(error)}); "
            "put its tokenizer.json and tokenizer_config.json there"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"backbone.path '{config.path}' needs a fast tokenizer with an end-of-sequence token; "
            "put a tokenizer.json and a tokenizer_config.json with eos_token there"
        )
    return tokenizer


def skeleton(config: BackboneConfig) -> tuple[PreTrainedModel, Family]:
    """The stock model without weights, and its family: frozen, eval mode, tied weights one object.

    Parameters and the buffers that a checkpoint holds are on the meta device, for `placement.materialise`. What the
    model computes itself, such as rotary frequencies, is real and on the CPU.
    """
    model_config = load_config(config)
    family = family_of(model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention.NAME,
            trust_remote_code=False,
        )
    for module in model.modules():
        if module._non_persistent_buffers_set:
            real = type(module)(module.config)  # these modules take the configuration and nothing else
            for name in module._non_persistent_buffers_set:
                module._buffers[name] = real.get_buffer(name)
    return model.requires_grad_(False).eval(), family


@functools.lru_cache(maxsize=4)
def backbone_digest(path: str) -> str:
    """sha256 over the names and bytes of the safetensors, configuration and tokenizer files of a folder or URI."""
    folder = Path(local_backbone(path))
    names = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    return sha256_text(canonical_json({name: sha256_file(folder / name) for name in names}))


def pinned_digest(config: BackboneConfig) -> str:
    """The digest. Raises UserError where `revision` names another backbone."""
    digest = backbone_digest(config.path)
    if config.revision is not None and not digest.startswith(config.revision):
        raise UserError(
            f"backbone.path '{config.path}' has the digest {digest}, backbone.revision asks for {config.revision}; "
            "fetch that backbone again, or correct the revision"
        )
    return digest

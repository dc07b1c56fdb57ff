"""Every backbone family against its stock model: attached experts change nothing until they have learned."""

import copy

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES, family_of, sliding_window
from pipeline.backbones.load import load_config, load_tokenizer, pinned_digest
from pipeline.config import BackboneConfig
from pipeline.data.collate import pack
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from tests.helpers import light_learner, ragged, randomise

VOCAB = 83
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
# name: (model type, settings of its own)
VARIANTS = {
    "llama": ("llama", {}),
    "llama_with_biases": ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 14, "attention_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 10}),
}
PLAN = ExpertPlan(LoraOptions(rank=3, dropout=0.0), ("shared", "dedicated"), 4)


def stock(name: str):
    """A random stock model, fp32, eval mode, attention as the pipeline loads it."""
    model_type, settings = VARIANTS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SIZES, **settings), attn_implementation="sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # stock biases start at zero, norms at one: such a parameter could be left out unseen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def zero_b(learner) -> None:
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            if name.endswith("lora_B"):
                parameter.zero_()


def test_every_family_has_a_variant_here():
    assert {model_type for model_type, _ in VARIANTS.values()} == {
        n for n, family in FAMILIES.items() if not family.routed
    }


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_stock_logits_are_reproduced_with_experts_attached_and_b_zero(name):
    reference = stock(name)
    if name == "llama_with_biases":
        assert {"mlp.up_proj.bias", "self_attn.q_proj.bias"} <= {
            ".".join(n.split(".")[3:]) for n, _ in reference.named_parameters()
        }
    learner = light_learner(copy.deepcopy(reference), PLAN)
    randomise(learner, scale=0.5)  # gates of any value; A of any value
    zero_b(learner)
    ids = torch.tensor(ragged([17, 17], VOCAB, seed=3))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    expected = reference(input_ids=ids, attention_mask=mask).logits.view(-1, VOCAB)
    asked = torch.tensor([0, 5, 16, 17, 27, 3])
    for roles in (("shared", "dedicated"), ("shared",), ("dedicated",), ()):
        learner.set_active(roles)
        assert (learner.forward(ids, mask, asked) - expected[asked]).abs().max() < 1e-5
    randomise(learner, scale=0.5)
    learner.set_active(("shared", "dedicated"))
    assert (learner.forward(ids, mask, asked) - expected[asked]).abs().max() > 0.1  # the experts are really in the way


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name):
    reference = stock(name)
    learner = light_learner(copy.deepcopy(reference), PLAN)
    randomise(learner)
    zero_b(learner)
    sequences = ragged([9, 1, 5, 14, 3, 2, 1], VOCAB, seed=4)
    packed = pack(sequences)
    assert packed.input_ids.shape[0] < len(sequences)
    asked = torch.cat([start + torch.arange(len(s)) for start, s in zip(packed.starts, sequences, strict=True)])
    ours = learner.forward(packed.input_ids, None, asked, packed.position_ids)
    alone = torch.cat([reference(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences])
    assert (ours - alone).abs().max() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_target_that_matches_nothing_is_refused_in_every_family(name):
    plan = ExpertPlan(LoraOptions(targets=("qkv_proj",)), ("adapter",))
    with pytest.raises(UserError, match="qkv_proj matches no projection"):
        light_learner(stock(name), plan)


@pytest.mark.parametrize("model_type", ["gpt2", "hy_v4", "deepseek_v3", "gemma2", "phi3"])
def test_a_family_without_an_ffn_we_know_is_refused_by_name(model_type):
    with pytest.raises(
        UserError, match=f"type '{model_type}'.*hunyuan_v1_dense, hunyuan_v1_moe, hy_v3, llama, mistral"
    ):
        family_of(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "settings", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 40}, 40),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, 32),
        ("qwen3", {}, None),
        ("hunyuan_v1_dense", {}, None),
    ],
)
def test_sliding_window_is_what_the_attention_layers_use(model_type, settings, window):
    assert sliding_window(AutoConfig.for_model(model_type, num_hidden_layers=2, **settings)) == window


def test_a_folder_that_is_no_backbone_is_refused_before_weights_are_read(tmp_path, backbone_dir):
    config = BackboneConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"not a folder with a config\.json"):
        load_config(config)
    (tmp_path / "config.json").write_text((backbone_dir / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        load_config(config)
    weights = tmp_path / "model.safetensors"
    save_file({"one": torch.zeros(1000)}, weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .* fetch the backbone again"):
        load_config(config)
    save_file({"one": torch.zeros(1000)}, weights)
    assert load_config(config).model_type == "llama"
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(config)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match=r"cannot read its config\.json"):
        load_config(config)


def test_a_revision_pins_the_backbones_files(backbone_dir):
    digest = pinned_digest(BackboneConfig(path=str(backbone_dir)))
    for revision in (digest, digest[:12]):
        assert pinned_digest(BackboneConfig(path=str(backbone_dir), revision=revision)) == digest
    with pytest.raises(UserError, match=r"backbone\.revision asks for 0123456789ab; fetch that backbone again"):
        pinned_digest(BackboneConfig(path=str(backbone_dir), revision="0123456789ab"))
    with pytest.raises(ValidationError, match="revision"):
        BackboneConfig(path=str(backbone_dir), revision="main")

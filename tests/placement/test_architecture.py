"""Tensors from a config.json, against transformers' own models on the meta device and published totals."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES
from pipeline.placement import architecture as described
from pipeline.placement.architecture import PRESETS, load_architecture, read_architecture

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
}
STOCK = {  # every model type with changes that move its tensors
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 6}, {"tie_word_embeddings": True}],
    "mistral": [{"head_dim": None}, {"head_dim": 10}],
    "qwen2": [{}],
    "qwen3": [{"head_dim": 10}, {"head_dim": 4, "attention_bias": True}],
    "hunyuan_v1_dense": [{"head_dim": 4}, {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True}],
    "mixtral": [
        {"num_local_experts": 5, "num_experts_per_tok": 3},
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 6, "tie_word_embeddings": True},
    ],
    "qwen3_moe": [
        {"num_experts": 6, "moe_intermediate_size": 9, "num_experts_per_tok": 3},
        {"num_experts": 4, "moe_intermediate_size": 9, "mlp_only_layers": [1], "num_experts_per_tok": 2},
        {"num_experts": 4, "moe_intermediate_size": 9, "decoder_sparse_step": 2, "num_experts_per_tok": 2},
    ],
    "hunyuan_v1_moe": [
        {"num_experts": 5, "moe_topk": 3, "head_dim": 10},
        {"num_experts": 4, "moe_topk": 1, "head_dim": 4, "tie_word_embeddings": True, "attention_bias": True},
    ],
    "hy_v3": [
        {"num_experts": 6, "moe_intermediate_size": 9, "num_experts_per_tok": 2, "head_dim": 10},
        {
            "num_experts": 4,
            "moe_intermediate_size": 9,
            "num_experts_per_tok": 2,
            "head_dim": 4,
            "num_shared_experts": 2,
            "mlp_bias": True,
            "mlp_layer_types": ["dense", "sparse", "dense"],
        },
    ],
}
PUBLISHED = {  # billions of parameters: total, active; the published figures are rounded to whole billions
    "hunyuan-large": (389, 52),
    "hunyuan-a13b": (80, 13),
    "hy3-preview": (295, 21),
}


def stock_shapes(config):
    """{name: shape} of the parameters of transformers' own model, built without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shapes(architecture):
    found = {tensor.name: tensor.shape for tensor in architecture.tensors}
    assert len(found) == len(architecture.tensors)
    return found


@pytest.mark.parametrize(
    ("model_type", "changes"), [(name, changes) for name, several in STOCK.items() for changes in several]
)
def test_every_tensor_has_the_name_and_shape_it_has_in_transformers(model_type, changes):
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    # as a model folder has it, and as a hand-written file that leaves out what has a default
    for keys in (json.loads(config.to_json_string()), {"model_type": model_type, **SIZES, **changes}):
        assert shapes(read_architecture(keys)) == stock_shapes(config)


def test_every_family_that_can_be_trained_can_be_planned():
    assert FAMILIES.keys() == STOCK.keys()


def test_routed_experts_and_routers_in_fp32_are_those_of_the_families():
    for name, family in FAMILIES.items():
        for tensor in read_architecture({"model_type": name, **SIZES, **STOCK[name][0]}).tensors:
            routed = family.routed
            assert tensor.expert_owned == (routed is not None and f".{routed.experts}." in tensor.name)
            assert tensor.float32 == (routed is not None and any(part in tensor.name for part in routed.float32))


@pytest.mark.parametrize("preset", ["hunyuan-a13b", "hy3-preview"])
def test_a_preset_is_the_model_transformers_builds_from_it(preset):
    keys = json.loads((PRESETS / f"{preset}.json").read_text())
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    assert shapes(load_architecture(preset)) == stock_shapes(config)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(preset):
    architecture = load_architecture(preset)
    found = round(architecture.parameters / 1e9), round(architecture.active_parameters / 1e9)
    assert found == PUBLISHED[preset]


def test_every_preset_is_held_against_published_figures():
    assert {path.stem for path in PRESETS.glob("*.json")} == PUBLISHED.keys()


def test_hunyuan_large_shares_keys_and_values_by_layer_pairs():
    architecture = load_architecture("hunyuan-large")
    # by hand: q and o 6400 x 6400 in 64 layers, k and v 640 x 6400 in 32 of them
    assert architecture.parameters_by_kind["attention"] == 64 * 2 * 6400 * 6400 + 32 * 2 * 640 * 6400
    # 16 routed and one always-on expert of three 6400 x 18304 matrices in each layer
    assert architecture.parameters_by_kind["routed_experts"] == 64 * 16 * 3 * 6400 * 18304
    assert architecture.parameters_by_kind["always_on"] == 64 * 3 * 6400 * 18304
    names = shapes(architecture)
    assert "model.layers.2.self_attn.k_proj.weight" in names
    assert "model.layers.3.self_attn.k_proj.weight" not in names


def test_a_token_passes_top_k_of_the_routed_experts_and_everything_else():
    keys = {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 1}
    architecture = read_architecture(keys)
    # 3 layers x 3 idle experts x 3 matrices of 20 x 24
    assert architecture.parameters - architecture.active_parameters == 3 * 3 * 3 * 20 * 24
    tied = read_architecture({**keys, "tie_word_embeddings": True})
    assert tied.active_parameters == architecture.active_parameters
    assert tied.parameters == architecture.parameters - 61 * 24


def test_a_folder_and_a_file_are_read_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert load_architecture(str(tmp_path)) == load_architecture(str(tmp_path / "config.json"))


def test_one_entry_a_layer_is_read_where_all_are_equal():
    keys = {"model_type": "hunyuan_v1_moe", **SIZES, "num_experts": 4, "head_dim": 4}
    assert read_architecture({**keys, "moe_topk": [2, 2, 2]}).top_k == 2
    with pytest.raises(UserError, match=r"moe_topk \[1, 2, 2\]"):
        read_architecture({**keys, "moe_topk": [1, 2, 2]})


@pytest.mark.parametrize("key", [*SIZES, "num_local_experts", "num_experts_per_tok"])
def test_a_missing_key_is_named(key):
    keys = {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(UserError, match=f"'{key}'"):
        read_architecture({name: value for name, value in keys.items() if name != key})


@pytest.mark.parametrize("model_type", ["qwen3", "hy_v3"])
def test_a_head_width_with_a_default_of_its_own_is_asked_for(model_type):
    with pytest.raises(UserError, match="'head_dim'"):
        read_architecture({"model_type": model_type, **SIZES})


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None, []])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(UserError, match="hidden_size"):
        read_architecture({"model_type": "llama", **SIZES, "hidden_size": value})


@pytest.mark.parametrize("keys", [{"model_type": "hy_v4"}, {}])
def test_an_unknown_model_type_is_refused_with_the_known_ones(keys):
    with pytest.raises(UserError, match="hunyuan_v1_moe"):
        read_architecture({**SIZES, **keys})


def test_more_experts_a_token_than_there_are_is_refused():
    keys = {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 5}
    with pytest.raises(UserError, match="5 of 4"):
        read_architecture(keys)


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "hy3-preview")])
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path, text, said):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        load_architecture(str(file))
    assert str(file) in str(raised.value)


def test_kinds_cover_every_tensor_once():
    for preset in PUBLISHED:
        architecture = load_architecture(preset)
        assert sum(architecture.parameters_by_kind.values()) == architecture.parameters
        assert {tensor.kind for tensor in architecture.tensors} <= set(described.KINDS)
        assert {field.name for field in fields(architecture.tensors[0])} >= {"name", "shape", "kind"}

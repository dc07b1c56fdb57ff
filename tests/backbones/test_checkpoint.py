"""Backbones from their safetensors, held against what transformers loads from the same folder."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts.errors import UserError
from pipeline.backbones.checkpoint import Checkpoint
from pipeline.backbones.families import FAMILIES, family_of
from pipeline.backbones.load import skeleton
from pipeline.config import BackboneConfig
from pipeline.placement.materialise import materialise, stock_tensors

VOCAB, EXPERTS = 83, 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 57,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
QWEN3_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 35, "mlp_only_layers": [1]}
HY_V3 = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 35, "num_shared_experts": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: (model type, settings of its own)
VARIANTS = {
    "llama": ("llama", {"hidden_size": 60, **HEADS}),
    "llama_tied": ("llama", {"hidden_size": 60, **HEADS, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mixtral": ("mixtral", {"head_dim": 10, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}),
    "mixtral_tied": (
        "mixtral",
        {"head_dim": 10, "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {**HEADS, **QWEN3_MOE}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 10, "num_experts": EXPERTS, "moe_topk": 3}),
    "hunyuan_v1_moe_tied": (
        "hunyuan_v1_moe",
        {
            "head_dim": 10,
            "num_experts": EXPERTS,
            "moe_topk": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        },
    ),
    "hy_v3": ("hy_v3", {"head_dim": 10, **HY_V3}),
    "hy_v3_tied": ("hy_v3", {"head_dim": 10, **HY_V3, "tie_word_embeddings": True}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_routed = pytest.mark.parametrize(
    "name", [n for n, (model_type, _) in VARIANTS.items() if FAMILIES[model_type].routed]
)


def stock(name: str):
    """A random stock model, fp32, in which no bias is zero and no norm is one."""
    model_type, settings = VARIANTS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "inv_freq" not in tensor_name:
                tensor.add_(torch.randn(tensor.shape) * 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{variant: folder of its model in many small files}."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in VARIANTS:
        stock(name).save_pretrained(root / name, max_shard_size="60KB")
    return {name: root / name for name in VARIANTS}


def from_transformers(folder, dtype=torch.float32):
    """The peer: what transformers makes of the folder. Plain loops over experts, which take any width."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


def opened(folder) -> Checkpoint:
    config = AutoConfig.from_pretrained(folder)
    return Checkpoint(folder, family_of(config), config)


def whole_shapes(folder) -> dict[str, tuple[int, ...]]:
    """What the model needs, from the peer."""
    model = from_transformers(folder)
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def saved_bytes(folder, *parts: str) -> int:
    """Bytes of the saved tensors whose names end so (all without an end), from the file headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(n).nbytes for n in tensors.keys() if not parts or n.endswith(parts))  # noqa: SIM118
    return total


def loaded(folder, dtype: str):
    model, family = skeleton(BackboneConfig(path=str(folder), dtype=dtype))
    checkpoint = Checkpoint(folder, family, model.config)
    materialise(*stock_tensors(model), checkpoint, torch.device("cpu"), getattr(torch, dtype))
    model.set_experts_implementation("eager")
    return model, checkpoint


@every_variant
@torch.no_grad()
def test_a_loaded_model_equals_the_one_transformers_loads_to_the_bit(name, folders):
    ids = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
    for dtype in ("float32", "bfloat16"):
        model, checkpoint = loaded(folders[name], dtype)
        reference = from_transformers(folders[name], getattr(torch, dtype))
        for tensors in ("named_parameters", "named_buffers"):
            expected = dict(getattr(reference, tensors)())
            found = dict(getattr(model, tensors)())
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert found[key].dtype == tensor.dtype, key
                assert torch.equal(found[key], tensor), key
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
        assert checkpoint.bytes_read == saved_bytes(folders[name])  # each tensor once
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings == name.endswith("_tied")


@every_routed
def test_a_skeleton_holds_no_weights_and_draws_no_random_number(name, folders):
    before = torch.random.get_rng_state()
    model, family = skeleton(BackboneConfig(path=str(folders[name]), dtype="bfloat16"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())
    real = {buffer_name.rpartition(".")[2] for buffer_name, buffer in model.named_buffers() if not buffer.is_meta}
    assert real == {"inv_freq", "original_inv_freq"}
    assert family is FAMILIES[model.config.model_type]


@every_routed
@pytest.mark.parametrize("experts", [(0, 6), (0, 1), (2, 5), (5, 6)])
def test_only_the_experts_asked_for_are_read(name, experts, folders):
    state = from_transformers(folders[name]).state_dict()
    first, stop = experts
    checkpoint = opened(folders[name])
    gate, up, down = checkpoint.family.routed.saved_experts
    stacked = [key for key in state if re.search(r"\.experts\.(gate_up|down)_proj$", key)]
    assert len(stacked) == (6 if name.startswith(("mixtral", "hunyuan")) else 4)  # three layers, perhaps one dense
    for key in stacked:
        checkpoint.bytes_read = 0
        assert torch.equal(checkpoint.read(key, expert_slice=experts), state[key][first:stop])
        block = key.rpartition(".")[0].rpartition(".mlp.")[0]
        ends = (f".{down}.weight",) if key.endswith("down_proj") else (f".{gate}.weight", f".{up}.weight")
        of_block = [f"{block}{middle}.experts.{e}{end}" for e in range(first, stop) for end in ends
                    for middle in (".mlp", ".block_sparse_moe")]  # fmt: skip
        assert checkpoint.bytes_read == saved_bytes(folders[name], *of_block) > 0


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "hunyuan_v1_moe", "hy_v3_tied"])
def test_a_flat_range_reads_only_the_rows_it_touches(name, folders):
    state = from_transformers(folders[name]).state_dict()
    checkpoint = opened(folders[name])
    draw = torch.Generator().manual_seed(2)
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    names += [key for key in state if ".layers.2.mlp." in key]
    for key in names:
        experts = (1, 4) if ".experts." in key else None
        tensor = state[key][1:4] if experts else state[key]
        row = tensor.shape[-1] if tensor.ndim > 1 else 1
        cuts = torch.randint(0, tensor.numel() + 1, (6, 2), generator=draw).sort(dim=1).values.tolist()
        for start, stop in [*cuts, [0, tensor.numel()], [0, 1], [tensor.numel() - 1, tensor.numel()], [5, 5]]:
            checkpoint.bytes_read = 0
            read = checkpoint.read(key, expert_slice=experts, flat=(start, stop))
            assert torch.equal(read, tensor.flatten()[start:stop])
            touched = torch.zeros(tensor.numel(), dtype=torch.bool)
            touched[start:stop] = True
            assert checkpoint.bytes_read == int(touched.view(-1, row).any(dim=1).sum()) * row * 4


def test_what_is_read_takes_the_asked_dtype_or_fills_the_given_tensor(folders):
    key = "model.layers.1.mlp.experts.gate_up_proj"
    tensor = from_transformers(folders["mixtral"]).state_dict()[key]
    checkpoint = opened(folders["mixtral"])
    assert torch.equal(checkpoint.read(key, torch.bfloat16), tensor.bfloat16())
    given = torch.zeros(2, 82, 57, dtype=torch.float64)
    assert checkpoint.read(key, expert_slice=(3, 5), out=given) is given
    assert torch.equal(given, tensor[3:5].double())
    assert checkpoint.shape(key) == (6, 82, 57)
    with pytest.raises(AssertionError, match="do not fit"):
        checkpoint.read(key, out=given)
    with pytest.raises(AssertionError, match="no experts 5 to 7"):
        checkpoint.read(key, expert_slice=(5, 7))
    with pytest.raises(AssertionError, match="no experts"):
        checkpoint.read("model.norm.weight", expert_slice=(0, 1))
    with pytest.raises(AssertionError, match="no elements 0 to 58"):
        checkpoint.read("model.norm.weight", flat=(0, 58))


@every_routed
def test_experts_that_are_saved_stacked_are_read_the_same(name, folders, tmp_path):
    model = from_transformers(folders[name])
    model.save_pretrained(tmp_path, save_original_format=False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert any(key.endswith(".experts.gate_up_proj") for key in tensors.keys())  # noqa: SIM118
    checkpoint = opened(tmp_path)
    checkpoint.check(whole_shapes(folders[name]))
    key = "model.layers.2.mlp.experts.gate_up_proj"
    tensor = model.state_dict()[key]
    assert torch.equal(checkpoint.read(key, expert_slice=(2, 5)), tensor[2:5])
    checkpoint.bytes_read = 0
    width = tensor.shape[1]
    start = (width + 3) * 57 + 8  # in the fourth row of the second of two experts, to the row after
    assert torch.equal(
        checkpoint.read(key, expert_slice=(4, 6), flat=(start, start + 57)), tensor[4:].flatten()[start : start + 57]
    )
    assert checkpoint.bytes_read == 2 * 57 * 4


def rewritten(folder, target, change) -> Checkpoint:
    """The checkpoint of a copy whose tensors `change` has edited, in one file."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / "model.safetensors")
    return opened(target)


FAULTS = {
    "a tensor is missing": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        r"'model\.layers\.1\.self_attn\.q_proj\.weight' is in none .* fetch the backbone again",
    ),
    "a shape differs": (
        lambda t: t.update({"model.norm.weight": torch.ones(58)}),
        r"'model\.norm\.weight' has shape \[58\] in model\.safetensors, the model of its config\.json \[57\]",
    ),
    "an expert's matrix is missing": (
        lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
        r"a matrix of expert 2 of 'model\.layers\.1\.mlp\.experts\.gate_up_proj' is in none",
    ),
    "the last expert is missing": (
        lambda t: [t.pop(f"model.layers.1.mlp.experts.5.{p}_proj.weight") for p in ("gate", "up", "down")],
        r"'model\.layers\.1\.mlp\.experts\.gate_up_proj' has shape \[5, 70, 57\] .* \[6, 70, 57\]",
    ),
    "an expert has another width": (
        lambda t: t.update({"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(36, 57)}),
        r"'model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight' in model\.safetensors has shape \[36, 57\]",
    ),
    "a tensor is left over": (
        lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(30)}),
        r"model\.safetensors holds 'model\.layers\.1\.self_attn\.q_proj\.bias', which the model .* \(1 such tensors\)",
    ),
    "a quantised tensor": (
        lambda t: t.update({"model.norm.weight": torch.ones(57, dtype=torch.int8)}),
        r"'model\.norm\.weight' in model\.safetensors is of dtype I8; use a checkpoint that is not quantised",
    ),
    "experts are there twice": (
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(6, 57, 35)}),
        r"'model\.layers\.1\.mlp\.experts\.down_proj' is saved more than once",
    ),
    "a router is there under both names": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(6, 57)}),
        r"'model\.layers\.1\.mlp\.gate\.weight' is saved more than once",
    ),
    "a tied head differs": (
        lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 57)}),
        r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight', but both are saved and differ; set tie_word_embed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_the_model_is_refused_by_the_tensors_name(fault, folders, tmp_path):
    change, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        rewritten(folders["hy_v3_tied"], tmp_path / "copy", change).check(whole_shapes(folders["hy_v3_tied"]))


HARMLESS = {
    "old rotary buffers": lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}),
    "layers that the model says it has no use for": lambda t: t.update(
        {"model.layers.80.eh_proj.weight": torch.ones(3)}
    ),
    "a tied head that is equal": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    "the head under the head's name alone": lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
}


@pytest.mark.parametrize("extra", HARMLESS)
def test_what_no_weight_is_lost_by_is_accepted(extra, folders, tmp_path):
    checkpoint = rewritten(folders["hy_v3_tied"], tmp_path / "copy", HARMLESS[extra])
    checkpoint.check(whole_shapes(folders["hy_v3_tied"]))
    assert checkpoint.bytes_read == 0
    embeddings = from_transformers(folders["hy_v3_tied"]).get_input_embeddings().weight
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), embeddings)


def test_files_that_the_index_does_not_name_are_not_read(folders, tmp_path):
    folder = shutil.copytree(folders["mixtral"], tmp_path / "copy")
    save_file({"layers.0.attention.wq.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    opened(folder).check(whole_shapes(folders["mixtral"]))
    index = folder / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (folder / shard).unlink()
    with pytest.raises(UserError, match=rf"names {shard}, which is not there"):
        opened(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json cannot be read"):
        opened(folder)

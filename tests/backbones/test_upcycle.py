"""Upcycling against the stock dense model: the same function, other weights only where they were asked for."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from data_contracts.errors import UserError
from jobs import upcycle as command
from pipeline.backbones.upcycle import upcycle
from tests.helpers import build_tokenizer, ragged, save_backbone, tiny_llama
from tests.moe_helpers import routed_blocks

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 330
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 14, "rms_norm_eps": 1e-3},
    "rope_scaled": {"rope_parameters": LLAMA3_ROPE},
    "relu": {"hidden_act": "relu"},
}
COUNTS = [(4, 2), (3, 1), (5, 3), (2, 2)]


def draw_norms(model):
    """Norm weights away from 1, so that a norm that is lost or exchanged shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_llama(folder, dtype=torch.float32, **changes):
    draw_norms(tiny_llama(VOCAB, **changes)).to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def stock(folder):
    """The stock model of a folder in fp32; the class is the one its configuration names."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


IDS = torch.tensor(ragged([40, 40, 40], VOCAB, seed=2))


@pytest.mark.parametrize(("num_experts", "top_k"), COUNTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_upcycled_llama_has_the_dense_logits(tmp_path, variant, num_experts, top_k):
    dense = save_llama(tmp_path / "dense", **VARIANTS[variant])
    upcycle(dense, tmp_path / "moe", num_experts=num_experts, top_k=top_k, seed=1)
    moe = stock(tmp_path / "moe")
    assert type(moe).__name__ == "MixtralForCausalLM"
    assert {(block.experts.num_experts, block.gate.top_k) for block in routed_blocks(moe)} == {(num_experts, top_k)}
    expected = logits(stock(dense), IDS)
    assert expected.std() > 0.3
    assert (logits(moe, IDS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 8])
def test_upcycled_mistral_has_the_dense_logits_and_its_window(tmp_path, window):
    sizes = tiny_llama(VOCAB).config.to_diff_dict()
    sizes = {key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "initializer_range")}
    torch.manual_seed(0)
    config = MistralConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=window
    )
    dense = draw_norms(MistralForCausalLM(config)).eval()
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=3, top_k=2)
    moe = stock(tmp_path / "moe")
    assert moe.config.sliding_window == window
    assert (logits(moe, IDS) - logits(dense, IDS)).abs().max() < 1e-5


def test_upcycled_demo_backbone_has_the_dense_logits():
    dense = ROOT / "demo" / "backbone"
    if not (dense / "recipe.json").is_file():
        pytest.skip("needs the demo backbone: python jobs/demo.py")
    text = "Review: The battery died after two days, but the screen is lovely.\nSentiment:"
    ids = AutoTokenizer.from_pretrained(dense)(text, return_tensors="pt")["input_ids"]
    expected = logits(stock(dense), ids)
    with tempfile.TemporaryDirectory() as folder:  # half a gigabyte, which pytest would keep
        upcycle(dense, Path(folder), num_experts=3, top_k=2)
        moe = stock(folder)
    assert (logits(moe, ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_every_expert_is_the_dense_ffn_and_all_else_is_copied_to_the_bit(tmp_path, dtype):
    dense = save_llama(tmp_path / "dense", dtype)
    upcycle(dense, tmp_path / "moe", num_experts=3, top_k=2)
    old, new = tensors(dense), tensors(tmp_path / "moe")
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path / "moe").dtype == dtype
    for layer in range(3):
        ffn = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for projection, saved in ffn.items():
            expected = old.pop(f"model.layers.{layer}.mlp.{projection}.weight")
            for expert in range(3):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{saved}.weight"
                assert torch.equal(new.pop(name), expected)
        assert new.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight").shape == (3, 48)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_noise_changes_every_expert_by_its_share_and_makes_no_two_alike(tmp_path):
    dense = save_llama(tmp_path / "dense")
    upcycle(dense, tmp_path / "equal", num_experts=3, top_k=2)
    upcycle(dense, tmp_path / "noisy", num_experts=3, top_k=2, noise=0.05)
    equal, noisy = tensors(tmp_path / "equal"), tensors(tmp_path / "noisy")
    assert equal.keys() == noisy.keys()
    changes = {name: noisy[name] - equal[name] for name in equal if ".experts." in name}
    assert len(changes) == 3 * 3 * 3
    for name, change in changes.items():
        assert 0.045 < change.norm() / equal[name].norm() < 0.055, name
    drawn = [change.flatten()[:1000] for change in changes.values()]
    alike = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert alike.abs().max() < 0.2  # 1,000 independent draws: a correlation of 0.03 is one standard deviation
    assert all(torch.equal(noisy[name], equal[name]) for name in equal if ".experts." not in name)
    difference = (logits(stock(tmp_path / "noisy"), IDS) - logits(stock(tmp_path / "equal"), IDS)).abs()
    assert 1e-3 < difference.mean() < 0.3


def test_the_same_arguments_write_the_same_bytes_and_another_seed_other_draws(tmp_path):
    dense = save_llama(tmp_path / "dense")
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        upcycle(dense, tmp_path / name, num_experts=2, top_k=1, noise=0.1, seed=seed)
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first, other = tensors(tmp_path / "first"), tensors(tmp_path / "other")
    drawn = {name for name in first if "block_sparse_moe" in name}
    assert {name for name in first if not torch.equal(first[name], other[name])} == drawn


def test_a_checkpoint_in_many_shards_has_the_values_of_one_and_loads(tmp_path):
    dense = save_llama(tmp_path / "one")
    tiny = tmp_path / "sharded"
    stock(dense).save_pretrained(tiny, max_shard_size="60KB")
    assert len(list(tiny.glob("*.safetensors"))) > 5
    upcycle(dense, tmp_path / "whole", num_experts=3, top_k=2, noise=0.1)
    limit = 50_000
    upcycle(tiny, tmp_path / "parts", num_experts=3, top_k=2, noise=0.1, shard_bytes=limit)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    files = {file.name: load_file(file) for file in (tmp_path / "parts").glob("*.safetensors")}
    assert len(files) > 10
    for held in files.values():
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert torch.equal(logits(stock(tmp_path / "parts"), IDS), logits(stock(tmp_path / "whole"), IDS))


def test_routers_spread_tokens_over_all_experts_with_logits_of_unit_size(tmp_path):
    upcycle(save_llama(tmp_path / "dense"), tmp_path / "moe", num_experts=6, top_k=2)
    moe = stock(tmp_path / "moe")
    routed = []
    for block in routed_blocks(moe):
        block.gate.register_forward_hook(lambda _module, _arguments, outputs: routed.append(outputs))
    logits(moe, torch.tensor(ragged([100] * 4, VOCAB, seed=6)))
    assert len(routed) == 3
    for router_logits, weights, chosen in routed:
        assert 0.5 < router_logits.std() < 2
        assert torch.bincount(chosen.flatten(), minlength=6).min() > 0.02 * chosen.numel()
        assert weights.amax(1).min() < 0.6 < weights.amax(1).max()


def test_tokenizer_generation_and_licence_files_come_along_and_nothing_else(tmp_path):
    dense = save_backbone(tmp_path / "dense")
    (dense / "LICENSE").write_text("terms")
    (dense / "recipe.json").write_text("how the dense folder was made")
    (dense / "notes.md").write_text("about the dense model")
    upcycle(dense, tmp_path / "moe", num_experts=2, top_k=1)
    copied = ["LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in copied:
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()
    made = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(file.name for file in (tmp_path / "moe").iterdir()) == sorted(copied + made)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (0, 1, None)


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, drop=(), **added):
    kept = {name: tensor for name, tensor in tensors(folder).items() if name not in drop}
    save_file(kept | {name.replace("__", "."): tensor for name, tensor in added.items()}, folder / "model.safetensors")


MISTAKES = {
    "biases": (lambda f: change_config(f, mlp_bias=True), r"it has biases \(mlp_bias\)"),
    "qwen3": (lambda f: change_config(f, model_type="qwen3"), "type 'qwen3' cannot be upcycled: its attention norm"),
    "qwen2": (lambda f: change_config(f, model_type="qwen2"), "type 'qwen2' .* attention has biases .* llama, mistral"),
    "gpt2": (lambda f: change_config(f, model_type="gpt2"), "type 'gpt2' .* no place for its layers"),
    "mixtral": (lambda f: change_config(f, model_type="mixtral"), "type 'mixtral' .* has routed experts already"),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "fp8"}),
        "weights are quantised; save it in bfloat16",
    ),
    "eight_bits": (
        lambda f: change_tensors(f, model__norm__weight=torch.ones(48).to(torch.float8_e4m3fn)),
        r"model\.norm\.weight is stored as F8_E4M3",
    ),
    "missing": (
        lambda f: change_tensors(f, drop=["model.layers.2.mlp.up_proj.weight"]),
        r"misses model\.layers\.2\.mlp\.up_proj\.weight \(1 in all\)",
    ),
    "unknown": (
        lambda f: change_tensors(f, model__layers__0__self_attn__q_norm__weight=torch.ones(12)),
        r"has a tensor Mixtral has no place for: model\.layers\.0\.self_attn\.q_norm\.weight",
    ),
    "no_config": (lambda f: (f / "config.json").unlink(), r"not a folder with a config\.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_dense_model_that_mixtral_cannot_hold_is_refused_before_anything_is_written(tmp_path, mistake):
    dense = save_llama(tmp_path / "dense")
    make, message = MISTAKES[mistake]
    make(dense)
    with pytest.raises(UserError, match=message):
        upcycle(dense, tmp_path / "moe", num_experts=2, top_k=1)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, "top-k is 3 of 2 experts"),
        ({"num_experts": 2, "top_k": 0}, "top-k is 0 of 2 experts"),
        ({"num_experts": 0, "top_k": 0}, "top-k is 0 of 0 experts"),
        ({"num_experts": 2, "top_k": 1, "noise": -0.1}, "noise is -0.1"),
        ({"num_experts": 2, "top_k": 1, "noise": float("nan")}, "noise is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path, numbers, message):
    with pytest.raises(UserError, match=message):
        upcycle(tmp_path / "never read", tmp_path / "moe", **numbers)


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    dense = save_llama(tmp_path / "dense")
    with pytest.raises(UserError, match="is not empty: choose a new folder"):
        upcycle(dense, dense, num_experts=2, top_k=1)
    assert not list(dense.glob("model-*"))


def test_derived_tensors_of_old_checkpoints_are_left_out(tmp_path):
    dense = save_llama(tmp_path / "dense")
    change_tensors(dense, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
    upcycle(dense, tmp_path / "moe", num_experts=2, top_k=1)
    assert not [name for name in tensors(tmp_path / "moe") if "rotary" in name]


def test_the_command_makes_a_whole_folder_with_its_recipe_and_never_touches_one_that_exists(tmp_path, capsys):
    dense, moe = save_llama(tmp_path / "dense"), tmp_path / "moe"
    arguments = ["--from", str(dense), "--to", str(moe), "--experts", "3", "--top-k", "2", "--noise", "0.1"]
    assert command.main(arguments) == 0
    recipe = json.loads((moe / "recipe.json").read_text())
    assert recipe.pop("dense") and recipe == {"num_experts": 3, "top_k": 2, "noise": 0.1, "seed": 0}
    upcycle(dense, tmp_path / "expected", num_experts=3, top_k=2, noise=0.1)
    made, expected = tensors(moe), tensors(tmp_path / "expected")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    capsys.readouterr()
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"upcycle: {moe} exists already: remove it or choose another folder\n"
    assert command.main(["--from", str(tmp_path), "--to", str(tmp_path / "b"), "--experts", "2", "--top-k", "1"]) == 2
    assert "is not a folder with a config.json" in capsys.readouterr().err
    assert command.main(["--from", str(dense), "--to", str(tmp_path / "b"), "--experts", "2", "--top-k", "3"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "expected", "moe"]

"""Each rank reads and keeps its own: 4 ranks, ZeRO 2 and 3, expert parallel 1, 2 and 4, against transformers' load."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts.errors import UserError
from pipeline.backbones.checkpoint import Checkpoint
from pipeline.backbones.load import skeleton
from pipeline.config import BackboneConfig
from pipeline.placement.expert_parallel import ExpertParallel, share_out
from pipeline.placement.materialise import materialise, stock_tensors
from tests.distributed.worlds import start_ranks

RANKS = 4
# widths that no number of ranks divides: shares begin within rows, and the last ones are padded
SIZES = {
    "vocab_size": 83,
    "hidden_size": 57,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
HY_V3 = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 35, "tie_word_embeddings": True}
BACKBONES = {
    "hunyuan": ("hunyuan_v1_moe", {"num_experts": 12, "moe_topk": 3, "tie_word_embeddings": False}),
    "hy_v3": ("hy_v3", {**HY_V3, "num_shared_experts": 1}),
    "llama": ("llama", {"hidden_size": 60, "tie_word_embeddings": True, "attention_bias": True}),
}
# name: (backbone, dtype, ZeRO stage, expert-parallel size, settings of zero_optimization)
CASES = {
    "hunyuan-3-1": ("hunyuan", "bfloat16", 3, 1, {}),
    "hunyuan-3-2": ("hunyuan", "bfloat16", 3, 2, {}),
    "hunyuan-3-4": ("hunyuan", "bfloat16", 3, 4, {}),
    "hunyuan-2-4": ("hunyuan", "bfloat16", 2, 4, {}),
    "hy_v3-3-1": ("hy_v3", "float32", 3, 1, {}),
    "hy_v3-3-2": ("hy_v3", "float32", 3, 2, {}),
    "hy_v3-2-2": ("hy_v3", "float32", 2, 2, {}),
    "hy_v3-2-1": ("hy_v3", "float32", 2, 1, {}),
    "llama-3-1": ("llama", "float32", 3, 1, {}),
    "llama-3-1-offload": ("llama", "bfloat16", 3, 1, {"offload_param": {"device": "cpu"}}),
}
PROOF = {
    "layers": 2,
    "width": 64,
    "ffn_width": 48,
    "experts": 8,
    "vocabulary": 320,
    "heads": 4,
    "kv_heads": 2,
    "head": 16,
}
every_case = pytest.mark.parametrize("case", CASES)


def save(folder, name: str) -> None:
    model_type, settings = BACKBONES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | settings))
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "inv_freq" not in tensor_name:
                tensor.add_(torch.randn(tensor.shape) * 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """{name: folder}, in fp32."""
    root = tmp_path_factory.mktemp("backbones")
    for name in BACKBONES:
        save(root / name, name)
    return {name: root / name for name in BACKBONES}


@pytest.fixture(scope="module")
def launched(backbones, tmp_path_factory):
    """What every rank noted, in rank order: one launch of 4 ranks for all cases."""
    folder = tmp_path_factory.mktemp("loading")
    keys = ("backbone", "dtype", "stage", "ep", "zero")
    cases = [{"name": name, **dict(zip(keys, case, strict=True))} for name, case in CASES.items()]
    for case in cases:
        case["backbone"] = str(backbones[case["backbone"]])
        case["forward"] = case["ep"] == 1 and case["stage"] == 3  # a stock block cannot run with a part of its experts
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "cases": cases, "sizes": PROOF}), encoding="utf-8")
    from tests.placement import loading_ranks

    start_ranks(RANKS, plan, folder / "log", loading_ranks.__file__)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture
def notes(launched, case):
    return [notes[case] for notes in launched]


def whole_shapes(folder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


def cut(
    shape: tuple[int, ...], is_expert: bool, stage: int, ep: int, rank: int
) -> tuple[tuple[int, ...], int, int, int]:
    """(local shape, start, stop, elements kept) of a rank's share of one tensor."""
    if is_expert:
        shape = (shape[0] // ep, *shape[1:])
    numel = torch.Size(shape).numel()
    if stage == 2:
        return shape, 0, numel, numel
    ranks, place = (RANKS // ep, rank // ep) if is_expert else (RANKS, rank)
    size = -(-numel // ranks)
    return shape, min(place * size, numel), min((place + 1) * size, numel), size


@every_case
def test_every_rank_holds_the_values_that_transformers_loads(case, notes, backbones):
    backbone, dtype, _, ep, _ = CASES[case]
    shapes = whole_shapes(backbones[backbone])
    for rank, note in enumerate(notes):
        assert note["differing"] == []
        assert note["names"] == sorted(shapes)
        wide = {name for name, kept in note["dtypes"].items() if kept == "torch.float32"}
        if dtype == "float32":
            assert wide == set(shapes)
        else:
            assert wide == {name for name in shapes if ".mlp.gate.wg." in name} and (backbone == "llama") == (not wide)
        local = {"hunyuan": 12, "hy_v3": 6}.get(backbone, 0) // ep
        first = rank % ep * local
        experts = {name for name in shapes if ".experts." in name} if ep > 1 else set()
        assert note["slices"] == {name: [first, first + local, local * ep] for name in experts}


@every_case
def test_every_rank_reads_the_rows_of_its_own_share_and_no_more(case, notes, backbones):
    backbone, _, stage, ep, _ = CASES[case]
    shapes = whole_shapes(backbones[backbone])
    for rank, note in enumerate(notes):
        total = 6 * 4 if backbone == "hy_v3" else 0  # the second layer's correction bias, whole and in fp32
        for name, whole in shapes.items():
            shape, start, stop, _ = cut(whole, ".experts." in name, stage, ep, rank)
            touched = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
            touched[start:stop] = True
            row = shape[-1] if len(shape) > 1 else 1
            total += int(touched.view(-1, row).any(dim=1).sum()) * row * 4
        assert note["bytes_read"] == total


@every_case
def test_under_zero_3_no_tensor_is_whole_on_a_rank(case, notes, backbones):
    backbone, _, stage, ep, zero = CASES[case]
    for rank, note in enumerate(notes):
        for name, whole in whole_shapes(backbones[backbone]).items():
            *_, size = cut(whole, ".experts." in name, stage, ep, rank)
            assert note["held"][name] == [size, 0 if stage == 3 else size, "cpu"], name
        assert note["linear_replaced"] == (stage == 3)
    if stage == 3:  # the cases are such that shares begin within rows and are padded
        shapes = whole_shapes(backbones[backbone])
        cuts = [cut(s, ".experts." in n, stage, ep, RANKS - 1) for n, s in shapes.items()]
        assert any(start % shape[-1] for shape, start, _, _ in cuts if len(shape) > 1)
        assert zero or any(stop - start < size for _, start, stop, size in cuts)


@pytest.mark.parametrize("case", [name for name, (_, _, stage, ep, _) in CASES.items() if (stage, ep) == (3, 1)])
def test_an_engine_over_the_shares_gives_stock_logits_to_the_bit(notes):
    assert [note["logits_equal"] for note in notes] == [True] * RANKS


def test_the_proof_of_loading_holds_for_a_small_backbone(launched):
    """`loading_proof.py` runs the same at 3 GB, memory included."""
    figures = launched[0]["proof"]
    assert [(f["case"], f["rank"]) for f in figures] == [
        (case, rank) for case in ("ZeRO-3 x EP 2", "ZeRO-3 x EP 4", "ZeRO-2 x EP 4") for rank in range(RANKS)
    ]
    # by hand: experts 8 x 3 x 64 x 48 a layer; dense parts of a layer in bfloat16 21,664 and in fp32 512; ends 41,024
    experts, dense, wide, ends = 73_728 * 2, 21_664 * 2, 512 * 4, 41_024 * 2
    shares = {
        "ZeRO-3": 2 * (experts + dense + wide) // 4 + ends // 4,
        "ZeRO-2": 2 * (experts // 4 + dense + wide) + ends,
    }
    for f in figures:
        assert f["read"] == f["share"] == shares[f["case"][:6]]
        assert f["layer"] == experts // int(f["case"][-1]) + dense + wide
        assert f["values"] and f["peak"] > 0


@pytest.mark.parametrize("rank", range(3))
def test_marks_and_ties_survive_and_only_local_experts_are_read(rank, backbones):
    folder = backbones["hy_v3"]
    model, family = skeleton(BackboneConfig(path=str(folder), dtype="float32"))
    share_out(model, family, ExpertParallel(3, rank, None, "the ranks with the same experts"))
    parameters, buffers = stock_tensors(model)
    objects = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    marks = {name: dict(parameter.__dict__) for name, parameter in parameters.items()}
    checkpoint = Checkpoint(folder, family, model.config)
    materialise(parameters, buffers, checkpoint, torch.device("cpu"), torch.float32)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == objects
    assert {name: dict(p.__dict__) for name, p in parameters.items()} == marks
    assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in parameters
    experts = model.model.layers[1].mlp.experts
    assert experts.down_proj.group_name == "ep_size_3" and not experts.down_proj.allreduce
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        whole = state[f"model.layers.1.mlp.experts.{name}"]
        assert torch.equal(getattr(experts, name), whole[2 * rank : 2 * rank + 2])
    others = 4 * sum(p.nbytes for p in experts.parameters()) // 2
    everything = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) + 6 * 4
    assert checkpoint.bytes_read == everything - others


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_param.device nvme"),
    ],
)
def test_settings_that_shares_cannot_be_read_for_are_refused_by_name(zero, key, backbones):
    model, family = skeleton(BackboneConfig(path=str(backbones["llama"]), dtype="float32"))
    checkpoint = Checkpoint(backbones["llama"], family, model.config)
    settings = {"zero_optimization": {"stage": 3, **zero}}
    with pytest.raises(UserError, match=f"zero_optimization.{key} is not supported"):
        materialise(*stock_tensors(model), checkpoint, torch.device("cpu"), torch.float32, settings)
    assert all(parameter.is_meta for parameter in model.parameters()) and checkpoint.bytes_read == 0


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_made_real(backbones):
    model, _ = skeleton(BackboneConfig(path=str(backbones["hunyuan"]), dtype="float32"))
    other, family = skeleton(BackboneConfig(path=str(backbones["hy_v3"]), dtype="float32"))
    checkpoint = Checkpoint(backbones["hy_v3"], family, other.config)
    with pytest.raises(UserError, match="tensor 'model"):
        materialise(*stock_tensors(model), checkpoint, torch.device("cpu"), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())

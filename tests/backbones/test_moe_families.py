"""Every family with routed experts, held against the stock transformers model with experts attached and B = 0."""

import copy

import pytest
import torch

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES
from pipeline.data.collate import pack
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from tests.helpers import light_learner, ragged, randomise
from tests.moe_helpers import routed_blocks, tiny_moe

VOCAB = 120
EVERYWHERE = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
# (family, routed experts, top-k, settings of its own): awkward numbers; widths that no grouped kernel is aligned to
VARIANTS = {
    "mixtral": ("mixtral", 5, 3, {"intermediate_size": 37}),
    "mixtral_top_1": ("mixtral", 7, 1, {"sliding_window": 11}),
    "qwen3_moe": ("qwen3_moe", 7, 3, {"moe_intermediate_size": 23}),
    "qwen3_moe_not_renormalised": ("qwen3_moe", 5, 2, {"norm_topk_prob": False}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", 5, 3, {"intermediate_size": 29}),
    "hunyuan_v1_moe_top_1": ("hunyuan_v1_moe", 3, 1, {}),
    "hy_v3": ("hy_v3", 7, 3, {"moe_intermediate_size": 31, "router_scaling_factor": 2.826}),
    "hy_v3_top_1": ("hy_v3", 5, 1, {"enable_moe_fp32_combine": False}),
}


def stock(name: str):
    """A random stock model, fp32, whose experts are looped over."""
    family, experts, top_k, changes = VARIANTS[name]
    model = tiny_moe(family, VOCAB, num_experts=experts, top_k=top_k, **changes)
    model.set_experts_implementation("eager")
    return model


def built(reference, targets=EVERYWHERE):
    """The same model with LoRA experts whose A, gates and discriminators are drawn and whose B is zero."""
    plan = ExpertPlan(LoraOptions(rank=3, dropout=0.0, targets=targets), ("shared", "dedicated"), 4)
    learner = light_learner(copy.deepcopy(reference), plan)
    randomise(learner, scale=0.5)
    with torch.no_grad():
        for parameter in [p for name, p in learner.parameters.items() if name.endswith("lora_B")]:
            parameter.zero_()
    return learner


def test_every_routed_family_has_a_variant_here():
    assert {variant[0] for variant in VARIANTS.values()} == {n for n, family in FAMILIES.items() if family.routed}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_stock_logits_are_reproduced_with_experts_attached_and_b_zero(name):
    reference = stock(name)
    if name.startswith("hy_v3"):
        assert all(block.e_score_correction_bias.abs().min() > 0 for block in routed_blocks(reference))
    learner = built(reference)
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
    learner = built(reference)
    sequences = ragged([9, 1, 5, 14, 3, 2, 1], VOCAB, seed=4)
    packed = pack(sequences)
    assert packed.input_ids.shape[0] < len(sequences)
    asked = torch.cat([start + torch.arange(len(s)) for start, s in zip(packed.starts, sequences, strict=True)])
    ours = learner.forward(packed.input_ids, None, asked, packed.position_ids)
    alone = torch.cat([reference(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences])
    assert (ours - alone).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("targets", "sites"),
    [
        (("experts.*",), {"mlp.experts"}),
        (("shared_experts.*",), {"mlp.shared_experts"}),
        (("layers.0.mlp.*",), {"mlp"}),
        (("q_proj", "v_proj"), {"self_attn"}),
        (("up_proj",), {"mlp.experts", "mlp.shared_experts", "mlp"}),
        (("experts.down_proj", "o_proj"), {"mlp.experts", "self_attn"}),
    ],
)
@torch.no_grad()
def test_experts_go_on_any_subset_of_the_parts(targets, sites):
    reference = stock("hy_v3")
    learner = built(reference, targets)
    names = [name.partition("/")[2] for name in learner.parameters if name.endswith("lora_A")]
    assert {".".join(name.split(".")[3:-2]) for name in names} == sites
    ids = torch.tensor(ragged([12], VOCAB, seed=5))
    asked = torch.arange(12)
    expected = reference(input_ids=ids).logits[0]
    assert (learner.forward(ids, None, asked) - expected).abs().max() < 1e-5
    randomise(learner, scale=0.5)
    assert (learner.forward(ids, None, asked) - expected).abs().max() > 0.05


@torch.no_grad()
def test_a_tensor_over_routed_experts_stacks_one_pair_an_expert():
    shapes = {name: tuple(p.shape) for name, p in built(stock("hy_v3")).parameters.items()}
    path = "shared/model.layers.1.mlp.experts"
    assert shapes[f"{path}.gate_proj.lora_A"] == (7, 3, 48) and shapes[f"{path}.gate_proj.lora_B"] == (7, 31, 3)
    assert shapes[f"{path}.down_proj.lora_A"] == (7, 3, 31) and shapes[f"{path}.down_proj.lora_B"] == (7, 48, 3)
    assert shapes["shared/model.layers.0.mlp.gate_proj.lora_A"] == (3, 48)  # the first layer is dense
    assert shapes["gate/model.layers.1.mlp.gate.weight"] == (2, 48)
    assert shapes["gate/model.layers.1.self_attn.q_proj.gate.weight"] == (2, 48)


@pytest.mark.parametrize("name", ["mixtral", "hunyuan_v1_moe"])
def test_a_target_that_matches_nothing_is_refused(name):
    with pytest.raises(UserError, match=r"shared_experts\.\* matches no projection"):
        built(stock(name), ("shared_experts.*",))

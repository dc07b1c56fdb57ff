"""LoRA experts: which projections are targeted, what they start from, what their parameters are called."""

import math

import pytest
import torch

from data_contracts.errors import UserError
from pipeline.backbones.families import FAMILIES
from pipeline.experts.attach import ExpertPlan, attach_experts, components_of
from pipeline.experts.lora import LoraOptions, initial_value, targeted_projections
from tests.helpers import tiny_llama

LLAMA = FAMILIES["llama"]
ALL = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def model():
    return tiny_llama(40)


def ffn_path(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def attention_path(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("gate_proj", "up_proj", "down_proj"), {ffn_path(i): ALL for i in range(3)}),
        (("down_proj",), {ffn_path(i): ["down_proj"] for i in range(3)}),
        (("mlp.*_proj",), {ffn_path(i): ALL for i in range(3)}),
        (
            ("*_proj",),
            {path: names for i in range(3) for path, names in ((ffn_path(i), ALL), (attention_path(i), ATTENTION))},
        ),
        (
            ("q_proj", "model.layers.1.*.v_proj"),
            {attention_path(i): ["q_proj", "v_proj"][: 1 + i % 2] for i in range(3)},
        ),
        (("model.layers.[02].mlp.up_proj",), {ffn_path(0): ["up_proj"], ffn_path(2): ["up_proj"]}),
        (("layers.1.mlp.*", "gate_proj"), {ffn_path(0): ALL[:1], ffn_path(1): ALL, ffn_path(2): ALL[:1]}),
        (("model.layers.1.mlp.gate_proj",), {ffn_path(1): ["gate_proj"]}),
    ],
)
def test_targets_are_names_or_patterns_over_paths(model, targets, expected):
    assert targeted_projections(LLAMA, model, targets) == expected


@pytest.mark.parametrize("target", ["z_proj", "model.layers.9.mlp.up_proj", "proj", "UP_PROJ", "up_proj.weight"])
def test_a_target_that_matches_nothing_is_refused_by_name(model, target):
    with pytest.raises(
        UserError, match=r"method\.lora\.targets: .* matches no projection; there are gate_proj"
    ) as told:
        targeted_projections(LLAMA, model, ("up_proj", target))
    assert f"{target} matches" in str(told.value)
    with pytest.raises(UserError, match="matches no projection"):
        attach_experts(model, LLAMA, ExpertPlan(LoraOptions(targets=(target,)), ("adapter",)))
    assert not any("experts" in name for name, _ in model.named_parameters())


def test_only_targeted_layers_are_wrapped_and_numbered_one_after_another(model):
    plan = ExpertPlan(LoraOptions(rank=2, targets=("model.layers.[12].mlp.*",)), ("shared", "dedicated"), 3)
    ffns = attach_experts(model, LLAMA, plan).ffns
    assert [(ffn.path, ffn.layer) for ffn in ffns] == [(ffn_path(1), 0), (ffn_path(2), 1)]
    assert model.model.layers[1].mlp is ffns[0]
    assert not hasattr(model.model.layers[0].mlp, "experts")


def test_components_name_every_trainable_parameter_with_its_shape(model):
    plan = ExpertPlan(LoraOptions(rank=2, targets=("model.layers.1.mlp.*",)), ("shared", "dedicated"), 3)
    components = components_of(attach_experts(model, LLAMA, plan))
    shapes = {
        component: {name: tuple(parameter.shape) for name, parameter in part.items()}
        for component, part in components.items()
    }
    path = ffn_path(1)
    expert = {
        f"{path}.gate_proj.lora_A": (2, 48),
        f"{path}.gate_proj.lora_B": (92, 2),
        f"{path}.up_proj.lora_A": (2, 48),
        f"{path}.up_proj.lora_B": (92, 2),
        f"{path}.down_proj.lora_A": (2, 92),
        f"{path}.down_proj.lora_B": (48, 2),
    }
    assert shapes == {
        "shared": expert,
        "dedicated": expert,
        "gate": {f"{path}.gate.weight": (2, 48)},
        "discriminator": {f"{path}.discriminator.weight": (3, 48), f"{path}.discriminator.bias": (3,)},
    }
    named = {id(parameter) for part in components.values() for parameter in part.values()}
    added = {id(p) for name, p in model.named_parameters() if any(w in name for w in ("lora_", ".gate.", "discrim"))}
    assert named == added


def test_experts_take_dtype_and_device_of_the_frozen_weights(model):
    experts = attach_experts(model.bfloat16(), LLAMA, ExpertPlan(LoraOptions(), ("shared", "dedicated"), 2))
    dtypes = {parameter.dtype for part in components_of(experts).values() for parameter in part.values()}
    assert dtypes == {torch.bfloat16}


def test_a_starts_as_kaiming_uniform_and_everything_else_as_zero():
    shape = (16, 400)
    value = initial_value("model.layers.0.mlp.up_proj.lora_A", shape, "17/1/shared")
    reference = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))  # what PEFT does
    assert value.dtype == torch.float32
    assert float(value.abs().max()) <= 1 / math.sqrt(400)
    assert float(value.std()) == pytest.approx(float(reference.std()), rel=0.05)
    assert float(value.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
    assert abs(float(value.mean())) < 3 * float(value.std()) / math.sqrt(value.numel())
    for name, other in (("up_proj.lora_B", (400, 16)), ("mlp.gate.weight", (2, 48)), ("discriminator.bias", (8,))):
        start = initial_value(name, other, "17/1/shared")
        assert tuple(start.shape) == other and not start.any()


def test_start_values_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = initial_value("a.lora_A", (4, 6), "17/1/shared")
    torch.manual_seed(2)
    initial_value("b.lora_A", (4, 6), "17/1/shared")
    assert torch.equal(first, initial_value("a.lora_A", (4, 6), "17/1/shared"))
    for name, seed in (("b.lora_A", "17/1/shared"), ("a.lora_A", "18/1/shared"), ("a.lora_A", "17/1/dedicated")):
        assert not torch.equal(first, initial_value(name, (4, 6), seed))


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": ()}, {"ranks": 4}]
)
def test_impossible_lora_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraOptions(**bad)

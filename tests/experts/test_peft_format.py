"""LoRA pairs in PEFT's form and back, held against PEFT itself: logits of its model and of ours."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from data_contracts.errors import UserError
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.experts.peft_format import from_peft, pairs_in, summed, to_peft
from tests.helpers import light_learner, randomise, tiny_llama
from tests.moe_helpers import tiny_moe

# PEFT looks for the patterns' keys among modules alone, and warns of those that it applies to parameters
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
LORA = LoraOptions(rank=3, alpha=7.5, dropout=0.0, targets=("*_proj",))
SCALING = 2.5
VOCABULARY = 60
MODELS = {
    "llama": lambda: tiny_llama(VOCABULARY, num_layers=2),
    "mixtral": lambda: tiny_moe("mixtral", VOCABULARY),
    "hunyuan_v1_moe": lambda: tiny_moe("hunyuan_v1_moe", VOCABULARY),  # with always-on experts
    "hy_v3": lambda: tiny_moe("hy_v3", VOCABULARY),  # with both
    "qwen3_moe": lambda: tiny_moe("qwen3_moe", VOCABULARY),  # with a dense layer
}
INPUT = torch.randint(2, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))


def learner_of(name: str, lora: LoraOptions = LORA):
    """The model with a random LoRA expert that speaks."""
    learner = light_learner(MODELS[name](), ExpertPlan(lora, ("adapter",)))
    randomise(learner)
    learner.set_active(("adapter",))
    learner.model.eval()
    return learner


def tensors_of(learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.components["adapter"].items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=INPUT).logits


def save_adapter(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def loaded_by_peft(name, folder):
    """The stock model with the folder's adapter; every tensor of the file must have found its place."""
    model = PeftModel.from_pretrained(MODELS[name](), folder)
    loaded = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(loaded.pop(key), value)
    assert not loaded
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [("*_proj",), ("up_proj", "model.layers.1.*.down_proj", "q_proj")], ids=str)
def test_peft_loads_what_we_write_with_our_logits_and_it_reads_back_to_the_bit(name, targets, tmp_path):
    learner = learner_of(name, LORA.model_copy(update={"targets": targets}))
    ours = tensors_of(learner)
    config, tensors = to_peft(pairs_in(ours), SCALING, "base", name != "llama")
    found = logits(loaded_by_peft(name, save_adapter(tmp_path / "adapter", config, tensors)))
    expected = logits(learner.model.backbone)
    assert (expected - logits(MODELS[name]())).abs().max() > 0.05  # the adapter is heard
    assert (found - expected).abs().max() <= 1e-5
    back = from_peft(config, tensors, {key: tuple(tensor.shape) for key, tensor in ours.items()}, SCALING)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize(("name", "rslora"), [("llama", False), ("llama", True), ("mixtral", False)])
def test_we_read_what_peft_trained_with_its_logits(name, rslora, tmp_path):
    torch.manual_seed(3)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if name == "mixtral" else None
    linears = ["q_proj", "v_proj"] + ([] if experts else ["gate_proj", "up_proj", "down_proj"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=linears, target_parameters=experts, use_rslora=rslora)
    config.init_lora_weights = False  # B is random, not zero
    model = get_peft_model(MODELS[name](), config).eval()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    lora = LORA.model_copy(update={"targets": ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")})
    learner = learner_of(name, lora)
    slots = learner.components["adapter"]
    shapes = {key: tuple(parameter.shape) for key, parameter in slots.items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    read = from_peft(config, load_file(tmp_path / "adapter_model.safetensors"), shapes, SCALING)
    with torch.no_grad():
        for key, parameter in slots.items():
            parameter.copy_(read[key])
    found = logits(learner.model.backbone)
    assert (expected - logits(MODELS[name]())).abs().max() > 0.05
    assert (found - expected).abs().max() <= 1e-5


def test_a_sum_of_weighted_experts_is_one_pair_of_all_their_ranks():
    draw = torch.Generator().manual_seed(1)
    parts = [
        ({"dense": (torch.randn(r, 6, generator=draw), torch.randn(5, r, generator=draw))}, weight)
        for r, weight in ((2, 1.0), (3, -0.5), (1, 2.0))
    ]
    lora_a, lora_b = summed(parts)["dense"]
    assert lora_a.shape == (6, 6) and lora_b.shape == (5, 6)
    expected = sum(weight * pairs["dense"][1] @ pairs["dense"][0] for pairs, weight in parts)
    assert (lora_b @ lora_a - expected).abs().max() <= 1e-5
    stacked = [({"e": tuple(torch.stack([t, 2 * t]) for t in pairs["dense"])}, weight) for pairs, weight in parts]
    lora_a, lora_b = summed(stacked)["e"]
    assert lora_a.shape == (2, 6, 6) and lora_b.shape == (2, 5, 6)
    assert ((lora_b @ lora_a)[1] - 4 * expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def whole():
    """A mixtral adapter in PEFT's form, and the shapes of its tensors here."""
    ours = tensors_of(learner_of("mixtral"))
    return *to_peft(pairs_in(ours), SCALING, "base", True), {key: tuple(t.shape) for key, t in ours.items()}


def changed(tensors, name, make):
    return {key: make(value) if key.endswith(name) else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"peft_type": "LOHA"}, None, "only LORA"),
        ({"use_dora": True}, None, "use_dora"),
        ({"bias": "all"}, None, "uses bias"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"r": 4}, None, "adapter_config.json says 4"),
        ({"lora_alpha": "16"}, None, "positive numbers"),
        ({"rank_pattern": {"(a+)+b": 3}}, None, "by the expression"),
        ({}, lambda t: changed(t, "q_proj.lora_A.weight", lambda a: a[:, :-1]), "this backbone needs"),
        ({}, lambda t: changed(t, "q_proj.lora_A.weight", lambda a: a * float("nan")), "finite"),
        ({}, lambda t: changed(t, "experts.lora_A.weight", lambda a: a[:-1]), "one for each of 4 routed experts"),
        ({}, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj" not in k}, "no pair on"),
        ({}, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.experts.base_layer" not in k}, "no pair on"),
        ({}, lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}, "adapts lm_head"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(whole, config, tensors, told):
    own, values, shapes = whole
    with pytest.raises(UserError, match=told):
        from_peft({**own, **config}, tensors(values) if tensors else values, shapes, SCALING)


def test_another_rank_is_refused_and_another_alpha_goes_into_b(whole):
    own, values, shapes = whole
    wider = {
        key: (*shape[:-2], 4, shape[-1]) if key.endswith("A") else (*shape[:-1], 4) for key, shape in shapes.items()
    }
    with pytest.raises(UserError, match=r"its rank on .* is 3, and method\.lora\.rank is 4"):
        from_peft(own, values, wider, SCALING)
    name = "model.layers.0.mlp.experts.down_proj.lora_"
    same, twice = (from_peft(own, values, shapes, scaling) for scaling in (SCALING, 2 * SCALING))
    assert torch.equal(same[f"{name}A"], twice[f"{name}A"])
    assert torch.equal(same[f"{name}B"], 2 * twice[f"{name}B"])

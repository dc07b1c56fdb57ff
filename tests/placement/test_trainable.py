"""What a method trains and what a task adds to the bank, as names and shapes, against live modules and bank files."""

from types import SimpleNamespace

import pytest

from data_contracts.errors import UserError
from pipeline.config import method_module, method_names
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.bank import Bank
from pipeline.experts.lora import LoraOptions
from pipeline.experts.pool import SubExperts
from pipeline.placement.architecture import read_architecture
from pipeline.placement.trainable import ROLES, MethodChoice, bank_growth, trainable_of
from tests.helpers import light_learner, tiny_llama
from tests.moe_helpers import MOE_TYPES, tiny_moe
from tests.placement.test_plan import ARCHITECTURE

METHODS = {name: method_module(name) for name in method_names()}
TARGETS = [("gate_proj", "up_proj", "down_proj"), ("down_proj", "q_proj", "o_proj"), ("*.mlp.*up_proj",)]


def live(model_type, seed=0):
    return tiny_llama(50, seed=seed) if model_type == "llama" else tiny_moe(model_type, 50, seed=seed)


@pytest.mark.parametrize("name", ["moe_cl", "moses"])
@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
@pytest.mark.parametrize("model_type", ["llama", *MOE_TYPES])
def test_every_trained_tensor_has_the_name_and_shape_it_has_in_the_model(model_type, targets, name):
    model = live(model_type)
    architecture = read_architecture(model.config.to_dict())
    plans = {"moe_cl": (("shared", "dedicated"), 5, None), "moses": (("adapter",), 0, SubExperts(3, 2, 0.1))}
    roles, outputs, pool = plans[name]
    learner = light_learner(model, ExpertPlan(LoraOptions(rank=3, targets=targets), roles, outputs, {}, pool))
    trainable = trainable_of(architecture, MethodChoice(name, 3, targets, 5, pool or SubExperts(1, 1, 1.0)))
    found = {f"{tensor.component}/{tensor.name}": tensor.shape for tensor in trainable.tensors}
    assert found == {name: tuple(parameter.shape) for name, parameter in learner.parameters.items()}
    assert len(found) == len(trainable.tensors)
    assert len(trainable.adapted_layers) == len(learner.ffns)
    for tensor in trainable.tensors:
        assert tensor.expert_owned == (".mlp.experts." in tensor.name)


def test_methods_train_the_roles_they_have():
    assert ROLES.keys() == METHODS.keys()
    for name, module in METHODS.items():
        built = module.build(module.Options())
        assert ROLES[name] == (built.plan.roles if built.plan else ())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "hunyuan_v1_moe"])
def test_the_bank_grows_by_the_tensor_bytes_of_the_files_a_task_publishes(tmp_path, monkeypatch, name, model_type):
    import torch

    method = METHODS[name].build(METHODS[name].Options())
    model = live(model_type)
    architecture = read_architecture(model.config.to_dict())
    learner = light_learner(model, method.plan)
    values = {key: torch.zeros(parameter.shape) for key, parameter in learner.parameters.items()}
    files = {role: {k: v for k, v in values.items() if k.startswith(f"{role}/")} for role in method.published()}
    if method.packs:
        monkeypatch.setattr(method_module(name), "own_value", lambda parameter: parameter.detach().float())
        files = {"adapter": method.pack(learner).tensors}
    if method.wants_pooled():
        statistics = torch.zeros(2, len(learner.ffns), architecture.hidden_size)
        files["state"] = method.state((statistics[0], statistics[1]), values)
    study = SimpleNamespace(
        squared_gradients=lambda rows: values, prompt_vectors=lambda: torch.ones(5, architecture.hidden_size)
    )
    if measured := method.learned(study):
        files["state"] = measured
    bank, sizes = Bank(tmp_path), {}
    for role, tensors in files.items():
        data = bank.path(bank.put(tensors)).read_bytes()
        sizes[role] = len(data) - 8 - int.from_bytes(data[:8], "little")  # without length and header
    assert bank_growth(architecture, trainable_of(architecture, MethodChoice(name))) == sizes


def test_a_target_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(UserError, match=r"c_proj matches no projection.*mlp\.experts\.up_proj.*self_attn\.q_proj"):
        trainable_of(ARCHITECTURE, MethodChoice(targets=("up_proj", "c_proj")))


def test_an_adversary_without_a_feed_forward_network_is_refused():
    with pytest.raises(UserError, match="discriminator-outputs 0"):
        trainable_of(ARCHITECTURE, MethodChoice("moe_cl", targets=("q_proj",)))


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"name": "magic"}, "moe_cl"),
        ({"rank": 0}, "rank is 0"),
        ({"discriminator_outputs": 1}, "outputs is 1"),
        ({"sub_experts": SubExperts(2, 3, 0.5)}, "--choose 3"),
    ],
)
def test_a_method_that_cannot_be_is_refused(choice, said):
    with pytest.raises(UserError, match=said):
        MethodChoice(**choice)

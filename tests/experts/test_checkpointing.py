"""Activation checkpointing: the same losses and gradients to the bit, from what is computed again; what is kept."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.backbones.families import family_of
from pipeline.benchmarks.speed.contenders import earlier_state
from pipeline.experts.checkpointing import checkpoint_activations
from pipeline.methods.moe_cl import Options, build
from pipeline.methods.protocol import Increment
from tests.helpers import gradients, light_learner, micro_batch, ragged, randomise, tiny_llama
from tests.moe_helpers import MOE_TYPES, tiny_moe

VOCAB = 61
PROMPTS, ANSWERS = ragged([7, 3, 14, 1, 6], VOCAB, seed=1), ragged([1, 2, 2, 1, 3], VOCAB, seed=2)
BACKBONES = ["llama", *MOE_TYPES]


def run(kind: str, recompute: bool, dropout: float = 0.2, targets=("gate_proj", "up_proj", "down_proj")):
    """One micro-batch of a second increment: loss, logged game, gradients, bytes kept for backward, forward passes."""
    method = build(Options.model_validate({"lora": {"rank": 2, "alpha": 4, "dropout": dropout, "targets": targets}}))
    model = tiny_llama(VOCAB) if kind == "llama" else tiny_moe(kind, VOCAB)
    learner = light_learner(model, method.plan)
    randomise(learner)
    if recompute:
        checkpoint_activations(model, family_of(model.config))
    increment = Increment(2, "new", 17, {"old": {}}, {}, ("old",))
    states = {"old": earlier_state(len(learner.ffns), model.config.hidden_size)}
    start = {name: torch.zeros(p.shape) for name, p in learner.parameters.items()}
    method.begin(increment.with_states(states), learner.ffns, start)
    learner.model.train()
    passes: list[int] = []
    hooks = [ffn.register_forward_hook(lambda module, *_: passes.append(module.layer)) for ffn in learner.ffns]
    batch = micro_batch(PROMPTS, ANSWERS)
    method.before_forward(learner.ffns, batch)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = learner.forward(batch.input_ids, None, batch.positions, batch.position_ids)
    loss = F.cross_entropy(logits, batch.targets)
    game = method.after_forward(learner.ffns)["adversary"]
    after = torch.rand(3)  # what is drawn after the pass
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "loss": loss.item(),
        "game": game,
        "after": after,
        "gradients": gradients(learner.parameters),
        "kept": sum(kept.values()),
        "passes": passes,
        "tokens": batch.input_ids.numel(),
        "width": model.config.hidden_size,
        "learner": learner,
    }


@pytest.mark.parametrize("kind", BACKBONES)
def test_losses_game_and_gradients_are_the_same_to_the_bit_with_dropout_and_adversary(kind):
    plain, again = run(kind, recompute=False), run(kind, recompute=True)
    assert (again["loss"], again["game"]) == (plain["loss"], plain["game"])
    assert torch.equal(again["after"], plain["after"])
    for name, gradient in plain["gradients"].items():
        assert torch.equal(again["gradients"][name], gradient), name
        assert gradient.any() or ".experts." in name, name  # a routed expert may have got no token
    smooth = run(kind, recompute=True, dropout=0.0)
    assert smooth["loss"] != again["loss"]  # the masks were on


def test_every_layer_is_computed_twice_and_leaves_its_game_once():
    plain, again = run("llama", recompute=False), run("llama", recompute=True)
    assert plain["passes"] == [0, 1, 2]
    assert again["passes"] == [0, 1, 2, 2, 1, 0]
    assert all(ffn.adversary is None for ffn in again["learner"].ffns)


def test_a_layer_keeps_its_input_and_nothing_else():
    plain, again = run("llama", recompute=False), run("llama", recompute=True)
    # fp32 inputs of three layers, and of the last norm; beside them rotary tables, answers and the norm's own
    states = again["tokens"] * again["width"] * 4
    assert 4 * states <= again["kept"] < 8 * states
    assert plain["kept"] > 5 * again["kept"]


def test_layers_below_the_first_lora_expert_are_left_as_they_are():
    again = run("llama", recompute=True, targets=("model.layers.1.mlp.*",))
    assert again["passes"] == [0, 0]
    layers = again["learner"].model.backbone.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, True]


def test_evaluation_computes_once_and_keeps_its_cache():
    learner = run("llama", recompute=True)["learner"].model.eval()
    prompt = torch.tensor([PROMPTS[0]])
    passes: list[int] = []
    learner.backbone.model.layers[1].mlp.register_forward_hook(lambda *_: passes.append(1))
    logits = learner(prompt, None, torch.tensor([6]))
    logits.sum().backward()
    assert passes == [1]

"""The adversarial game in a whole model, in fp64: what the reversal reaches and what it must not (METHODS section 1).

Oracle: theta_s of layer l gets -weight * d(mean CE) / d(theta_s), with the layer's input x and its frozen a, b held
fixed; the discriminator gets +weight * d(mean CE) / d(itself); nothing else changes. The mean is over layers and
sequences.
"""

import pytest
import torch
import torch.nn.functional as F

from pipeline.experts.attach import ExpertPlan
from pipeline.experts.discriminator import AdversaryStep, AttachLoss, GradientReversal, Negatives
from pipeline.experts.lora import LoraOptions
from pipeline.placement.learner import Learner
from tests.helpers import gradients, largest_difference, light_learner, ragged, randomise, recorded_inputs, tiny_llama

VOCAB, LAYERS, OUTPUTS, CLASSES, WEIGHT = 61, 3, 5, 3, 0.7
SPANS = (
    (0, 9),
    (9, 13),
    (18, 24),
    (24, 25),
)  # flattened places of four sequences packed into three rows of nine tokens
NUM = len(SPANS)  # sequences
RANK, ALPHA = 2, 3.0
EXACT = 1e-12


@pytest.fixture(scope="module")
def learner() -> Learner:
    """A 3-layer model in which embeddings, attention and norms ask for gradients too: 'earlier layers and inputs'."""
    model = tiny_llama(VOCAB, num_layers=LAYERS, mlp_bias=True).double()
    plan = ExpertPlan(LoraOptions(rank=RANK, alpha=ALPHA, dropout=0.0), ("shared", "dedicated"), OUTPUTS)
    learner = light_learner(model, plan)
    randomise(learner, scale=0.3)
    model.requires_grad_(True)
    for ffn in learner.ffns:
        ffn.ffn.requires_grad_(False)  # frozen: the pooled path runs through the down-projection by design
    model.train()
    return learner


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (N, S), position ids (N, S), and 1 at each token of a sequence (B, N * S)."""
    ids, places = torch.zeros(27, dtype=torch.long), torch.zeros(27, dtype=torch.long)
    weights = torch.zeros(NUM, 27, dtype=torch.float64)
    for index, (begin, end) in enumerate(SPANS):
        ids[begin:end] = torch.tensor(ragged([end - begin], VOCAB, seed=index)[0])
        places[begin:end] = torch.arange(end - begin)
        weights[index, begin:end] = 1
    return ids.view(3, 9), places.view(3, 9), weights


def game(**changes) -> AdversaryStep:
    """One micro-batch that is its whole global batch, with negatives; `changes` replace fields."""
    torch.manual_seed(5)
    sequences = 2 * NUM
    fields = {
        "pool": batch()[2],
        "row_weight": torch.ones(NUM),
        "class_index": 0,
        "num_classes": CLASSES,
        "scale": WEIGHT / (LAYERS * sequences),
        "negatives": Negatives(torch.randn(LAYERS, NUM, 48), torch.tensor([1, 2, 2, 1])),
    }
    return AdversaryStep(**(fields | changes))


def run(
    learner: Learner, step: AdversaryStep | None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gradients of everything with a plain sum over all logits as the loss; every layer's input; the logits."""
    ids, places, _ = batch()
    learner.model.zero_grad(set_to_none=True)
    for ffn in learner.ffns:
        ffn.adversary = step
    with recorded_inputs(learner) as inputs:
        logits = learner.forward(ids, None, torch.arange(ids.numel()), places)
    for ffn in learner.ffns:
        ffn.adversary = None
    torch.manual_seed(6)
    (logits * torch.randn_like(logits)).sum().backward()
    return gradients(dict(learner.model.named_parameters())), inputs, logits.detach()


def naive_cross_entropy(learner: Learner, layer: int, x: torch.Tensor, step: AdversaryStep) -> torch.Tensor:
    """Sum over sequences of -log p(class), z_s written out token by token; x is fixed; unused outputs do not exist."""
    ffn = learner.ffns[layer]
    pair = ffn.experts["ffn"]["shared"]

    def project(name, value):
        layer = getattr(ffn.ffn, name)
        delta = (ALPHA / RANK) * pair[name].lora_B @ pair[name].lora_A
        return value @ layer.weight.detach().T + layer.bias.detach() + value @ delta.T

    gate = project("gate_proj", x)
    z = project("down_proj", gate * torch.sigmoid(gate) * project("up_proj", x))
    pooled = [z.reshape(-1, z.shape[-1])[begin:end].mean(dim=0) for begin, end in SPANS]
    features = [(value, step.class_index, float(w)) for value, w in zip(pooled, step.row_weight, strict=True)]
    if step.negatives is not None:
        drawn = zip(
            step.negatives.features[layer].double(), step.negatives.classes.tolist(), step.row_weight, strict=True
        )
        features += [(value, cls, float(w)) for value, cls, w in drawn]
    total = 0
    for value, cls, weight in features:
        used = ffn.discriminator.weight[: step.num_classes] @ value + ffn.discriminator.bias[: step.num_classes]
        total = total - weight * (used[cls] - torch.log(torch.exp(used).sum()))
    return total


def naive_terms(learner: Learner, inputs: list[torch.Tensor], step: AdversaryStep, sequences: int):
    """d(mean CE)/d(parameter) for every shared-expert and discriminator parameter, by name; the mean CE."""
    mean = sum(naive_cross_entropy(learner, layer, x, step) for layer, x in enumerate(inputs)) / (LAYERS * sequences)
    names = {n: p for n, p in learner.model.named_parameters() if ".shared." in n or ".discriminator." in n}
    return dict(zip(names, torch.autograd.grad(mean, list(names.values())), strict=True)), mean.detach()


@pytest.mark.parametrize("negatives", [True, False], ids=["negatives", "no_negatives"])
def test_reversal_reaches_the_shared_expert_of_each_layer_only(learner, negatives):
    step = game() if negatives else game(negatives=None, scale=WEIGHT / (LAYERS * NUM))
    sequences = NUM * (2 if negatives else 1)
    without, inputs, plain_logits = run(learner, None)
    with_game, _, logits = run(learner, step)
    expected, mean = naive_terms(learner, inputs, step, sequences)
    assert torch.equal(logits, plain_logits)
    untouched = [name for name in without if name not in expected]
    # embeddings (the inputs), attention, norms, gates, dedicated experts: equal to the bit
    assert {"gate.weight", "dedicated", "embed_tokens", "q_proj"} <= {p for n in untouched for p in _parts(n)}
    assert all(torch.equal(without[name], with_game[name]) for name in untouched)
    shared = [name for name in expected if ".shared." in name]
    judges = [name for name in expected if ".discriminator." in name]
    assert len(shared) == 6 * LAYERS and len(judges) == 2 * LAYERS
    moved = {name: with_game[name] - without[name] for name in expected}
    assert largest_difference({n: moved[n] for n in shared}, {n: -WEIGHT * expected[n] for n in shared}) < EXACT
    assert largest_difference({n: moved[n] for n in judges}, {n: WEIGHT * expected[n] for n in judges}) < EXACT
    assert not any(without[name].any() for name in judges)
    assert all(moved[name].abs().max() > 1e-5 for name in expected)
    logged = torch.stack(step.cross_entropy).sum() / (LAYERS * sequences)
    assert abs(float(logged - mean)) < EXACT


def _parts(name: str) -> set[str]:
    return {part for part in ("gate.weight", "dedicated", "embed_tokens", "q_proj") if part in name}


def test_the_game_of_a_layer_does_not_depend_on_later_layers(learner):
    step = game()
    first, _, _ = run(learner, step)
    kept = learner.ffns[2].discriminator.weight.detach().clone()
    with torch.no_grad():
        learner.ffns[2].discriminator.weight.mul_(-3)
    second, _, _ = run(learner, game())
    with torch.no_grad():
        learner.ffns[2].discriminator.weight.copy_(kept)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.startswith("backbone.model.layers.2.mlp.") for name in changed)
    assert all(".shared." in name or ".discriminator." in name for name in changed)


def test_unused_outputs_neither_learn_nor_have_a_say(learner):
    first, _, _ = run(learner, game())
    for layer in range(LAYERS):
        prefix = f"backbone.model.layers.{layer}.mlp.discriminator"
        assert first[f"{prefix}.weight"][:CLASSES].abs().min() > 0
        assert not first[f"{prefix}.weight"][CLASSES:].any() and not first[f"{prefix}.bias"][CLASSES:].any()
    kept = [(p, p.detach().clone()) for ffn in learner.ffns for p in ffn.discriminator.parameters()]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter[CLASSES:] = 1e6
    second, _, _ = run(learner, game())
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_spare_rows_and_padding_do_not_matter(learner):
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    step = game(row_weight=weights)
    without, inputs, _ = run(learner, None)
    with_game, _, _ = run(learner, step)
    expected, _ = naive_terms(learner, inputs, step, 2 * NUM)
    shared = {name: with_game[name] - without[name] for name in expected if ".shared." in name}
    assert largest_difference(shared, {name: -WEIGHT * expected[name] for name in shared}) < EXACT
    other = game(row_weight=weights)
    other.negatives.features[:, [1, 3]] = 1e3
    other.negatives.classes[[1, 3]] = 2
    again, _, _ = run(learner, other)
    assert all(torch.equal(with_game[name], again[name]) for name in with_game)
    none, _, _ = run(learner, game(row_weight=torch.zeros(NUM)))
    assert all(torch.equal(none[name], without[name]) for name in none)


def test_under_dropout_the_game_reads_the_x_that_the_experts_read():
    plan = ExpertPlan(LoraOptions(rank=RANK, dropout=0.5), ("shared", "dedicated"), OUTPUTS)
    built = light_learner(tiny_llama(VOCAB, num_layers=1).double(), plan)
    randomise(built, scale=0.3)
    (ffn,) = built.ffns
    ffn.train()
    ids, _, pool = batch()
    x = torch.randn(*ids.shape, 48, dtype=torch.float64)
    step = game(negatives=None)
    ffn.pool, ffn.adversary = pool, step  # what is pooled for the prototype is proven against the formula elsewhere
    ffn(x)
    judge = ffn.discriminator
    logits = ffn.pooled @ judge.weight[:CLASSES].T + judge.bias[:CLASSES]
    expected = (torch.logsumexp(logits, dim=1) - logits[:, 0]).sum()
    assert abs(step.cross_entropy[0].item() - expected.item()) < EXACT


def test_attached_loss_counts_once_whatever_the_output_is_multiplied_by():
    parameter = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    value = torch.ones(3, requires_grad=True, dtype=torch.float64)
    out = AttachLoss.apply(value, 5 * parameter**2)
    assert torch.equal(out, value)
    (1000 * out.sum()).backward()
    assert parameter.grad.item() == 20.0 and value.grad.tolist() == [1000.0] * 3


def test_reversal_is_the_identity_whose_gradient_is_negated():
    value = torch.tensor([1.5, -2.0], requires_grad=True)
    out = GradientReversal.apply(value)
    assert torch.equal(out, value)
    (out * torch.tensor([3.0, 4.0])).sum().backward()
    assert value.grad.tolist() == [-3.0, -4.0]


def test_in_bfloat16_the_cross_entropy_is_computed_in_fp32():
    learner = light_learner(
        tiny_llama(VOCAB, num_layers=1).bfloat16(),
        ExpertPlan(LoraOptions(rank=RANK, dropout=0.0), ("shared", "dedicated"), OUTPUTS),
    )
    randomise(learner)
    judge = learner.ffns[0].discriminator
    pooled = torch.randn(2, 48).bfloat16()
    step = AdversaryStep(torch.eye(2), torch.ones(2), 1, CLASSES, 1.0)
    loss = judge.loss(pooled, step, 0)
    logits = pooled.float() @ judge.weight.float().T + judge.bias.float()
    expected = F.cross_entropy(logits[:, :CLASSES], torch.tensor([1, 1]), reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-5

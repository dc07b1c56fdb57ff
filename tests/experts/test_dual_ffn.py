"""The expert FFN against two whole FFNs computed one after the other, in fp64 (METHODS section 1)."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pipeline.experts.attach import ExpertPlan, lora_experts
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.lora import LoraOptions
from tests.helpers import largest_difference

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROLES = ("shared", "dedicated")
WIDTH, FFN_WIDTH, RANK, ALPHA = 14, 23, 3, 5.0  # awkward on purpose
TOLERANCE = 1e-10
SPANS = (
    (0, 7),
    (7, 11),
    (11, 12),
    (14, 19),
)  # flattened places of four sequences packed into three rows of seven tokens


def build(
    projections: tuple[str, ...] = PROJECTIONS,
    *,
    roles: tuple[str, ...] = ROLES,
    bias: bool = False,
    dropout: float = 0.0,
    frozen: bool = True,
) -> ExpertFFN:
    """An fp64 expert FFN in which no parameter is zero; with a network that is not `frozen`, plain autograd runs."""
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=FFN_WIDTH, num_attention_heads=1, mlp_bias=bias)
    options = LoraOptions(rank=RANK, alpha=ALPHA, dropout=dropout)
    ffn = ExpertFFN(LlamaMLP(config).double(), "mlp", None, None)
    experts = lora_experts(ffn.ffn, list(projections), ExpertPlan(options, roles), None, 0)
    ffn.attach(0, roles, {"": experts}, options, 0, WIDTH)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ffn.ffn.requires_grad_(not frozen)
    return ffn.train()


def inputs() -> torch.Tensor:
    """x (N, S, D) that asks for its gradient."""
    torch.manual_seed(2)
    return torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)


def pool_weights() -> torch.Tensor:
    """1 at each token of a sequence, (B, N * S)."""
    weights = torch.zeros(len(SPANS), 21, dtype=torch.float64)
    for row, (begin, end) in enumerate(SPANS):
        weights[row, begin:end] = 1
    return weights


def naive_mean(states: torch.Tensor) -> torch.Tensor:
    """The mean over each sequence's tokens, (N, S, D) -> (B, D)."""
    flat = states.reshape(-1, states.shape[-1])
    return torch.stack([flat[begin:end].mean(dim=0) for begin, end in SPANS])


def adapted(ffn: ExpertFFN, role: str | None, name: str, x: torch.Tensor, low: torch.Tensor | None = None):
    """W x + b + (alpha / r) B A x for one projection, as the formula has it; `low` is what A reads, if not x."""
    layer = getattr(ffn.ffn, name)
    out = x @ layer.weight.T
    if layer.bias is not None:
        out = out + layer.bias
    if role is not None and name in ffn.experts["ffn"][role]:
        pair = ffn.experts["ffn"][role][name]
        delta = pair.lora_B @ pair.lora_A  # (out, in), the product written out
        out = out + (ALPHA / RANK) * ((x if low is None else low) @ delta.T)
    return out


def naive_hidden(ffn: ExpertFFN, role: str | None, x: torch.Tensor, low: torch.Tensor | None = None) -> torch.Tensor:
    gate = adapted(ffn, role, "gate_proj", x, low)
    return gate * torch.sigmoid(gate) * adapted(ffn, role, "up_proj", x, low)


def naive_output(ffn: ExpertFFN, role: str | None, x: torch.Tensor) -> torch.Tensor:
    """z_e = W_down h_e + L_down,e h_e of a whole FFN of its own."""
    return adapted(ffn, role, "down_proj", naive_hidden(ffn, role, x))


def naive_gate(ffn: ExpertFFN, x: torch.Tensor) -> torch.Tensor:
    scores = torch.exp(x @ ffn.gate.weight.T)
    return scores / scores.sum(dim=-1, keepdim=True)


def naive_mixture(ffn: ExpertFFN, x: torch.Tensor) -> torch.Tensor:
    """y = beta_s z_s + beta_t z_t."""
    beta = naive_gate(ffn, x)
    return sum(beta[..., i : i + 1] * naive_output(ffn, role, x) for i, role in enumerate(ROLES))


def all_gradients(ffn: ExpertFFN, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all that asks for one, and of the input, under one fixed random cotangent."""
    torch.manual_seed(3)
    names = {name: p for name, p in ffn.named_parameters() if p.requires_grad} | {"input": x}
    grads = torch.autograd.grad(out, list(names.values()), torch.randn_like(out), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(names.items(), grads, strict=True)
    }


TARGETS = [
    PROJECTIONS,
    ("gate_proj",),
    ("up_proj",),
    ("down_proj",),
    ("gate_proj", "up_proj"),
    ("up_proj", "down_proj"),
]


@pytest.mark.parametrize("frozen", [True, False], ids=["kernel", "plain"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("projections", TARGETS, ids="+".join)
def test_output_and_every_gradient_equal_two_whole_ffns_and_the_gate(projections, bias, frozen):
    ffn = build(projections, bias=bias, frozen=frozen)
    x = inputs()
    ours, theirs = ffn(x), naive_mixture(ffn, x)
    assert (ours - theirs).abs().max() < TOLERANCE
    got, expected = all_gradients(ffn, x, ours), all_gradients(ffn, x, theirs)
    assert largest_difference(got, expected) < TOLERANCE
    assert all(grad.abs().max() > 1e-3 for grad in expected.values())  # nothing is equal by being zero


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_speaks_alone_is_its_own_ffn_without_the_gate(role, bias):
    ffn = build(bias=bias)
    ffn.active = (role,)
    x = inputs()
    ours, theirs = ffn(x), naive_output(ffn, role, x)
    assert (ours - theirs).abs().max() < TOLERANCE
    got = all_gradients(ffn, x, ours)
    assert largest_difference(got, all_gradients(ffn, x, theirs)) < TOLERANCE
    silent = [
        grad for name, grad in got.items() if name == "gate.weight" or f"experts.ffn.{ROLES[role == ROLES[0]]}" in name
    ]
    assert len(silent) == 7 and not any(grad.any() for grad in silent)


def test_an_ffn_of_one_role_has_no_gate_and_equals_the_plain_adapter():
    ffn = build(roles=("adapter",), bias=True)
    assert not hasattr(ffn, "gate")
    x = inputs()
    ours, theirs = ffn(x), naive_output(ffn, "adapter", x)
    assert (ours - theirs).abs().max() < TOLERANCE
    assert largest_difference(all_gradients(ffn, x, ours), all_gradients(ffn, x, theirs)) < TOLERANCE


def test_without_a_role_the_frozen_ffn_speaks_to_the_bit():
    ffn = build(bias=True)
    ffn.active = ()
    x = inputs()
    assert torch.equal(ffn(x), ffn.ffn(x))


def test_with_b_zero_any_gate_gives_the_frozen_ffn():
    ffn = build(bias=True)
    with torch.no_grad():
        for role in ROLES:
            for pair in ffn.experts["ffn"][role].values():
                pair.lora_B.zero_()
    x = inputs()
    assert (ffn(x) - ffn.ffn(x)).abs().max() < TOLERANCE


def test_merging_the_product_into_the_weights_gives_the_same_expert():
    ffn = build()
    x = inputs()
    for role in ROLES:
        merged = {
            name: getattr(ffn.ffn, name).weight
            + (ALPHA / RANK) * ffn.experts["ffn"][role][name].lora_B @ ffn.experts["ffn"][role][name].lora_A
            for name in PROJECTIONS
        }
        hidden = F.silu(x @ merged["gate_proj"].T) * (x @ merged["up_proj"].T)
        ffn.active = (role,)
        assert (ffn(x) - hidden @ merged["down_proj"].T).abs().max() < TOLERANCE


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("projections", TARGETS, ids="+".join)
def test_pooled_z_s_and_its_gradients_equal_the_mean_of_the_shared_ffn(projections, bias):
    ffn = build(projections, bias=bias)
    x = inputs()
    ffn.pool = pool_weights()
    ffn(x)
    theirs = naive_mean(naive_output(ffn, "shared", x))
    assert (ffn.pooled - theirs).abs().max() < TOLERANCE
    got, expected = all_gradients(ffn, x, ffn.pooled), all_gradients(ffn, x, theirs)
    shared = {name for name in got if name.startswith("experts.ffn.shared.")}
    assert len(shared) == 2 * len(projections)
    assert largest_difference({n: got[n] for n in shared}, {n: expected[n] for n in shared}) < TOLERANCE
    # x, a and b are detached: nothing else that is trained is on the pooled path
    trained = {name for name in got if not name.startswith("ffn.")} - shared
    assert len(trained) == 2 * len(projections) + 2 and not any(got[name].any() for name in trained)


def test_dropout_draws_one_mask_on_x_for_all_stacked_products_and_one_on_each_h():
    ffn = build(dropout=0.4)
    x = inputs()
    ffn.pool = pool_weights()
    torch.manual_seed(11)
    ours = ffn(x)
    torch.manual_seed(11)  # the same draws in the order of the formulas: x, h_s, h_t
    kept_x = F.dropout(torch.ones_like(x), 0.4)
    kept_h = [F.dropout(torch.ones(*x.shape[:2], FFN_WIDTH, dtype=torch.float64), 0.4) for _ in ROLES]
    assert 0 < int((kept_x == 0).sum()) < kept_x.numel() and not torch.equal(*kept_h)
    beta = naive_gate(ffn, x)
    theirs = 0
    for i, role in enumerate(ROLES):
        hidden = naive_hidden(ffn, role, x, x * kept_x)
        theirs = theirs + beta[..., i : i + 1] * adapted(ffn, role, "down_proj", hidden, hidden * kept_h[i])
    assert (ours - theirs).abs().max() < TOLERANCE
    assert largest_difference(all_gradients(ffn, x, ours), all_gradients(ffn, x, theirs)) < TOLERANCE
    # the pooled path reads the same dropped x and drops no h
    z_s = adapted(ffn, "shared", "down_proj", naive_hidden(ffn, "shared", x, x * kept_x))
    assert (ffn.pooled - naive_mean(z_s)).abs().max() < TOLERANCE


def test_dropout_is_off_in_evaluation():
    ffn = build(dropout=0.4).eval()
    x = inputs()
    assert (ffn(x) - naive_mixture(ffn, x)).abs().max() < TOLERANCE


def test_an_input_without_gradient_gets_one_in_training_alone():
    # ZeRO-3 collects a leaf module's gradients when that of its input is there
    ffn = build()
    seen = []
    ffn.register_forward_hook(lambda _, args, out: seen.append(args[0].requires_grad))
    x = inputs().detach()
    ours = ffn(x)
    assert (ours - naive_mixture(ffn, x)).abs().max() < TOLERANCE
    with torch.no_grad():
        ffn(x)
    ffn.eval()(x)
    assert seen == [True, False, False]
    assert not x.requires_grad

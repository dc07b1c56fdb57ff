"""The SwiGLU with its own backward pass against the same in plain autograd, in fp64."""

import pytest
import torch
from torch import nn

from pipeline.experts import passes_torch
from pipeline.experts.kernel import MixedSwiglu
from pipeline.experts.lora import LoraExpert, LoraPair
from pipeline.experts.segment import Frozen, Shape
from pipeline.experts.swiglu import plain_mixed

WIDTH, FFN_WIDTH, RANK, ROWS = 13, 17, 3, 4
TARGETS = [("gate_proj", "up_proj", "down_proj"), ("gate_proj",), ("up_proj", "down_proj"), ("down_proj",)]
COUNTS = {"dense": None, "routed": (5, 0, 40, 1), "no_token": (0, 0, 0, 0)}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(counts, targeted, num_experts: int, biases: bool):
    """Weights, LoRA experts and inputs of one mixed SwiGLU."""
    torch.manual_seed(0)
    stack = () if counts is None else (len(counts),)
    tokens = 46 if counts is None else sum(counts)
    shapes = {"gate_proj": (FFN_WIDTH, WIDTH), "up_proj": (FFN_WIDTH, WIDTH), "down_proj": (WIDTH, FFN_WIDTH)}
    experts = [
        LoraExpert({name: LoraPair((*stack, *shapes[name]), RANK, torch.float64, "cpu") for name in targeted})
        for _ in range(num_experts)
    ]
    for expert in experts:
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.5)
    if counts is None:
        bias = [drawn(FFN_WIDTH), drawn(FFN_WIDTH)] if biases else [None, None]
        frozen = Frozen(drawn(FFN_WIDTH, WIDTH), drawn(FFN_WIDTH, WIDTH), drawn(WIDTH, FFN_WIDTH), *bias)
    else:
        frozen = Frozen(drawn(*stack, 2 * FFN_WIDTH, WIDTH), None, drawn(*stack, WIDTH, FFN_WIDTH))
    x = drawn(tokens, WIDTH).requires_grad_()
    beta = torch.rand(tokens, num_experts, dtype=torch.float64).requires_grad_() if num_experts > 1 else None
    slot, share = torch.randint(ROWS, (tokens,)), torch.rand(tokens, dtype=torch.float64)
    return frozen, experts, x, beta, slot, share


def gradients(outputs, wanted):
    torch.manual_seed(1)
    return torch.autograd.grad(
        sum((out * drawn(*out.shape)).sum() for out in outputs), wanted, allow_unused=True, retain_graph=True
    )


@pytest.mark.parametrize("pooled_rows", [0, ROWS], ids=["not_pooled", "pooled"])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain_x", "dropped_x"])
@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("targeted", TARGETS, ids="+".join)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_every_gradient_equal_plain_autograd(
    counts, targeted, num_experts, dropout, pooled_rows, monkeypatch
):
    monkeypatch.setattr(passes_torch, "BLOCK_BYTES", 1)  # blocks of the least size: several in a segment
    frozen, experts, x, beta, slot, share = case(counts, targeted, num_experts, biases=dropout)
    dropped = x * torch.bernoulli(torch.full_like(x, 0.7)) / 0.7 if dropout else None
    shape = Shape(counts, 1.7, targeted, num_experts, 0.0, pooled_rows, num_experts - 1)
    lora = [p for expert in experts for name in targeted for p in (expert[name].lora_A, expert[name].lora_B)]
    wanted = [x, *([] if beta is None else [beta]), *lora]
    theirs = plain_mixed(shape, nn.functional.silu, x, dropped, beta, slot, share, frozen, experts)
    ours = MixedSwiglu.apply(shape, x, dropped, beta, slot, share, *frozen, *lora)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and torch.allclose(mine, other, rtol=0, atol=1e-11)
    for mine, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if other is None else other, rtol=0, atol=1e-10)


def test_dropout_on_h_is_seen_by_the_low_rank_down_projection_alone_and_by_its_gradient():
    frozen, experts, x, beta, *_ = case(None, ("down_proj",), 2, biases=False)
    lora = [p for expert in experts for p in expert["down_proj"].parameters()]
    shape = Shape(None, 1.3, ("down_proj",), 2, 0.4, 0)
    torch.manual_seed(5)
    y, _ = MixedSwiglu.apply(shape, x, None, beta, None, None, *frozen, *lora)
    torch.manual_seed(5)
    keep = x.new_empty(2, len(x), FFN_WIDTH).bernoulli_(0.6) / 0.6
    h = nn.functional.silu(x @ frozen.gate.T) * (x @ frozen.up.T)
    expected = h @ frozen.down.T * beta.sum(dim=1, keepdim=True)
    for e, expert in enumerate(experts):
        pair = expert["down_proj"]
        expected = expected + 1.3 * (h * beta[:, e : e + 1] * keep[e]) @ pair.lora_A.T @ pair.lora_B.T
    assert torch.allclose(y, expected, rtol=0, atol=1e-11)
    for mine, other in zip(gradients([y], [x, beta, *lora]), gradients([expected], [x, beta, *lora]), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-10)


def test_what_is_kept_for_backward_is_two_ffn_wide_tensors():
    frozen, experts, x, beta, slot, share = case(None, TARGETS[0], 2, biases=False)
    lora = [p for expert in experts for name in TARGETS[0] for p in (expert[name].lora_A, expert[name].lora_B)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        MixedSwiglu.apply(Shape(None, 1.0, TARGETS[0], 2, 0.0, ROWS), x, None, beta, slot, share, *frozen, *lora)
    given = {tensor.data_ptr() for tensor in [*frozen[:3], *lora]}
    wide = [tensor for tensor in kept if tensor.shape == (len(x), FFN_WIDTH) and tensor.data_ptr() not in given]
    assert len(wide) == 2


def test_in_bfloat16_gradients_are_summed_in_fp32():
    frozen, experts, x, beta, *_ = case(None, TARGETS[0], 2, biases=False)
    lora = [p for expert in experts for name in TARGETS[0] for p in (expert[name].lora_A, expert[name].lora_B)]
    exact = gradients(
        MixedSwiglu.apply(Shape(None, 1.0, TARGETS[0], 2, 0.0, 0), x, None, beta, None, None, *frozen, *lora)[:1], lora
    )
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in (x, beta, *lora)]
    narrow = [None if t is None else t.bfloat16() for t in frozen]
    torch.manual_seed(1)
    y, _ = MixedSwiglu.apply(
        Shape(None, 1.0, TARGETS[0], 2, 0.0, 0), low[0], None, low[1], None, None, *narrow, *low[2:]
    )
    found = torch.autograd.grad((y * drawn(*y.shape).bfloat16()).sum(), low[2:])
    for mine, other in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - other).norm() < 0.03 * other.norm()

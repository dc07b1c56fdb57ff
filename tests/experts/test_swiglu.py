"""The grouped linear map against one product a token, in fp64."""

import pytest
import torch

from pipeline.experts.swiglu import GroupedLinear


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 0, 6], [6, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_token_goes_through_its_own_experts_weight(counts, frozen):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=not frozen)
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = torch.zeros(len(x), 3, dtype=torch.float64)
    for token, expert in enumerate(experts):
        expected = expected.index_copy(0, torch.tensor([token]), (weight[expert] @ x[token])[None])
    cotangent = torch.randn_like(expected)
    wanted = [x] if frozen else [x, weight]
    y = GroupedLinear(counts)(x, weight)
    assert torch.allclose(y, expected, rtol=0, atol=1e-14)
    ours = torch.autograd.grad(y, wanted, cotangent)
    if not experts:
        assert all(not grad.any() for grad in ours)
        return
    theirs = torch.autograd.grad(expected, wanted, cotangent)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


def test_a_frozen_weight_is_kept_itself_and_its_input_is_not():
    x = torch.randn(4, 5, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(2, 3, 5), requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        GroupedLinear([1, 3])(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]
    assert kept[0].shape == weight.shape

"""The fused passes of a CPU against torch's operations in fp64, and the parts of their loops against torch."""

import threading

import numpy as np
import pytest
import torch
from numba import njit

from pipeline.experts import cpu_kernels, kernel, passes_cpu
from pipeline.experts.kernel import MixedSwiglu
from pipeline.experts.segment import Frozen, Shape

ALL = ("gate_proj", "up_proj", "down_proj")
WIDTH, FFN_WIDTH = 24, 520  # one chunk of columns and a rest
ROWS = 4  # pooled
COUNTS = {"dense": None, "routed": (37, 0, 90, 1)}


@pytest.fixture(autouse=True)
def fused_takes_any_width_of_this_file(monkeypatch):
    """`passes` shows which were taken, so that no test compares the same with the same."""
    taken = []
    whole = kernel._passes
    monkeypatch.setattr(kernel, "_passes", lambda x, width: taken.append(type(found := whole(x, width))) or found)
    return taken


def given(counts, targeted, num_experts, rank, dtype, tokens=128):
    """(frozen, lora, x, beta, slot, share) of a mixed SwiGLU in fp64, rounded to `dtype`, at the scale of a network."""
    torch.manual_seed(0)
    stack = () if counts is None else (len(counts),)
    tokens = tokens if counts is None else sum(counts)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(dtype).double()

    def weight(out: int, into: int) -> torch.Tensor:
        return drawn(*stack, out, into, scale=into**-0.5)

    frozen = Frozen(weight(FFN_WIDTH, WIDTH), weight(FFN_WIDTH, WIDTH), weight(WIDTH, FFN_WIDTH))
    if counts is not None:
        frozen = Frozen(torch.cat(frozen[:2], dim=1), None, frozen.down)
    sizes = {"gate_proj": (FFN_WIDTH, WIDTH), "up_proj": (FFN_WIDTH, WIDTH), "down_proj": (WIDTH, FFN_WIDTH)}
    lora = []
    for _ in range(num_experts):
        for name in targeted:
            out, into = sizes[name]
            lora += [weight(rank, into), drawn(*stack, out, rank, scale=0.3)]
    beta = torch.softmax(drawn(tokens, num_experts), dim=1).to(dtype).double() if num_experts > 1 else None
    return frozen, lora, drawn(tokens, WIDTH), beta, torch.randint(ROWS, (tokens,)), torch.rand(tokens) / 16


def run(shape, dtype, frozen, lora, x, beta, slot, share, dropped=None):
    """Outputs, and the gradients of their weighed sum for x, beta and every LoRA weight."""
    cast = [None if t is None else t.to(dtype).requires_grad_() for t in (x, dropped, beta, *lora)]
    fixed = [None if t is None else t.to(dtype) for t in frozen]
    torch.manual_seed(1)
    outputs = MixedSwiglu.apply(shape, *cast[:3], slot, share.to(dtype), *fixed, *cast[3:])
    torch.manual_seed(2)
    above = [torch.randn(out.shape).to(torch.bfloat16).to(dtype) for out in outputs]
    wanted = [t for t in cast if t is not None]
    loss = sum((out * grad).sum() for out, grad in zip(outputs, above, strict=True))
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


def compare(found, exact, tolerance: float) -> None:
    for mine, other in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
        assert mine.shape == other.shape
        assert (mine.double() - other).norm() <= tolerance * max(other.norm(), 1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pooled_rows", [0, ROWS], ids=["not_pooled", "pooled"])
@pytest.mark.parametrize("targeted", [ALL, ("gate_proj",), ("up_proj", "down_proj"), ("down_proj",)], ids="+".join)
@pytest.mark.parametrize("num_experts, rank", [(1, 8), (2, 8), (3, 3), (2, 19)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_every_gradient_equal_fp64(
    counts, num_experts, rank, targeted, pooled_rows, dtype, tolerance, fused_takes_any_width_of_this_file
):
    inputs = given(counts, targeted, num_experts, rank, dtype)
    shape = Shape(counts, 1.7, targeted, num_experts, 0.0, pooled_rows, num_experts - 1, sums_to_one=num_experts == 2)
    dropped = inputs[2] * torch.bernoulli(torch.full_like(inputs[2], 0.5)) * 2 if rank == 3 else None
    found = run(shape, dtype, *inputs, dropped=dropped)
    exact = run(shape, torch.float64, *inputs, dropped=dropped)
    compare(found, exact, tolerance)
    fused, plain = passes_cpu.CpuPasses, kernel.TorchPasses
    assert fused_takes_any_width_of_this_file == [fused, fused, plain, plain]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_dropout_on_h_is_seen_by_the_low_rank_down_projection_alone(dtype, tolerance, monkeypatch):
    inputs = given(None, ALL, 2, 8, dtype)
    noise = torch.bernoulli(torch.full((2, 128, FFN_WIDTH), 0.5)) * 2
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.copy_(noise * p))  # the same in each dtype
    shape = Shape(None, 1.3, ALL, 2, 0.5, ROWS)
    compare(run(shape, dtype, *inputs), run(shape, torch.float64, *inputs), tolerance)


@pytest.mark.parametrize("tokens", [0, 1, 7, 31, 33])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_tokens_and_threads(tokens, threads):
    inputs = given(None, ALL, 2, 8, torch.float32, tokens)
    shape = Shape(None, 1.0, ALL, 2, 0.0, ROWS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(run(shape, torch.float32, *inputs), run(shape, torch.float64, *inputs), 3e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so_for_its_token_and_no_other(bad, dtype):
    frozen, lora, x, beta, slot, share = given(None, ALL, 2, 8, dtype)
    x[5, 0] = bad
    (y, _), (dx, *_, grad_b) = run(Shape(None, 1.0, ALL, 2, 0.0, 0), dtype, frozen, lora, x, beta, slot, share)
    others = torch.arange(len(x)) != 5
    assert not y[5].isfinite().all() and y[others].isfinite().all()
    assert not dx[5].isfinite().all() and dx[others].isfinite().all()
    assert not grad_b.isfinite().all()  # a step of such a batch is seen, and skipped


@njit
def store_all(out, values):
    for place in range(values.size):
        cpu_kernels._store(out, place, values[place])


@njit
def sigmoids(values):
    for place in range(values.size):
        values[place] = cpu_kernels._sigmoid(values[place])


def test_sigmoid():
    values = torch.cat([torch.linspace(-80, 80, 100_001), torch.tensor([-1e38, -200.0, -0.0, 0.0, 200.0, 1e38])])
    found = values.clone()
    sigmoids(found.numpy())
    exact = torch.sigmoid(values.double())
    assert ((found - exact).abs() <= 5e-7 * exact + 1e-37).all()


def test_bf16_is_rounded_as_torch_rounds_it():
    bits = np.arange(1 << 32, step=65537 // 8, dtype=np.uint32)  # every exponent and sign, ties among them
    values = np.concatenate([bits, (bits & 0xFFFF0000) | 0x8000]).view(np.float32)
    found = np.empty(values.size, np.uint16)
    store_all(found, values)
    expected = torch.from_numpy(values).bfloat16()
    mine = torch.from_numpy(found).view(torch.bfloat16)
    assert torch.equal(mine.isnan(), expected.isnan())
    assert torch.equal(mine[~mine.isnan()].view(torch.int16), expected[~mine.isnan()].view(torch.int16))


def test_a_wide_network_in_fp64_and_a_narrow_one_take_torchs_operations():
    assert isinstance(kernel._passes(torch.zeros(1, dtype=torch.float64), 4096), kernel.TorchPasses)
    assert isinstance(kernel._passes(torch.zeros(1), kernel.FUSED_FROM - 1), kernel.TorchPasses)
    assert isinstance(kernel._passes(torch.zeros(1, device="meta"), 4096), kernel.TorchPasses)


def test_work_is_shared_by_torchs_own_threads():
    assert passes_cpu.torchs_openmp() is not None, "torch brought another OpenMP: cuts run one after another"
    started, seen = threading.Barrier(2, timeout=30), set()

    def work(thread, start, stop):
        started.wait()  # passes only where both run at once
        seen.add((thread, start, stop, threading.get_native_id()))

    passes_cpu._run(work, [(0, 8), (8, 11)])
    assert {entry[:3] for entry in seen} == {(0, 0, 8), (1, 8, 11)}
    assert len({entry[3] for entry in seen}) == 2


def test_what_fails_in_a_thread_fails_the_pass():
    def work(thread, start, stop):
        if thread:
            raise ValueError("of the second thread")

    with pytest.raises(ValueError, match="of the second thread"):
        passes_cpu._run(work, [(0, 8), (8, 11)])


def test_cuts_are_whole_turns_and_leave_nothing_out():
    for size in (0, 1, 15, 16, 31, 32, 33, 100, 1217):
        cuts = passes_cpu._cuts(size)
        assert [place for start, stop in cuts for place in range(start, stop)] == list(range(size))
        assert all(start % cpu_kernels.TOKENS == 0 for start, _ in cuts)

"""The passes over FFN-wide tensors on a CPU, fused: every element is read once forward and once backward, and all that
the LoRA experts do to it happens in fp32 registers (cpu_kernels.py, compiled by numba and kept on disk).

Same methods as passes_torch.py, which tests/experts/test_kernel.py holds them against.

Legend: C tokens of the segment, F FFN width, R LoRA rank (padded to a multiple of `cpu_kernels.RANKS`), n LoRA
experts, P pooled rows.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from pipeline.experts import cpu_kernels
from pipeline.experts.segment import Backward, Segment, Sums

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TOKENS_A_THREAD = 16  # fewer are not worth waking a thread


class CpuPasses:
    """Between the frozen matmuls: what the LoRA experts do to a and b, forward and backward. bf16 and fp32."""

    def forward(self, segment: Segment, low_down: torch.Tensor | None, means: torch.Tensor | None) -> torch.Tensor:
        """As `TorchPasses.forward`."""
        mixed = torch.empty_like(segment.a)
        shape, size, width = segment.shape, *mixed.shape
        given = _Given(segment)
        raw = torch.zeros(given.rows, shape.num_experts, given.rank)
        cuts = _cuts(size)
        pooled = torch.zeros(len(cuts), 0 if means is None else shape.pooled_rows, width)
        _run(
            lambda thread, start, stop: cpu_kernels.forward(
                start, stop, *given.arrays(), _array(mixed), raw.view(-1).numpy(), pooled[thread].numpy()
            ),
            cuts,
        )
        if means is not None:
            means += pooled.sum(dim=0)
        if low_down is not None:
            low_down.copy_((raw * given.beta.unsqueeze(-1))[:size, :, : segment.part.rank].flatten(1))
        return mixed

    def backward(
        self,
        segment: Segment,
        dmixed: torch.Tensor,
        dlow_down: torch.Tensor | None,
        dmeans: torch.Tensor | None,
        dbeta: torch.Tensor | None,
        sums: Sums,
    ) -> Backward:
        """As `TorchPasses.backward`."""
        shape, part = segment.shape, segment.part
        size, width = dmixed.shape
        given = _Given(segment)
        n, rank = shape.num_experts, given.rank
        da, db = torch.empty_like(dmixed), torch.empty_like(dmixed)
        below = torch.zeros(given.rows, n, rank)
        if dlow_down is not None:
            below[:size, :, : part.rank] = dlow_down.view(size, n, part.rank)
        dlow, dpooled = torch.zeros(given.rows, n, 2, rank), torch.zeros(given.rows, 2, rank)
        dweigh = torch.zeros(given.rows, n)
        above = torch.zeros(0, width) if dmeans is None else dmeans.float()
        cuts = _cuts(size)
        dweights = torch.empty(len(cuts), n, 3, rank, width)
        gradients_above = tuple(map(_array, (dmixed, below.view(-1), above)))
        gradients = tuple(map(_array, (da, db, dlow.view(-1), dpooled.view(-1), dweigh)))
        _run(
            lambda thread, start, stop: cpu_kernels.backward(
                start, stop, *given.arrays(), gradients_above, (*gradients, dweights[thread].numpy())
            ),
            cuts,
        )
        total = dweights.sum(dim=0) if len(cuts) > 1 else dweights[0]
        for e in range(n):
            for place, name in enumerate(PROJECTIONS):
                if name in shape.targeted:
                    sums.add(e, name, int(name != "down_proj"), part.expert, total[e, place, : part.rank])
        if dbeta is not None:
            dbeta.copy_(dweigh[:size])
        if segment.low_in is None:
            return Backward(da, db, None, None)
        dlow_in, dlow_pooled = torch.empty_like(segment.low_in), None
        if dmeans is not None:
            dlow_pooled = torch.zeros_like(segment.low_in)
        for place, (e, name) in enumerate(shape.inward):
            columns, source = part.columns(place), PROJECTIONS.index(name)
            dlow_in[:, columns] = dlow[:size, e, source, : part.rank].mul_(shape.scaling)
            if dlow_pooled is not None and e == shape.shared:
                dlow_pooled[:, columns] = dpooled[:size, source, : part.rank].mul_(shape.scaling)
        return Backward(da, db, dlow_in, dlow_pooled)


class _Given:
    """What both kernels read, as arrays: projections without a pair have zeros, and so have the ranks of padding."""

    def __init__(self, segment: Segment) -> None:
        shape, part = segment.shape, segment.part
        self.segment = segment
        size, width = segment.a.shape
        self.rank = -(-part.rank // cpu_kernels.RANKS) * cpu_kernels.RANKS
        self.rows = -(-size // cpu_kernels.TOKENS) * cpu_kernels.TOKENS
        self.low = torch.zeros(self.rows, shape.num_experts, 2, self.rank)
        for place, (e, name) in enumerate(shape.inward):
            self.low[:size, e, PROJECTIONS.index(name), : part.rank] = segment.low_in[:, part.columns(place)]
        self.weights = torch.zeros(shape.num_experts, 3, self.rank, width)  # B_gate^T, B_up^T, A_down
        for e, pairs in enumerate(part.pairs):
            for name, (lora_a, lora_b) in pairs.items():
                factor = lora_a if name == "down_proj" else lora_b.T
                self.weights[e, PROJECTIONS.index(name), : part.rank] = factor
        self.beta = self._padded(torch.ones(size, 1) if segment.beta is None else segment.beta)
        self.slot = torch.zeros(0, dtype=torch.int64) if segment.slot is None else segment.slot
        self.share = self._padded(torch.zeros(0) if segment.share is None else segment.share)
        self.noise = segment.a.new_zeros(0, 0, 0) if segment.noise is None else segment.noise.contiguous()

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        """One row a token, in fp32, with zeros for the tokens that fill the last turn of the kernels."""
        padded = torch.zeros(self.rows, *values.shape[1:])
        padded[: len(values)] = values
        return padded

    def arrays(self) -> tuple:
        """The arguments of both kernels after `start` and `stop`."""
        floats = map(_array, (self.segment.a, self.segment.b, self.low.view(-1), self.weights, self.beta, self.noise))
        return *floats, self.slot.numpy(), self.share.numpy(), self.segment.shape.shared


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The same memory; the bits of bf16, which numpy does not know."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def _cuts(size: int) -> list[tuple[int, int]]:
    """Runs of tokens, one a thread, as equal as whole turns of the kernels allow."""
    turns = -(-size // cpu_kernels.TOKENS)
    parts = max(1, min(torch.get_num_threads(), size // TOKENS_A_THREAD))
    edges = [min(size, turns * part // parts * cpu_kernels.TOKENS) for part in range(parts + 1)]
    return list(pairwise(edges))


def _run(call: Callable[[int, int, int], None], cuts: list[tuple[int, int]]) -> None:
    """`call` for each cut at the same time, on the threads that torch's own operations use: theirs go on spinning
    for milliseconds after an operation, and threads beside them would wait for a core. Kernels release the interpreter.
    """
    if len(cuts) == 1:
        call(0, *cuts[0])
        return
    openmp = torchs_openmp()
    failures: list[BaseException] = []

    def work(_data) -> None:
        try:
            thread = openmp.omp_get_thread_num()
            for mine in range(thread, len(cuts), openmp.omp_get_num_threads()):  # a team may be smaller than asked for
                call(mine, *cuts[mine])
        except BaseException as error:
            failures.append(error)

    openmp.GOMP_parallel(_Work(work), None, len(cuts), 0)
    if failures:
        raise failures[0]


_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def torchs_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch brought into this process, if it is one that has GNU's entry points."""
    library = ctypes.CDLL(None)
    try:
        library.GOMP_parallel.argtypes = [_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except AttributeError:
        return None
    return library

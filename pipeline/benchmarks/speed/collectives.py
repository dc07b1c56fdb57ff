"""What DeepSpeed hands to its collectives on this rank: bytes, calls and time, counted where they leave DeepSpeed."""

import time
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch.distributed import ProcessGroup

_NAMES = ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter", "all_reduce", "reduce")
_TENSORS = ("output_tensor", "tensor_list", "output", "input_tensor", "tensor", "input_list")  # outputs first
_SCALARS = 16  # bytes: a norm or a flag, no gradient
KINDS = ("gather", "reduce", "scalar")


class Collectives:
    """Counts inside its context. `probing` also has every collective run at once, after all ranks have come to it.

    A probed step is slower; it tells time on the wire from time in which this rank waits for another.
    """

    def __init__(self) -> None:
        self._backend = deepspeed.comm.comm.cdb
        self.probing = False
        self._stock: dict[str, Callable[..., Any]] = {}
        self._counts: dict[str, float] = {}
        self.taken()

    def __enter__(self) -> "Collectives":
        self._stock = {name: getattr(self._backend, name) for name in _NAMES}
        for name, stock in self._stock.items():
            setattr(self._backend, name, self._counted(name, stock))
        return self

    def __exit__(self, *_: object) -> None:
        for name, stock in self._stock.items():
            setattr(self._backend, name, stock)

    def taken(self) -> dict[str, float]:
        """What was counted since last taken: of each kind `<kind>_bytes` (received by gathers, handed to reductions),
        `<kind>_calls` and `<kind>_seconds` in the call and its wait; `waiting_seconds` before probed collectives."""
        counts = self._counts
        self._counts = {f"{kind}_{what}": 0 for kind in KINDS for what in ("bytes", "calls", "seconds")}
        self._counts["waiting_seconds"] = 0.0
        return counts

    def _counted(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            given = [*positional, *(named[key] for key in _TENSORS if key in named)]
            kind, amount = _amount(name, [_bytes(value) for value in given if isinstance(value, (torch.Tensor, list))])
            self._counts[f"{kind}_bytes"] += amount
            self._counts[f"{kind}_calls"] += 1
            if self.probing:
                begin = time.perf_counter()
                groups = [value for value in (*positional, named.get("group")) if isinstance(value, ProcessGroup)]
                self._backend.barrier(group=groups[0] if groups else torch.distributed.GroupMember.WORLD)
                self._counts["waiting_seconds"] += time.perf_counter() - begin
            begin = time.perf_counter()
            handle = stock(*positional, **named)
            if self.probing and handle is not None:
                handle.wait()
            self._counts[f"{kind}_seconds"] += time.perf_counter() - begin
            return handle if handle is None else _Timed(handle, self, f"{kind}_seconds")

        return call

    def waited(self, what: str, seconds: float) -> None:
        """Add the time a handle was waited for."""
        self._counts[what] += seconds


class _Timed:
    """A handle of a collective whose wait is counted."""

    def __init__(self, handle: Any, counts: Collectives, what: str) -> None:
        self._handle, self._counts, self._what = handle, counts, what

    def wait(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = self._handle.wait(*arguments)
        self._counts.waited(self._what, time.perf_counter() - begin)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def _amount(name: str, sizes: list[int]) -> tuple[str, int]:
    """Kind and bytes of a collective by its name and the bytes of its tensors, outputs first."""
    if "gather" in name:
        return "gather", sizes[0] - sizes[1]
    if "scatter" in name:
        return "reduce", sizes[1]
    return "scalar" if sizes[0] <= _SCALARS else "reduce", sizes[0]


def _bytes(tensor: torch.Tensor | list[torch.Tensor]) -> int:
    tensors = tensor if isinstance(tensor, list) else [tensor]
    return sum(part.numel() * part.element_size() for part in tensors)

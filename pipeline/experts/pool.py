"""Shape of a pool of sub-experts; what a plan needs to know of them, without torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SubExperts:
    """Shape of the pool on every adapted weight."""

    number: int = 4  # K
    top_k: int = 2  # sub-experts that a task chooses
    density: float = 0.25  # share of a chosen sub-expert's parameters that a task's mask holds


def num_kept(size: int, density: float) -> int:
    """Parameters of `size` that a mask of that density holds: at least one."""
    return min(size, max(1, math.ceil(density * size - 1e-9)))  # 0.07 * 100 is a hair above 7

"""The learning-rate schedule."""

import math


def rate(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up over a share of the steps, then cosine to zero.

    The first step of a warm-up already has 1 / warm-up steps; without warm-up the first step has 1.
    """
    warmup = math.ceil(num_steps * warmup_fraction - 1e-9)  # 100 * 0.07 is more than 7 in floats
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

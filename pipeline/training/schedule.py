"""Learning rates: the schedule over an increment, and the law for routed experts."""

import math


def rate(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up over a share of the steps, then cosine to zero.

    The first step of a warm-up already has 1 / warm-up steps; without warm-up the first step has 1.
    """
    warmup = math.ceil(num_steps * warmup_fraction - 1e-9)  # 100 * 0.07 is more than 7 in floats
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def routed_ratio(fraction: float, batch_tokens: float, noise_batch_tokens: float | None) -> float:
    """Learning rate of an expert that sees `fraction` of a batch's tokens, relative to one that sees all of them.

    Adam's rate follows eps(B) = 2 eps_max / (sqrt(Bn / B) + sqrt(B / Bn)) with the noise batch Bn in tokens
    (Hunyuan-Large, arXiv 2411.02265; METHODS section 6). Without Bn, its limit for small batches: sqrt(fraction).
    """
    if noise_batch_tokens is None:
        return math.sqrt(fraction)

    def law(tokens: float) -> float:
        return 2 / (math.sqrt(noise_batch_tokens / tokens) + math.sqrt(tokens / noise_batch_tokens))

    return law(batch_tokens * fraction) / law(batch_tokens)

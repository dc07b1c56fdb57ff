"""The pooled prompt state of a task, and how near two tasks' prompts are.

A task's state is mean and variance over rows of its prompts' mean input embeddings. Tasks are compared as two samples:

    d^2 = mean over dimensions of (m - m')^2 / ((s^2 + s'^2) / 2),        nearness = 1 / (1 + d^2)

1 for equal prompts, 0.5 where the means lie one standard deviation apart. Cosines of mean embeddings do not tell tasks
apart: what all texts share outweighs the rest.
"""

import torch

_LEAST = 1e-12  # variance of prompts that are all the same


def prompt_state(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and variance of prompt vectors (rows, D), (D,) each."""
    return {"prompt_mean": vectors.mean(dim=0), "prompt_variance": vectors.var(dim=0, correction=0)}


def nearness(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How near two tasks' prompts are, from 0 to 1."""
    spread = (one["prompt_variance"] + other["prompt_variance"]).clamp(min=_LEAST) / 2
    return 1 / (1 + float(((one["prompt_mean"] - other["prompt_mean"]).square() / spread).mean()))

"""The task router: which learned task a text belongs to, by ridge regression onto task ids (METHODS section 3).

    phi(x) = relu(P x)                 x a pooled text state, P fixed random signs / sqrt(D)
    W = (sum phi phi^T + lambda I)^-1 sum phi y^T,   y the one-hot task id

Both sums run over all rows learned so far and are all that is kept: a task adds its own rows to them, no earlier row
is needed, and W is the solution on all rows at once. Everything is fp64.

Legend: B rows, D width of a pooled state, F random features, T tasks.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from pipeline.config import RouterConfig

NORMAL, MOMENTS = "normal", "moments"
# settings that decide what the kept sums mean; the rest may change from one increment to the next
_BINDING = ("layers", "features", "max_tokens", "seed")


@dataclass(frozen=True)
class TaskRouter:
    """The sums over the rows of `tasks`, with the settings they were made with."""

    config: RouterConfig
    tasks: tuple[str, ...]
    normal: torch.Tensor  # (F, F) sum of phi phi^T
    moments: torch.Tensor  # (F, T) sum of phi over each task's rows

    @classmethod
    def empty(cls, config: RouterConfig) -> "TaskRouter":
        """A router that has seen nothing."""
        size = config.features
        return cls(config, (), torch.zeros(size, size, dtype=torch.double), torch.zeros(size, 0, dtype=torch.double))

    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        """Random ReLU features of pooled text states: (B, D) -> (B, F), fp64."""
        wide = pooled.double()
        return torch.relu(wide @ random_signs(wide.shape[1], self.config.features, self.config.seed))

    def learn(self, task: str, normal: torch.Tensor, moment: torch.Tensor) -> "TaskRouter":
        """The router after the rows of `task`: their sum of phi phi^T (F, F) and of phi (F,). A known task's rows are
        added to those it has.
        """
        tasks, moments = self.tasks, self.moments
        if task not in tasks:
            tasks = (*tasks, task)
            moments = torch.cat([moments, torch.zeros_like(moment)[:, None]], dim=1)
        of_task = torch.tensor([name == task for name in tasks])
        return TaskRouter(self.config, tasks, self.normal + normal, moments + moment[:, None] * of_task)

    @cached_property
    def weights(self) -> torch.Tensor:
        """(F, T), the closed-form solution."""
        ridge = self.config.regularisation * torch.eye(len(self.normal), dtype=torch.double)
        return torch.cholesky_solve(self.moments, torch.linalg.cholesky(self.normal + ridge))

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, T) fp64: near 1 for the task a text belongs to, near 0 for the others; no probability."""
        return self.features(pooled) @ self.weights

    def fits(self, config: RouterConfig) -> bool:
        """Whether rows read under `config` may be added to these sums."""
        return all(getattr(self.config, name) == getattr(config, name) for name in _BINDING)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the bank keeps."""
        return {NORMAL: self.normal, MOMENTS: self.moments}

    def note(self) -> dict[str, Any]:
        """What the bank keeps beside the tensors."""
        return {"component": "router", "tasks": list(self.tasks), "router": self.config.model_dump(mode="json")}

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> "TaskRouter":
        """From the bank's tensors and note."""
        config = RouterConfig.model_validate(note["router"])
        return cls(config, tuple(note["tasks"]), tensors[NORMAL], tensors[MOMENTS])


@lru_cache(maxsize=2)
def random_signs(width: int, features: int, seed: int) -> torch.Tensor:
    """(D, F) of +-1 / sqrt(D), fp64, from the raw bits of PCG64, which numpy keeps the same in all its versions."""
    count = width * features
    words = np.random.PCG64(seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy((2.0 * bits - 1.0).reshape(width, features)) / width**0.5

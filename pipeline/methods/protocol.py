"""What a continual-learning method is to the pipeline.

A method says which LoRA experts there are, what each increment starts from, what is added to the loss, and what
earlier tasks may be served with afterwards. The loop, the stages, DeepSpeed and the bank are the same for all
methods.

A method is one file in `pipeline/methods/` with a pydantic model `Options` and a function `build(options) -> Method`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from pydantic import Field

from pipeline.config import Section
from pipeline.data.collate import MicroBatch
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.files import canonical_json, sha256_text

Tensors = dict[str, torch.Tensor]
Bundle = dict[str, str]  # {component: bank digest}: what a task is served with


def bundle_digest(bundle: Bundle) -> str:
    """One digest for a bundle: sha256 of its canonical JSON."""
    return sha256_text(canonical_json(bundle))


class RetentionOptions(Section):
    """What earlier tasks are served with after an increment (METHODS section 2)."""

    policy: Literal["follow", "pin", "best"] = "best"
    # `best` moves a task only if its validation score rises by more than this; null: one paired standard error
    margin: float | None = Field(None, ge=0)


@dataclass(frozen=True)
class Increment:
    """The increment at hand, as a method sees it. `bundles` and `states` are those of the champion."""

    number: int
    task: str
    seed: int
    bundles: Mapping[str, Bundle]
    states: Mapping[str, Bundle]  # {task: {state name: bank digest}}
    order: tuple[str, ...] = ()  # learned tasks, oldest first
    state_tensors: Mapping[str, Tensors] = field(default_factory=dict)  # {task: tensors} of the states asked for
    router: str | None = None  # bank digest of the champion's task router, which is no method's affair

    def with_states(self, tensors: Mapping[str, Tensors]) -> "Increment":
        """The same increment with the method states it asked for."""
        return replace(self, state_tensors=tensors)


class Method(Protocol):
    """The seam. Every hook runs on all ranks alike; random draws come from (seed, step) alone."""

    plan: ExpertPlan | None  # the LoRA experts there are; None: nothing is trained
    retention: RetentionOptions

    def start(self, increment: Increment) -> dict[str, str | None]:
        """Bank digest each component starts from, or None for a fresh one."""

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        """Earlier tasks whose method state `begin` wants to see."""

    def begin(self, increment: Increment, ffns: list[ExpertFFN], start: Tensors) -> None:
        """Prepare one increment; may change the start values `start` in place."""

    def before_forward(self, ffns: list[ExpertFFN], batch: MicroBatch) -> None:
        """Arm the layers for one micro-batch."""

    def after_forward(self, ffns: list[ExpertFFN]) -> dict[str, float]:
        """Disarm them; sums over this rank's sequences, for the log."""

    def wants_pooled(self) -> bool:
        """Whether `state` needs pooled features of the new task's rows."""

    def state(self, pooled: tuple[torch.Tensor, torch.Tensor] | None, values: Tensors) -> Tensors:
        """Method state of the new task to carry on: from mean and variance (L, D) of pooled features and trained
        values.
        """

    def published(self) -> tuple[str, ...]:
        """Components of a serving bundle."""

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        """What an earlier task's bundle becomes if it moves with the new increment; None where it never can."""


class PlainLora:
    """The common part of methods with one LoRA expert and nothing added to the loss."""

    def __init__(self, plan: ExpertPlan | None, retention: RetentionOptions) -> None:
        self.plan = plan
        self.retention = retention

    @property
    def roles(self) -> tuple[str, ...]:
        """The LoRA experts of every adapted FFN."""
        return self.plan.roles if self.plan else ()

    def start(self, increment: Increment) -> dict[str, str | None]:
        """A known task goes on from its own expert, a new one starts fresh."""
        own = increment.bundles.get(increment.task, {})
        return {role: own.get(role) for role in self.roles}

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        return ()

    def begin(self, increment: Increment, ffns: list[ExpertFFN], start: Tensors) -> None:
        """Nothing to prepare."""

    def before_forward(self, ffns: list[ExpertFFN], batch: MicroBatch) -> None:
        """Nothing to arm."""

    def after_forward(self, ffns: list[ExpertFFN]) -> dict[str, float]:
        return {}

    def wants_pooled(self) -> bool:
        return False

    def state(self, pooled: tuple[torch.Tensor, torch.Tensor] | None, values: Tensors) -> Tensors:
        return {}

    def published(self) -> tuple[str, ...]:
        return self.roles

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        return None

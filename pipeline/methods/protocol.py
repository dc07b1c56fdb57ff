"""What a continual-learning method is to the pipeline.

A method says which LoRA experts there are, what each increment starts from, what is added to the loss, and what
earlier tasks may be served with afterwards. The loop, the stages, DeepSpeed and the bank are the same for all
methods.

A method is one file in `pipeline/methods/` with a pydantic model `Options` and a function `build(options) -> Method`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field

from pipeline.config import Section, TrainingConfig
from pipeline.data.collate import MicroBatch
from pipeline.data.mixing import plain_batches
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.files import canonical_json, sha256_text
from pipeline.placement.learner import Learner
from pipeline.placement.state import Source
from pipeline.tensor_files import TensorFile

Tensors = dict[str, torch.Tensor]
# {component: bank digest}: what a task is served with. `past.N` are experts of earlier tasks that speak along with the
# task's own, `past_weights` holds their weights; without it they are 1
Bundle = dict[str, str]
PAST, PAST_WEIGHTS = "past.", "past_weights"
# a tensor's whole fp32 value, with this rank's routed experts alone -> what it adds to the loss, a scalar
Penalty = Callable[[torch.Tensor], torch.Tensor]


def own_of(bundle: Bundle) -> Bundle:
    """The components of a bundle that have slots of their own in the model."""
    return {name: digest for name, digest in bundle.items() if not name.startswith((PAST, PAST_WEIGHTS))}


def past_of(bundle: Bundle) -> list[str]:
    """Digests of the earlier experts that speak along in a bundle, in their order."""
    names = [name for name in bundle if name.startswith(PAST)]
    return [bundle[name] for name in sorted(names, key=lambda name: int(name.removeprefix(PAST)))]


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

    @property
    def latest(self) -> Bundle:
        """What the task learned last is served with; empty before the first."""
        return self.bundles[self.order[-1]] if self.order else {}

    @property
    def earlier(self) -> tuple[str, ...]:
        """Learned tasks without the one at hand, oldest first."""
        return tuple(task for task in self.order if task != self.task)

    def with_states(self, tensors: Mapping[str, Tensors]) -> "Increment":
        """The same increment with the method states it asked for."""
        return replace(self, state_tensors=tensors)


class Study(Protocol):
    """The model at hand and the new task's training rows, for what a method measures itself (training/study.py).

    All of it is collective, and the same on every rank.
    """

    learner: Learner

    def prompt_vectors(self) -> torch.Tensor:
        """Mean input embedding of each prompt, less the mean of the whole table: (rows, D) fp32, at most 256 rows."""

    def squared_gradients(self, max_rows: int) -> Tensors:
        """Mean over rows of the squared gradient of log p(answer | prompt), by parameter name, whole, fp32."""


@dataclass(frozen=True)
class Packed:
    """What a task publishes in a form of the method's own."""

    tensors: Tensors  # of its bank file
    reads: list[int]  # which of the `past` files a bundle needs beside it, ascending
    account: dict[str, int]  # numbers for the manifest and MLflow


class Method(Protocol):
    """The seam. Every hook runs on all ranks alike; random draws come from (seed, step) alone."""

    plan: ExpertPlan | None  # the LoRA experts there are; None: nothing is trained
    retention: RetentionOptions

    learns_earlier_answers: bool  # whether rows of earlier tasks are learned, or only read

    def start(self, increment: Increment) -> dict[str, str | None]:
        """Bank digest each component starts from, or None for a fresh one."""

    def starts(self, increment: Increment) -> list[dict[str, str | None]]:
        """All starts worth a try: the one with the least loss on the new task's validation rows is taken."""

    def rehearses(self, increment: Increment) -> tuple[str, ...]:
        """Earlier tasks whose training rows the increment sees too."""

    def batches(self, increment: Increment, sizes: Sequence[int], training: TrainingConfig) -> list[np.ndarray]:
        """Row numbers of every global batch, by seed and step alone. `sizes` are the rows of the new task and of each
        of `rehearses`; they are numbered through in this order.
        """

    def past(self, increment: Increment, study: Study) -> list[tuple[str, float]]:
        """Earlier experts that speak along with the new task's own, frozen: bank digest and weight."""

    packs: bool  # whether bank files hold the first role's expert in a form of the method's own, by these three hooks

    def learn_beside(self, learner: Learner, past: Sequence[tuple[TensorFile, float]]) -> None:
        """Make the slots ready for training, with the files and weights of `past`."""

    def pack(self, learner: Learner) -> Packed:
        """What the trained values come to. Collective."""

    def unpack(self, learner: Learner, own: TensorFile, past: Sequence[TensorFile]) -> None:
        """Serve a packed expert with the files that it reads."""

    def penalties(self, learner: Learner, start: Source) -> Mapping[str, Penalty]:
        """Terms of the loss that depend on one trained tensor alone, by parameter name. `start` holds the values the
        increment started from. Only for tensors that every batch's loss depends on: ZeRO-3 keeps the gradient of a
        tensor that got none, penalty included, for the next step.
        """

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

    def learned(self, study: Study) -> Tensors:
        """More method state, measured with the trained model."""

    def published(self) -> tuple[str, ...]:
        """Components of a serving bundle."""

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        """What an earlier task's bundle becomes if it moves with the new increment; None where it never can."""


class PlainLora:
    """The common part of methods with one LoRA expert and nothing added to the loss."""

    learns_earlier_answers = True
    packs = False

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

    def starts(self, increment: Increment) -> list[dict[str, str | None]]:
        return [self.start(increment)]

    def rehearses(self, increment: Increment) -> tuple[str, ...]:
        return ()

    def batches(self, increment: Increment, sizes: Sequence[int], training: TrainingConfig) -> list[np.ndarray]:
        return plain_batches(sum(sizes), training.epochs, training.batch_size, increment.seed)

    def past(self, increment: Increment, study: Study) -> list[tuple[str, float]]:
        return []

    def penalties(self, learner: Learner, start: Source) -> Mapping[str, Penalty]:
        return {}

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

    def learned(self, study: Study) -> Tensors:
        return {}

    def published(self) -> tuple[str, ...]:
        return self.roles

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        return None

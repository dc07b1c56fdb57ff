"""`moe_cl`: a dedicated LoRA expert per task, one shared LoRA expert, a gate, an adversarial task discriminator.

Source: arXiv 2509.18133; formulas and what is done differently: METHODS sections 1 and 2.

Method state of a task (in the bank): per adapted layer the mean and variance of the pooled shared-expert output over
its rows (the prototype, (L, D) each) and its row of the discriminator ((L, D) weight, (L,) bias), so that a later
increment can pose the task as a class again without its data.

Ablations, all by configuration: `adversary.weight: 0` (no adversary); `adversary.negatives` none, prototypes, or replay
(rows of the earlier tasks themselves, one for every new row, which the discriminator judges and nobody learns to
answer: a step costs twice as much, and the earlier tasks' data must be kept); `retention.policy`; `gate` shared or per
task; `warm_start` of the dedicated expert of a new task: fresh, or `similar`, which tries the expert and gate of at
most 8 earlier tasks beside a fresh one and takes the start with the least loss on the new task's validation rows.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.config import Section, TrainingConfig
from pipeline.data.collate import MicroBatch
from pipeline.data.mixing import rehearsal_batches
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.discriminator import AdversaryStep, Negatives
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.lora import LoraOptions
from pipeline.files import seed_of
from pipeline.methods.protocol import Bundle, Increment, PlainLora, RetentionOptions, Tensors

MAX_STARTS = 8  # earlier tasks' experts that a warm start tries


class AdversaryOptions(Section):
    """The discriminator's game."""

    weight: float = Field(0.1, ge=0)  # of its cross-entropy in the loss; 0 turns it off
    outputs: int = Field(8, ge=2)  # the current task and at most outputs - 1 earlier ones, drawn by seed
    negatives: Literal["none", "prototypes", "replay"] = "prototypes"  # what stands for the earlier tasks


class LearningRates(Section):
    """Learning rates; null takes training.learning_rate."""

    shared: float | None = Field(None, gt=0)
    dedicated: float | None = Field(None, gt=0)
    gate: float | None = Field(None, gt=0)
    discriminator: float | None = Field(None, gt=0)


class Options(Section):
    """Options of `moe_cl`."""

    lora: LoraOptions = LoraOptions()
    gate: Literal["per_task", "shared"] = "per_task"  # shared is the paper's
    warm_start: Literal["fresh", "similar"] = "fresh"  # of a new task's dedicated expert
    adversary: AdversaryOptions = AdversaryOptions()
    retention: RetentionOptions = RetentionOptions()
    learning_rates: LearningRates = LearningRates()


class MoeCL(PlainLora):
    """The method; one object serves all increments of a job."""

    learns_earlier_answers = False

    def __init__(self, options: Options) -> None:
        self.num_discriminator_outputs = options.adversary.outputs if options.adversary.weight > 0 else 0
        rates = options.learning_rates.model_dump()
        plan = ExpertPlan(options.lora, ("shared", "dedicated"), self.num_discriminator_outputs, rates)
        super().__init__(plan, options.retention)
        self.options = options
        self._increment: Increment | None = None
        self._classes: tuple[str, ...] = ()  # tasks behind the discriminator's outputs; the current one is first
        self._prototypes: tuple[torch.Tensor, torch.Tensor] | None = None  # mean, standard deviation (K, L, D)
        self._pending: list[torch.Tensor] = []

    def start(self, increment: Increment) -> dict[str, str | None]:
        """Shared expert and gate go on from the latest increment, a known task from its own dedicated expert."""
        latest = increment.latest
        own = increment.bundles.get(increment.task, {})
        gate = own.get("gate") if self.options.gate == "per_task" else None
        return {
            "shared": latest.get("shared"),
            "dedicated": own.get("dedicated"),
            "gate": gate or latest.get("gate"),
        }

    def starts(self, increment: Increment) -> list[dict[str, str | None]]:
        """A new task may go on from an earlier one's dedicated expert, with the gate it was trained with."""
        fresh = self.start(increment)
        if self.options.warm_start == "fresh" or increment.task in increment.bundles:
            return [fresh]
        tried = ("dedicated", "gate") if self.options.gate == "per_task" else ("dedicated",)
        earlier = self._drawn("start", increment, list(increment.order), MAX_STARTS)
        return [fresh, *(fresh | {name: increment.bundles[task][name] for name in tried} for task in earlier)]

    def rehearses(self, increment: Increment) -> tuple[str, ...]:
        """The tasks that the discriminator tells apart, where their rows stand for them."""
        return self.states_needed(increment) if self.options.adversary.negatives == "replay" else ()

    def batches(self, increment: Increment, sizes: Sequence[int], training: TrainingConfig) -> list[np.ndarray]:
        """With replayed negatives one old row for every new one."""
        return rehearsal_batches(sizes, training.epochs, training.batch_size, 1.0, increment.seed, increment.number)

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        """The earlier tasks that this increment's discriminator tells apart, drawn by seed."""
        earlier = [task for task in increment.earlier if increment.states.get(task)]
        if not self.num_discriminator_outputs:
            return ()
        return self._drawn("discriminator", increment, earlier, self.num_discriminator_outputs - 1)

    def begin(self, increment: Increment, ffns: list[ExpertFFN], start: Tensors) -> None:
        """Give each drawn task its discriminator row and prototype."""
        self._increment = increment
        self._classes = (increment.task, *increment.state_tensors)
        self._prototypes = None
        if len(self._classes) == 1:
            return
        states = list(increment.state_tensors.values())
        for row, state in enumerate(states, start=1):
            for ffn in ffns:
                start[f"discriminator/{ffn.path}.discriminator.weight"][row] = state["discriminator_weight"][ffn.layer]
                start[f"discriminator/{ffn.path}.discriminator.bias"][row] = state["discriminator_bias"][ffn.layer]
        if self.options.adversary.negatives == "prototypes":
            mean = torch.stack([state["prototype_mean"] for state in states])
            variance = torch.stack([state["prototype_variance"] for state in states])
            self._prototypes = mean, variance.clamp(min=0).sqrt()

    def before_forward(self, ffns: list[ExpertFFN], batch: MicroBatch) -> None:
        """Arm every layer with this micro-batch's side of the game; off while there is one class only."""
        if len(self._classes) == 1:
            return
        sequences = batch.global_rows * (1 if self._prototypes is None else 2)
        step = AdversaryStep(
            pool=batch.pool,
            row_weight=batch.row_weight,
            class_index=0,
            num_classes=len(self._classes),
            scale=self.options.adversary.weight * batch.world_size / (len(ffns) * sequences),
            negatives=self._draw(batch),
            classes=torch.tensor(batch.sources, device=batch.input_ids.device) if any(batch.sources) else None,
        )
        self._pending = step.cross_entropy
        for ffn in ffns:
            ffn.adversary = step

    def after_forward(self, ffns: list[ExpertFFN]) -> dict[str, float]:
        """Disarm; the cross-entropy summed over this rank's sequences, averaged over layers."""
        for ffn in ffns:
            ffn.adversary = None
        if not self._pending:
            return {}
        total = torch.stack(self._pending).sum().item() / len(ffns)
        self._pending = []
        return {"adversary": total if self._prototypes is None else total / 2}

    def wants_pooled(self) -> bool:
        return self.num_discriminator_outputs > 0

    def state(self, pooled: tuple[torch.Tensor, torch.Tensor] | None, values: Tensors) -> Tensors:
        """Prototype and discriminator row of the new task."""
        if pooled is None:
            return {}
        weights = [value[0] for name, value in values.items() if name.endswith(".discriminator.weight")]
        biases = [value[0] for name, value in values.items() if name.endswith(".discriminator.bias")]
        return {
            "prototype_mean": pooled[0],
            "prototype_variance": pooled[1],
            "discriminator_weight": torch.stack(weights),
            "discriminator_bias": torch.stack(biases),
        }

    def published(self) -> tuple[str, ...]:
        return (*self.roles, "gate")

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        """The shared expert moves on; the gate too where it is one for all (METHODS section 2)."""
        moved = {**old, "shared": new["shared"]}
        return {**moved, "gate": new["gate"]} if self.options.gate == "shared" else moved

    @staticmethod
    def _drawn(name: str, increment: Increment, tasks: list[str], most: int) -> tuple[str, ...]:
        """At most `most` of the tasks, in their order, drawn by seed and increment."""
        seed = seed_of(f"{name}/{increment.seed}/{increment.number}")
        drawn = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed))
        return tuple(tasks[i] for i in sorted(drawn[:most].tolist()))

    def _draw(self, batch: MicroBatch) -> Negatives | None:
        """One earlier task's pooled features for every row, from (seed, increment, step, row) alone."""
        if self._prototypes is None:
            return None
        mean, deviation = self._prototypes
        features, classes = [], []
        for row in batch.places:
            key = f"negatives/{self._increment.seed}/{self._increment.number}/{batch.step}/{row}"
            generator = torch.Generator().manual_seed(seed_of(key))
            drawn = int(torch.randint(len(mean), (1,), generator=generator))
            noise = torch.randn(mean.shape[1:], generator=generator)
            features.append(mean[drawn] + deviation[drawn] * noise)
            classes.append(drawn + 1)
        device = batch.input_ids.device
        return Negatives(torch.stack(features, dim=1).to(device), torch.tensor(classes, device=device))


def build(options: Options) -> MoeCL:
    return MoeCL(options)

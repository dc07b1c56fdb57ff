"""`replay`: `sequential`, with rows of earlier tasks mixed into every increment. It needs the earlier tasks' data for
good: where that may not be kept, it cannot be used.

Old rows come on top of the new ones, `share` of them for every new row (0.1: one to ten), so that the new task gets the
same rows, epochs and steps as under the other methods. Every earlier task is drawn equally often, whatever its size.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from pipeline.config import Section, TrainingConfig
from pipeline.data.mixing import rehearsal_batches
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import Increment, RetentionOptions
from pipeline.methods.sequential import Sequential


class Options(Section):
    """Options of `replay`."""

    lora: LoraOptions = LoraOptions()
    share: float = Field(0.1, gt=0)  # rows of earlier tasks for every row of the new one


class Replay(Sequential):
    """One LoRA expert that goes on from the latest; every task is served with it."""

    def __init__(self, options: Options) -> None:
        super().__init__(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="follow"))
        self.share = options.share

    def rehearses(self, increment: Increment) -> tuple[str, ...]:
        return increment.earlier

    def batches(self, increment: Increment, sizes: Sequence[int], training: TrainingConfig) -> list[np.ndarray]:
        seed, number = increment.seed, increment.number
        return rehearsal_batches(sizes, training.epochs, training.batch_size, self.share, seed, number)


def build(options: Options) -> Replay:
    return Replay(options)

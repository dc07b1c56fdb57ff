"""`ewc`: `sequential`, held near the earlier solution where earlier tasks care: elastic weight consolidation.

Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), in the running form of Schwarz et al. 2018 (arXiv 1805.06370): one
penalty around the latest solution theta*, with the Fisher information of all tasks so far,

    loss + weight / 2 * sum_i F_i (theta_i - theta*_i)^2        F_i of increment k = decay * F_i of k - 1 + its own

so that what is kept and computed does not grow with the number of tasks. Its own F_i is the mean over rows of the
squared gradient of log p(answer | prompt) at the solution, the diagonal of the empirical Fisher information (the data's
answers, not the model's draws). Method state: F, whole, by parameter name.
"""

from collections.abc import Mapping

import torch
from pydantic import Field

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import Increment, Penalty, RetentionOptions, Study, Tensors
from pipeline.methods.sequential import Sequential
from pipeline.placement.learner import Learner
from pipeline.placement.state import Source, experts_of


class Options(Section):
    """Options of `ewc`."""

    lora: LoraOptions = LoraOptions()
    weight: float = Field(100.0, ge=0)  # of the penalty
    decay: float = Field(1.0, gt=0, le=1)  # of the earlier tasks' Fisher information, an increment
    fisher_rows: int = Field(64, ge=1)  # most training rows F is taken over; each costs a backward pass


class Ewc(Sequential):
    """One LoRA expert that goes on from the latest; every task is served with it."""

    def __init__(self, options: Options) -> None:
        super().__init__(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="follow"))
        self.options = options
        self._fisher: Tensors = {}  # of all tasks before this increment

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        return tuple(task for task in increment.order[-1:] if increment.states.get(task))

    def begin(self, increment: Increment, ffns, start: Tensors) -> None:
        self._fisher = next(iter(increment.state_tensors.values()), {})

    def penalties(self, learner: Learner, start: Source) -> Mapping[str, Penalty]:
        """The quadratic around the values the increment starts from, which are the latest solution."""
        penalties = {}
        for name, fisher in self._fisher.items():
            parameter = learner.parameters[name]
            experts, device = experts_of(parameter), learner.world.device
            own = fisher if experts is None else fisher[slice(*experts)]
            penalties[name] = quadratic(self.options.weight, own.to(device), start.read(name, experts).to(device))
        return penalties

    def learned(self, study: Study) -> Tensors:
        new = study.squared_gradients(self.options.fisher_rows)
        if not self._fisher:
            return new
        return {name: self.options.decay * self._fisher[name] + fisher for name, fisher in new.items()}


def quadratic(weight: float, fisher: torch.Tensor, solution: torch.Tensor) -> Penalty:
    """weight / 2 * sum_i F_i (theta_i - theta*_i)^2."""
    return lambda value: weight / 2 * (fisher * (value - solution).square()).sum()


def build(options: Options) -> Ewc:
    return Ewc(options)

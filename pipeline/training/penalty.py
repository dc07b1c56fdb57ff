"""What a method adds to the loss as a function of the trained values alone, on an engine that cuts them up.

Such a penalty needs no forward pass: each tensor's whole value is put together from the ranks' fp32 partitions, the
penalty differentiated there, and of its gradient each rank adds its own part to the gradient that the engine is about
to clip and apply. This is exact whatever the ZeRO stage, world size, and number of micro-batches.
"""

from collections.abc import Mapping

import torch

from pipeline.methods.protocol import Penalty
from pipeline.placement.learner import Learner
from pipeline.placement.state import add_gradient, own_value


def add_penalties(learner: Learner, penalties: Mapping[str, Penalty]) -> dict[str, float]:
    """Between a global batch's last backward and the engine's step: add the penalties' gradients; {"penalty": their
    sum}, or nothing where there are none. Collective.
    """
    if not penalties:
        return {}
    parameters, total = learner.parameters, 0.0
    for name, penalty in penalties.items():
        parameter = parameters[name]
        value = own_value(parameter).requires_grad_()
        loss = penalty(value)
        (gradient,) = torch.autograd.grad(loss, value)
        add_gradient(parameter, gradient)
        first, stop, experts = getattr(parameter, "expert_slice", (0, 1, 1))
        total += loss.item() * (experts / (stop - first))  # so many ranks share the whole, the others hold copies
    return {"penalty": learner.world.sum([total / learner.world.size])[0]}

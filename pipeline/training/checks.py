"""Checks on the live engine, once an increment: the right parameters learn, and no others."""

from deepspeed.utils import safe_get_full_grad
from torch import nn

from pipeline.placement.learner import Learner
from pipeline.placement.state import local_shape, whole_over_experts


def check_gradients(learner: Learner) -> None:
    """After the first backward: every active expert's B has a gradient, nothing outside the optimizer has one.
    Collective.

    Of the routed experts of a block one is enough: the others may have got no token. Of sub-experts the scores of B are
    enough: all that the mask holds of B may be earlier tasks'.
    """
    parameters = learner.parameters
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            scores = parameters.get(name.removesuffix("lora_B") + "score_B")
            if not _has_gradient(parameter) and (scores is None or not _has_gradient(scores)):
                raise AssertionError(
                    f"{name} got no gradient from the first batch: its expert is not on the way to the loss"
                )
    check_optimizer(learner)


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether any element has one. Collective, the same on every rank."""
    gradient = safe_get_full_grad(parameter)
    return gradient is not None and bool(
        whole_over_experts(parameter, gradient.view(local_shape(parameter))).any().item()
    )


def check_optimizer(learner: Learner) -> None:
    """The optimizer holds the active components and nothing else; no frozen parameter has a gradient."""
    active = {id(parameter) for parameter in learner.parameters.values()}
    trained = {id(parameter) for group in optimizer_parameters(learner) for parameter in group}
    if trained != active:
        raise AssertionError(f"the optimizer holds {len(trained)} parameters, {len(active)} are active")
    for name, parameter in learner.model.named_parameters():
        if id(parameter) not in active and (parameter.requires_grad or parameter.grad is not None):
            raise AssertionError(f"{name} is frozen but takes part in training")


def optimizer_parameters(learner: Learner) -> list[list[nn.Parameter]]:
    """The model parameters behind the engine's optimizer groups."""
    zero = learner.engine.optimizer
    return zero.fp16_groups if learner.engine.zero_optimization_stage() == 3 else zero.bit16_groups

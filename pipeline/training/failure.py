"""When training has gone wrong, and how it is said. Pure functions of numbers that are the same on every rank."""

import math
from collections.abc import Sequence

from data_contracts.errors import UserError

_SHOWN = 256  # row ids named; a batch has seldom more


class TrainingFailed(UserError):
    """The numbers of an increment went wrong: nothing of it is published."""


def went_wrong(loss: float, lost_gradient: bool, max_loss_factor: float | None, vocab_size: int) -> str | None:
    """What is wrong with a step, as a clause; None where nothing is.

    `loss` is the mean over the global batch in nats per answer token; a model that guesses blindly has ln(vocab_size).
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if lost_gradient:
        return "the gradient is not finite"
    limit = math.inf if max_loss_factor is None else max_loss_factor * math.log(vocab_size)
    if loss > limit:
        return (
            f"the loss is {loss:.4g}, over {limit:.4g} = training.max_loss_factor {max_loss_factor:g} x ln(vocabulary)"
        )
    return None


def failure(problem: str, step: int, total: int, kept: int, row_ids: Sequence[str]) -> str:
    """The message: the step, the rows of its batch, the last good state, the remedy. `kept` is the saved step."""
    rows = ", ".join(row_ids[:_SHOWN]) + (f" and {len(row_ids) - _SHOWN} more" if len(row_ids) > _SHOWN else "")
    state = f"the one saved after step {kept}" if kept else "the champion, none was saved since"
    return (
        f"{problem} at step {step} of {total}; the batch's rows are {rows}; the last good state is {state}; nothing "
        "was published; lower training.learning_rate, turn on training.gradient_clipping or mend these rows, and run "
        "it again"
    )

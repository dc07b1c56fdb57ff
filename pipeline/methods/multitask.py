"""`multitask`: one LoRA on all tasks at once, the usual upper bound for methods with one expert.

In a stream nobody knows which task is the last. So increment k trains a fresh expert on the union of the tasks
learned so far and its own, shuffled together, and every task is served with it from then on. Row k of R is thus joint
training on k tasks: the last row is the upper bound that is usually quoted, the rows above it what it was at each
moment, and a negative BWT is interference between tasks, not forgetting. The price is a training time that grows with
the stream, k times the rows at increment k, and that all data must be kept.
"""

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import Bundle, Increment, PlainLora, RetentionOptions


class Options(Section):
    """Options of `multitask`."""

    lora: LoraOptions = LoraOptions()


class Multitask(PlainLora):
    """A fresh expert an increment, learned from every task's rows in equal right."""

    def start(self, increment: Increment) -> dict[str, str | None]:
        return dict.fromkeys(self.roles)

    def rehearses(self, increment: Increment) -> tuple[str, ...]:
        return increment.earlier

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        return dict(new)


def build(options: Options) -> Multitask:
    return Multitask(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="follow"))

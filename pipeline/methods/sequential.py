"""`sequential`: one LoRA expert for all tasks, trained in turn (Seq FT-P). Every task is served with the latest: it
forgets.
"""

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import Bundle, Increment, PlainLora, RetentionOptions


class Options(Section):
    """Options of `sequential`."""

    lora: LoraOptions = LoraOptions()


class Sequential(PlainLora):
    """Each increment goes on from the latest expert, and every earlier task moves to it."""

    def start(self, increment: Increment) -> dict[str, str | None]:
        latest = increment.latest
        return {role: latest.get(role) for role in self.roles}

    def moved(self, old: Bundle, new: Bundle) -> Bundle | None:
        return dict(new)


def build(options: Options) -> Sequential:
    return Sequential(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="follow"))

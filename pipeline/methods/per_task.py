"""`per_task`: one LoRA expert a task, frozen once learned. No forgetting and no transfer: the bar to beat by
transfer.
"""

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.methods.protocol import PlainLora, RetentionOptions


class Options(Section):
    """Options of `per_task`."""

    lora: LoraOptions = LoraOptions()


def build(options: Options) -> PlainLora:
    return PlainLora(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="pin"))

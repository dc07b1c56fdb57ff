"""`zero_shot`: the frozen backbone with the contract's prompt. Nothing is trained; the floor every method must beat."""

from pipeline.config import Section
from pipeline.methods.protocol import PlainLora, RetentionOptions


class Options(Section):
    """None."""


def build(options: Options) -> PlainLora:
    return PlainLora(plan=None, retention=RetentionOptions(policy="pin"))

"""`mocl`: a LoRA for each task, with the experts of similar earlier tasks mixed in.

Source: MoCL, arXiv 2404.00790: a task t has a vector v_t, learned by maximising the cosine similarity with the
embeddings of its inputs, and is served with its own expert plus those of the tasks before it, each weighed by how well
its vector matches; earlier experts stay frozen. In every adapted projection

    W x + alpha / r * (B_t A_t x + sum over i < t of w_i B_i A_i x)        w_i = nearness of the prompts of i and t

Our choices, where the paper leaves or needs another: weights are one set a task and not one an input, so that they can
be read in the bundle; a task's vector is in closed form, the pooled state of its prompts, and matches by distance in
standard deviations and not by cosine (experts/prompt_state.py says why); the own expert's weight is 1, since B_t learns
any other. What was mixed in is part of the bundle, so an earlier task's answers never change. Method state: the prompt
state, (D,) twice.
"""

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.experts.prompt_state import nearness, prompt_state
from pipeline.methods.protocol import Increment, PlainLora, RetentionOptions, Study, Tensors


class Options(Section):
    """Options of `mocl`."""

    lora: LoraOptions = LoraOptions()


class MoCL(PlainLora):
    """A LoRA expert a task, frozen once learned, beside weighed earlier ones."""

    def states_needed(self, increment: Increment) -> tuple[str, ...]:
        return tuple(task for task in increment.earlier if increment.states.get(task))

    def past(self, increment: Increment, study: Study) -> list[tuple[str, float]]:
        if not increment.state_tensors:
            return []
        own = prompt_state(study.prompt_vectors())
        states = increment.state_tensors.items()
        return [(increment.bundles[task]["adapter"], nearness(state, own)) for task, state in states]

    def learned(self, study: Study) -> Tensors:
        return prompt_state(study.prompt_vectors())


def build(options: Options) -> MoCL:
    return MoCL(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="pin"))

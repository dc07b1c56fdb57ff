"""`mocl`: a LoRA for each task, with the experts of similar earlier tasks mixed in.

Source: MoCL, arXiv 2404.00790: a task t has a vector v_t, learned by maximising the cosine similarity with the
embeddings of its inputs, and is served with its own expert plus those of the tasks before it, each weighed by how well
its vector matches; earlier experts stay frozen. In every adapted projection

    W x + alpha / r * (B_t A_t x + sum over i < t of w_i B_i A_i x)        w_i = max(0, cos(v_i, e_t))

Our choices, where the paper leaves or needs another: e_t is the mean over the new task's prompts of their unit
embeddings (mean input embedding, less the mean of the whole table, which all texts share), so weights are one set a
task and not one an input, and can be read in the bundle; v_t maximises sum_x cos(e(x), v) in closed form, which makes
it e_t up to length; the own expert's weight is 1, since B_t learns any other. What was mixed in is part of the bundle,
so an earlier task's answers never change. Method state: v_t, (D,).
"""

import torch
import torch.nn.functional as F

from pipeline.config import Section
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
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
        earlier = torch.stack([state["task_vector"] for state in increment.state_tensors.values()])
        weights = similarities(study.prompt_vectors(), earlier)
        found = [
            (increment.bundles[task]["adapter"], float(weight))
            for task, weight in zip(increment.state_tensors, weights, strict=True)
        ]
        return [(digest, weight) for digest, weight in found if weight > 0]

    def learned(self, study: Study) -> Tensors:
        return {"task_vector": task_vector(study.prompt_vectors())}


def task_vector(prompts: torch.Tensor) -> torch.Tensor:
    """The v of unit length that maximises sum_x cos(e(x), v): (rows, D) -> (D,)."""
    return F.normalize(F.normalize(prompts, dim=-1).sum(dim=0), dim=0)


def similarities(prompts: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """max(0, cos(v_i, e)) of the mean e of unit prompt vectors: (rows, D), (tasks, D) -> (tasks,)."""
    return F.cosine_similarity(vectors, task_vector(prompts).unsqueeze(0), dim=-1).clamp(min=0)


def build(options: Options) -> MoCL:
    return MoCL(ExpertPlan(options.lora, ("adapter",)), RetentionOptions(policy="pin"))

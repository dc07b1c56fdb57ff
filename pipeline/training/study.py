"""What methods measure over a task's rows: embeddings of prompts, squared gradients, the loss of a start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.batching import micro_batches
from pipeline.data.collate import collate
from pipeline.data.tokens import RowView
from pipeline.methods.protocol import Tensors
from pipeline.placement.learner import Learner
from pipeline.placement.rounds import run_batches
from pipeline.placement.state import gathered, whole_gradient, whole_over_experts

MAX_ROWS = 256  # rows that embeddings and losses are taken over


@dataclass(frozen=True)
class RowStudy:
    """See `methods.protocol.Study`."""

    learner: Learner
    rows: RowView
    batch_tokens: int

    @torch.no_grad()
    def prompt_vectors(self) -> torch.Tensor:
        """(rows, D) fp32 on the CPU. Collective: ZeRO-3 gathers the table of embeddings."""
        prompts, _ = self.rows.tokens(spread(len(self.rows), MAX_ROWS))
        weight = self.learner.model.backbone.get_input_embeddings().weight
        with gathered([weight]):
            table = weight.data
            mean = table.mean(dim=0, dtype=torch.float32)
            means = [table[torch.tensor(prompt, device=table.device)].float().mean(dim=0) - mean for prompt in prompts]
        return torch.stack(means).cpu()

    def squared_gradients(self, max_rows: int) -> Tensors:
        """One backward pass a row, without dropout; the engine's gradients are gone afterwards. Collective.

        Ranks cannot share rows out: their gradients are summed before anybody sees one. All but one run a spare pass.
        """
        learner, engine = self.learner, self.learner.engine
        sums = {}
        chosen = spread(len(self.rows), max_rows)
        learner.model.train()
        with without_dropout(learner):
            for row in chosen:
                self._backward(row)
                for name, parameter in learner.parameters.items():
                    squared = whole_gradient(parameter).square().cpu()
                    sums[name] = sums[name] + squared if name in sums else squared
                engine.optimizer.zero_grad()
                if engine.zero_optimization_stage() == 2:
                    engine.optimizer.averaged_gradients.clear()
        device = learner.world.device
        parameters = learner.parameters
        return {n: whole_over_experts(parameters[n], s.to(device)).cpu() / len(chosen) for n, s in sums.items()}

    def _backward(self, row: int) -> None:
        """The gradient of one row's -log p(answer | prompt), on the engine's partitions."""
        learner, world = self.learner, self.learner.world
        (part,) = micro_batches([int(self.rows.lengths[row])], world.rank, world.size, 1, self.batch_tokens)
        prompts, answers = self.rows.tokens([row])
        batch = collate(
            prompts,
            answers,
            self.rows.end_of_answer,
            places=part.places,
            weight=part.weight,
            step=0,
            global_rows=1,
            world_size=world.size,
            device=world.device,
        )
        logits = learner.engine(batch.input_ids, None, batch.positions, batch.position_ids)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        learner.engine.set_gradient_accumulation_boundary(True)
        learner.engine.backward((losses * batch.target_weight).sum() * world.size)


@torch.no_grad()
def answer_loss(learner: Learner, rows: RowView, batch_tokens: int) -> float:
    """Mean of -log p over the answer tokens of at most `MAX_ROWS` rows, under the experts that speak. Collective."""
    learner.model.eval()
    chosen = spread(len(rows), MAX_ROWS)
    prompts, answers = rows.tokens(chosen)

    def work(batch: list[int]) -> tuple[float, int]:
        part = collate(
            [prompts[place] for place in batch],
            [answers[place] for place in batch],
            rows.end_of_answer,
            places=tuple(batch),
            weight=1.0,
            step=0,
            global_rows=len(chosen),
            world_size=learner.world.size,
            device=learner.world.device,
        )
        logits = learner.forward(part.input_ids, None, part.positions, part.position_ids)
        return F.cross_entropy(logits.float(), part.targets, reduction="sum").item(), len(part.targets)

    lengths = [int(rows.lengths[row]) for row in chosen]
    done = [found for _, found in run_batches(learner.world, lengths, batch_tokens, work)]
    return sum(loss for loss, _ in done) / sum(tokens for _, tokens in done)


def spread(num_rows: int, most: int) -> list[int]:
    """At most `most` row numbers, evenly apart."""
    return list(range(0, num_rows, -(-num_rows // most)))


@contextmanager
def without_dropout(learner: Learner) -> Iterator[None]:
    """LoRA's dropout is off inside; the modules stay in training mode, as the engine's backward needs it."""
    modules = [m for m in learner.model.modules() if isinstance(m, nn.Dropout)]
    rates = [module.p for module in modules]
    try:
        for module in modules:
            module.p = 0.0
        yield
    finally:
        for module, rate in zip(modules, rates, strict=True):
            module.p = rate

"""Mean and variance of the shared expert's pooled output over a task's rows: the task's prototype."""

import torch

from pipeline.data.collate import pack
from pipeline.data.tokens import RowView
from pipeline.placement.learner import Learner
from pipeline.placement.rounds import run_batches

MAX_ROWS = 256  # rows a prototype is taken over, spread evenly


@torch.no_grad()
def pooled_statistics(learner: Learner, rows: RowView, batch_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, variance), each (L, D) fp32, over at most `MAX_ROWS` prompts with their answers. Collective."""
    learner.model.eval()
    chosen = list(range(0, len(rows), -(-len(rows) // MAX_ROWS)))
    prompts, answers = rows.tokens(chosen)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    device = learner.world.device

    def work(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        sequences = [texts[row] for row in batch]
        packed = pack(sequences)
        pool = packed.pool([len(sequence) for sequence in sequences]).to(device)
        for ffn in learner.ffns:
            ffn.pool = pool
        nowhere = torch.zeros(1, dtype=torch.long, device=device)
        learner.forward(packed.input_ids.to(device), None, nowhere, packed.position_ids.to(device))
        pooled = torch.stack([ffn.pooled.double() for ffn in learner.ffns])  # (L, B, D)
        for ffn in learner.ffns:
            ffn.pool = ffn.pooled = None
        return pooled.sum(dim=1).cpu(), pooled.square().sum(dim=1).cpu()

    parts = [sums for _, sums in run_batches(learner.world, [len(text) for text in texts], batch_tokens, work)]
    mean = sum(first for first, _ in parts) / len(texts)
    variance = sum(second for _, second in parts) / len(texts) - mean.square()
    return mean.float(), variance.clamp(min=0).float()

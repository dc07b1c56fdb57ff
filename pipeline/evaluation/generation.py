"""Greedy generation, batched, with a KV cache; all ranks decode in step, as ZeRO-3 needs."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

from pipeline.placement.learner import Learner
from pipeline.placement.rounds import run_batches
from pipeline.watch.rank import report


def generate_rows(
    learner: Learner,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerFast,
    end_of_answer: int,
    max_answer_tokens: int,
    batch_tokens: int,
) -> tuple[list[str], list[float]]:
    """Answer text of every prompt and its mean log-probability per token (the end included). Collective."""
    learner.model.eval()
    texts, scores = [""] * len(prompts), [0.0] * len(prompts)
    lengths = [len(prompt) + max_answer_tokens for prompt in prompts]

    def work(rows: list[int]) -> list[tuple[list[int], float]]:
        return greedy(learner, [prompts[row] for row in rows], end_of_answer, max_answer_tokens)

    for rows, answers in run_batches(learner.world, lengths, batch_tokens, work):
        for row, (ids, score) in zip(rows, answers, strict=True):
            texts[row], scores[row] = tokenizer.decode(ids, skip_special_tokens=True), score
    return texts, scores


@torch.no_grad()
def greedy(
    learner: Learner, prompts: Sequence[Sequence[int]], end_of_answer: int, max_answer_tokens: int
) -> list[tuple[list[int], float]]:
    """Token ids (the end left out) and mean log-probability of the likeliest answer of each prompt.

    At most `max_answer_tokens` tokens; every rank runs until the last rank's last row is done. Collective.
    """
    device = learner.world.device
    batch, width = len(prompts), max(map(len, prompts))
    ids = torch.full((batch, width), end_of_answer, dtype=torch.long, device=device)
    mask = torch.zeros((batch, width), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):  # padded on the left, so that the last state is the prompt's
        ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt), device=device)
        mask[row, width - len(prompt) :] = 1
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=learner.model.backbone.config)
    answers: list[list[int]] = [[] for _ in prompts]
    totals, counts = [0.0] * batch, [0] * batch
    open_rows = set(range(batch))
    for _ in range(max_answer_tokens + 1):
        report()
        positions = torch.arange(batch, device=device) * ids.shape[1] + ids.shape[1] - 1
        logits = learner.forward(ids, mask, positions, position_ids, cache)
        best, token = torch.log_softmax(logits.float(), dim=-1).max(dim=-1)
        for row in sorted(open_rows):
            ended, full = int(token[row]) == end_of_answer, len(answers[row]) == max_answer_tokens
            if ended or not full:  # a token past the limit is neither answer nor end
                totals[row] += best[row].item()
                counts[row] += 1
            if ended or full:
                open_rows.discard(row)
            else:
                answers[row].append(int(token[row]))
        if not any(learner.world.sum([float(len(open_rows))])):
            break
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return [(answer, total / count) for answer, total, count in zip(answers, totals, counts, strict=True)]

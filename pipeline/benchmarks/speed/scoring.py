"""Case `evaluation`: scoring labels through a trie against one forward pass per label; generation in batches against
one row at a time.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.benchmarks.speed.contenders import build_job
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, interleave, rates
from pipeline.data.collate import pad_right
from pipeline.data.tokens import PreparedTask
from pipeline.evaluation.generation import generate_rows
from pipeline.evaluation.scoring import score_rows
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner
from pipeline.placement.rounds import run_batches

TRIE, PER_LABEL = "trie", "one_forward_per_label"
BATCHED, UNBATCHED = "batched", "one_row_at_a_time"


def measure_evaluation(
    options: SpeedOptions, prepared: PreparedTask, world: World, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> dict[str, dict[str, Any]]:
    """Reports 'evaluation' and 'generation': seconds for the same rows, ratios, rows/s, and how far answers agree."""
    job = build_job(options, "moe_cl", folder, world, tokenizer, train=False)
    rows = prepared.rows("test", options.rows, options.seed)
    prompts, _ = rows.tokens(range(len(rows)))
    end, budget = prepared.end_of_answer, job.config.evaluation.batch_tokens
    scores: dict[str, np.ndarray] = {}
    texts: dict[str, list[str]] = {}

    def score(name: str, work) -> None:
        scores[name] = work(job.learner, prompts, prepared.label_ids, end, budget)

    def generate(name: str) -> None:
        groups = [prompts] if name == BATCHED else [[prompt] for prompt in prompts]
        answers = [generate_rows(job.learner, g, tokenizer, end, options.answer_tokens, budget)[0] for g in groups]
        texts[name] = [text for group in answers for text in group]

    scored = interleave(
        {TRIE: lambda _: score(TRIE, score_rows), PER_LABEL: lambda _: score(PER_LABEL, score_by_label)},
        options.repeats,
        warmup=1,
    )
    labels = compare(scored, [(PER_LABEL, TRIE)])
    labels["figures"] = {
        name: {"rows_per_second": rates([len(prompts)] * options.repeats, values)} for name, values in scored.items()
    }
    same = scores[TRIE].argmax(axis=1) == scores[PER_LABEL].argmax(axis=1)
    labels["agreement"] = {
        "labels": len(prepared.label_ids),
        "same_answers": float(same.mean()),
        "largest_score_difference": float(np.abs(scores[TRIE] - scores[PER_LABEL]).max()),
        "prompt_tokens": statistics.mean(map(len, prompts)),
    }
    written = interleave(
        {name: lambda _, name=name: generate(name) for name in (BATCHED, UNBATCHED)}, options.repeats, 1
    )
    generation = compare(written, [(UNBATCHED, BATCHED)])
    generation["figures"] = {
        name: {"rows_per_second": rates([len(prompts)] * options.repeats, values)} for name, values in written.items()
    }
    pairs = zip(texts[BATCHED], texts[UNBATCHED], strict=True)
    generation["agreement"] = {"same_answers": statistics.mean(float(a == b) for a, b in pairs)}
    return {"evaluation": labels, "generation": generation}


def score_by_label(
    learner: Learner,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    end_of_answer: int,
    batch_tokens: int,
) -> np.ndarray:
    """What `score_rows` gives, by a forward pass over prompt and label for each label, (rows, labels).

    The peer gets batches of like length under the same token budget, and logits at the label's tokens alone.
    """
    learner.model.eval()
    result = np.zeros((len(prompts), len(label_ids)), dtype=np.float32)
    for place, label in enumerate(label_ids):
        lengths = [len(prompt) + len(label) for prompt in prompts]

        def work(rows: list[int], label=label) -> np.ndarray:
            return one_label(learner, [prompts[row] for row in rows], label, end_of_answer)

        for rows, scores in run_batches(learner.world, lengths, batch_tokens, work):
            result[rows, place] = scores
    return result


@torch.no_grad()
def one_label(
    learner: Learner, prompts: Sequence[Sequence[int]], label: Sequence[int], end_of_answer: int
) -> np.ndarray:
    """Log-probability of one label and the end of the answer after each prompt, (B,)."""
    device = learner.world.device
    ids, mask = pad_right([[*prompt, *label] for prompt in prompts])
    first = torch.tensor([len(prompt) - 1 for prompt in prompts]) + torch.arange(len(prompts)) * ids.shape[1]
    positions = (first[:, None] + torch.arange(len(label) + 1)).flatten()
    logits = learner.forward(ids.to(device), mask.to(device), positions.to(device))
    wanted = torch.tensor([*label, end_of_answer], device=device).repeat(len(prompts), 1)
    found = torch.log_softmax(logits.float(), dim=-1).view(*wanted.shape, -1).gather(2, wanted.unsqueeze(-1))
    return found.sum(dim=(1, 2)).cpu().numpy()

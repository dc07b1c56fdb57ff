"""Classification by scoring the label texts: one forward pass over the prompt and a trie of all labels' tokens.

score(label) = sum of the log-probabilities of the label's tokens and of the end-of-answer token (METHODS section 5).
The trie's tokens follow the prompt in the same row; an attention mask lets each see the prompt and its own ancestors
only, so the prompt is computed once, label texts share their beginnings, and the scores equal one forward pass per
label.

Legend: B rows, P padded prompt length, N trie nodes, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_contracts.errors import UserError
from pipeline.backbones.families import sliding_window
from pipeline.data.collate import pad_right
from pipeline.placement.learner import Learner
from pipeline.placement.rounds import run_batches


@dataclass(frozen=True)
class LabelTrie:
    """All labels' token sequences with shared beginnings. Node i has a token, a parent (-1: the prompt) and a depth."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]  # nodes of each label, first token first

    @property
    def size(self) -> int:
        return len(self.tokens)


def build_trie(label_ids: Sequence[Sequence[int]]) -> LabelTrie:
    """Trie over the labels' tokens (C sequences, none empty)."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    paths = []
    for label in label_ids:
        path, parent = [], -1
        for depth, token in enumerate(label):
            if (parent, token) not in nodes:
                nodes[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                depths.append(depth)
            parent = nodes[parent, token]
            path.append(parent)
        paths.append(tuple(path))
    return LabelTrie(tuple(tokens), tuple(parents), tuple(depths), tuple(paths))


@torch.no_grad()
def score_prompts(
    learner: Learner, prompts: Sequence[Sequence[int]], trie: LabelTrie, end_of_answer: int
) -> torch.Tensor:
    """Log-probability of every label for every prompt: (B, C), fp32 on CPU. Collective under ZeRO-3."""
    ids, mask = pad_right(prompts)
    batch, width = ids.shape
    lengths = mask.sum(dim=1)
    device = learner.world.device
    full = torch.cat([ids, torch.tensor(trie.tokens).expand(batch, -1)], dim=1)
    depths = torch.tensor(trie.depths)
    position_ids = torch.cat([torch.arange(width).expand(batch, -1), lengths[:, None] + depths], dim=1)
    # states that predict something: the prompt's last token and every trie node
    offsets = torch.arange(batch)[:, None] * full.shape[1]
    asked = torch.cat([lengths[:, None] - 1, (width + torch.arange(trie.size)).expand(batch, -1)], dim=1) + offsets
    attention = trie_attention(mask, trie)
    logits = learner.forward(full.to(device), attention.to(device), asked.flatten().to(device), position_ids.to(device))
    log_probabilities = torch.log_softmax(logits.float(), dim=-1).view(batch, 1 + trie.size, -1)
    scores = []
    for path in trie.paths:
        before = [0, *(node + 1 for node in path)]  # states before each token of the path and before the end
        wanted = [*(trie.tokens[node] for node in path), end_of_answer]
        scores.append(log_probabilities[:, before, wanted].sum(dim=1))
    return torch.stack(scores, dim=1).cpu()


def trie_attention(mask: torch.Tensor, trie: LabelTrie) -> torch.Tensor:
    """(B, 1, P + N, P + N) boolean: prompt tokens are causal; a node sees the prompt's real tokens, its ancestors,
    itself.
    """
    batch, width = mask.shape
    total = width + trie.size
    allowed = torch.zeros(batch, total, total, dtype=torch.bool)
    allowed[:, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril()
    allowed[:, width:, :width] = mask.bool()[:, None, :]
    for node in range(trie.size):
        ancestor = node
        while ancestor >= 0:
            allowed[:, width + node, width + ancestor] = True
            ancestor = trie.parents[ancestor]
    return allowed[:, None]


def score_rows(
    learner: Learner,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    end_of_answer: int,
    batch_tokens: int,
) -> np.ndarray:
    """Scores of many prompts on all ranks: (rows, C) fp32, the same on every rank. Collective.

    Batches depend on the prompts' lengths and the world size alone; each rank takes every world-size-th of them.
    """
    trie = build_trie(label_ids)
    check_window(learner, max(map(len, prompts)) + max(trie.depths) + 1)
    learner.model.eval()
    result = np.zeros((len(prompts), len(label_ids)), dtype=np.float32)
    for rows, scores in run_batches(
        learner.world,
        [len(prompt) + trie.size for prompt in prompts],
        batch_tokens,
        lambda rows: score_prompts(learner, [prompts[row] for row in rows], trie, end_of_answer).numpy(),
    ):
        result[rows] = scores
    return result


def check_window(learner: Learner, tokens: int) -> None:
    """Refuse rows longer than a sliding attention window: the label trie's mask does not model one."""
    window = sliding_window(learner.model.backbone.config)
    if window is not None and tokens > window:
        raise UserError(
            f"a row of {tokens} tokens exceeds the backbone's attention window of {window}; lower limits.max_tokens"
        )

"""From rows of a token shard to the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """One training pass of one rank. B rows, S tokens, P answer tokens; all tensors on the device."""

    input_ids: torch.Tensor  # (B, S), padded on the right
    attention_mask: torch.Tensor  # (B, S), 1 for a real token
    positions: torch.Tensor  # (P,) flattened indices of the states that predict answer tokens
    targets: torch.Tensor  # (P,) the answer tokens, the end-of-answer token included
    target_weight: torch.Tensor  # (P,) 1, or 0 for a spare row
    row_weight: torch.Tensor  # (B,) the same for rows
    places: tuple[int, ...]  # place of each row in its global batch
    step: int
    global_rows: int  # rows of the global batch, over all ranks
    world_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.input_ids.numel()


def pad_right(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) and mask (B, S) of rows padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids, mask


def collate(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end_of_answer: int,
    *,
    places: tuple[int, ...],
    weight: float,
    step: int,
    global_rows: int,
    world_size: int,
    device: torch.device,
) -> MicroBatch:
    """Prompt + answer + end of answer for each row; only answer tokens (and the end) are targets."""
    closed = [[*answer, end_of_answer] for answer in answers]
    # the last token predicts nothing, so it is not read
    ids, mask = pad_right([[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, closed, strict=True)])
    width = ids.shape[1]
    positions = [
        row * width + len(prompt) - 1 + offset
        for row, (prompt, answer) in enumerate(zip(prompts, closed, strict=True))
        for offset in range(len(answer))
    ]
    targets = torch.tensor([token for answer in closed for token in answer])
    return MicroBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        positions=torch.tensor(positions, device=device),
        targets=targets.to(device),
        target_weight=torch.full((len(targets),), weight, device=device),
        row_weight=torch.full((len(places),), weight, device=device),
        places=places,
        step=step,
        global_rows=global_rows,
        world_size=world_size,
    )

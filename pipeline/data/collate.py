"""From rows of a token shard to the tensors of one forward pass.

Training rows are packed: several sequences stand one after another in a tensor row as long as the longest of them,
so that hardly a token is padding. Position ids start again with every sequence; where no attention mask is given,
transformers reads from them that sequences must not see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class MicroBatch:
    """One training pass of one rank: B sequences in N tensor rows of S tokens, P answer tokens. Tensors on the
    device.
    """

    input_ids: torch.Tensor  # (N, S)
    position_ids: torch.Tensor  # (N, S), from 0 in every sequence
    pool: torch.Tensor  # (B, N * S): 1 at each token of a sequence, else 0
    positions: torch.Tensor  # (P,) flattened indices of the states that predict answer tokens
    targets: torch.Tensor  # (P,) the answer tokens, the end-of-answer token included
    target_weight: torch.Tensor  # (P,) 1, or 0 for a spare row
    row_weight: torch.Tensor  # (B,) the same for sequences
    places: tuple[int, ...]  # place of each sequence in its global batch
    step: int
    global_rows: int  # sequences of the global batch, over all ranks
    world_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch on a device; from pinned memory, so that the copy waits for nothing but its own stream."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{n: tensor.pin_memory().to(device, non_blocking=True) for n, tensor in tensors.items()})


@dataclass(frozen=True)
class Packed:
    """Sequences laid into N tensor rows of S tokens."""

    input_ids: torch.Tensor  # (N, S)
    position_ids: torch.Tensor  # (N, S)
    starts: tuple[int, ...]  # flattened index of each sequence's first token

    def pool(self, lengths: Sequence[int]) -> torch.Tensor:
        """(B, N * S): 1 at each token of a sequence, else 0."""
        members = torch.zeros(len(self.starts), self.input_ids.numel())
        for row, (start, length) in enumerate(zip(self.starts, lengths, strict=True)):
            members[row, start : start + length] = 1
        return members


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Lay sequences into rows as long as the longest: each goes, longest first, into the first row with room left."""
    width = max(map(len, sequences))
    used: list[int] = []
    starts = [0] * len(sequences)
    for index in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
        length = len(sequences[index])
        row = next((row for row, taken in enumerate(used) if taken + length <= width), len(used))
        if row == len(used):
            used.append(0)
        starts[index] = row * width + used[row]
        used[row] += length
    ids = torch.zeros(len(used) * width, dtype=torch.long)
    position_ids = torch.zeros(len(used) * width, dtype=torch.long)  # padding: each token a sequence of its own
    for start, sequence in zip(starts, sequences, strict=True):
        ids[start : start + len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
        position_ids[start : start + len(sequence)] = torch.arange(len(sequence))
    return Packed(ids.view(-1, width), position_ids.view(-1, width), tuple(starts))


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) and mask (B, S) of rows padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
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
    read = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, closed, strict=True)]
    packed = pack(read)
    positions = [
        start + len(prompt) - 1 + offset
        for start, prompt, answer in zip(packed.starts, prompts, closed, strict=True)
        for offset in range(len(answer))
    ]
    targets = torch.tensor([token for answer in closed for token in answer])
    return MicroBatch(
        input_ids=packed.input_ids.to(device),
        position_ids=packed.position_ids.to(device),
        pool=packed.pool([len(sequence) for sequence in read]).to(device),
        positions=torch.tensor(positions, device=device),
        targets=targets.to(device),
        target_weight=torch.full((len(targets),), weight, device=device),
        row_weight=torch.full((len(places),), weight, device=device),
        places=places,
        step=step,
        global_rows=global_rows,
        world_size=world_size,
    )

"""Packed training rows: the loss is on answer tokens alone, and equals each row computed alone, however cut."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.backbones.answer_model import AnswerModel
from pipeline.data.batching import micro_batches
from pipeline.data.collate import pack, pad_right
from tests.helpers import largest_difference, micro_batch, ragged, tiny_llama

VOCAB, END = 59, 0
PROMPTS = ragged([8, 3, 1, 12, 5, 2, 9], VOCAB, seed=1)
ANSWERS = ragged([1, 4, 2, 1, 6, 1, 3], VOCAB, seed=2)
LENGTHS = [len(p) + len(a) + 1 for p, a in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def model():
    """fp64, so that a wrong token cannot hide in rounding."""
    backbone = tiny_llama(VOCAB, num_layers=2).double()
    return AnswerModel(backbone)


def naive_nll(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """-sum log p(answer token or end | all before) from one stock pass over the row alone."""
    row = [*prompt, *answer, END]
    logits = model.backbone(input_ids=torch.tensor([row])).logits[0]
    total = 0
    for place in range(len(prompt), len(row)):
        before = logits[place - 1]
        total = total + torch.logsumexp(before, dim=0) - before[row[place]]
    return total


def packed_nll(model, batch) -> torch.Tensor:
    """What the loop computes on a micro-batch, over logits of the asked positions."""
    logits = model(batch.input_ids, None, batch.positions, batch.position_ids)
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.target_weight).sum()


def rows_of(places, **changes):
    return micro_batch(
        [PROMPTS[i] for i in places], [ANSWERS[i] for i in places], END, places=tuple(places), global_rows=7, **changes
    )


@pytest.mark.parametrize("places", [[0], [3, 2], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
def test_loss_equals_each_row_computed_alone(model, places):
    with torch.no_grad():
        ours = packed_nll(model, rows_of(places))
        theirs = sum(naive_nll(model, PROMPTS[i], ANSWERS[i]) for i in places)
    assert abs(float(ours - theirs)) < 1e-10


def test_targets_are_answer_tokens_and_the_end_and_nothing_else():
    batch = rows_of(range(7))
    expected = [[*answer, END] for answer in ANSWERS]
    assert batch.targets.tolist() == [token for answer in expected for token in answer]
    ids = batch.input_ids.flatten()
    reading = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        reading += [prompt[-1], *answer]  # the token whose state predicts the next target
    assert ids[batch.positions].tolist() == reading
    assert len(set(batch.positions.tolist())) == len(reading)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("max_rows", "max_tokens"), [(7, 1000), (2, 40), (1, 1), (3, 20)])
def test_any_cut_over_ranks_and_passes_sums_to_the_same_loss_and_gradient(model, world_size, max_rows, max_tokens):
    with torch.no_grad():
        expected = sum(naive_nll(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True))
    model.zero_grad()
    total, passes = 0.0, 0
    for rank in range(world_size):
        for part in micro_batches(LENGTHS, rank, world_size, max_rows, max_tokens):
            loss = packed_nll(model, rows_of(part.places, weight=part.weight, world_size=world_size))
            loss.backward()
            total, passes = total + loss.item(), passes + 1
    assert abs(total - expected.item()) < 1e-10
    assert passes > 1 or (world_size, max_rows) == (1, 7)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sum(naive_nll(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)).backward()
    assert largest_difference(ours, {name: parameter.grad for name, parameter in model.named_parameters()}) < 1e-9


def test_a_spare_row_changes_neither_loss_nor_gradient(model):
    model.zero_grad()
    batch = rows_of([2, 4], weight=0.0)
    loss = packed_nll(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert batch.row_weight.tolist() == [0.0, 0.0]


def test_packing_places_every_sequence_whole_once_and_restarts_its_positions():
    for seed in range(20):
        lengths = torch.randint(1, 15, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        sequences = ragged(lengths, VOCAB, seed=seed)
        packed = pack(sequences)
        ids, places = packed.input_ids.flatten().tolist(), packed.position_ids.flatten().tolist()
        width = packed.input_ids.shape[1]
        owner = [0] * len(ids)
        for start, sequence in zip(packed.starts, sequences, strict=True):
            end = start + len(sequence)
            assert ids[start:end] == sequence and places[start:end] == list(range(len(sequence)))
            assert start // width == (end - 1) // width  # in one tensor row
            for place in range(start, end):
                owner[place] += 1
        assert set(owner) <= {0, 1}
        assert all(places[i] == 0 for i, owned in enumerate(owner) if not owned)
        assert width == max(lengths)
        assert packed.input_ids.shape[0] <= len(sequences)  # never more than padding would take


def test_pool_marks_the_tokens_that_are_read():
    batch = rows_of(range(7))
    read = [len(p) + len(a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # the end is predicted, not read
    assert batch.pool.shape == (7, batch.num_tokens)
    for row, length in enumerate(read):
        places = batch.pool[row].nonzero().flatten().tolist()
        assert len(places) == length
        assert batch.pool[row, places].tolist() == [1.0] * length
        tokens = batch.input_ids.flatten()[places].tolist()
        assert tokens == [*PROMPTS[row], *ANSWERS[row]]
    assert batch.pool.count_nonzero(dim=0).max() == 1  # no token belongs to two sequences


def test_padding_on_the_right_is_masked():
    ids, mask = pad_right([[5, 6, 7], [8]])
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (ids * mask).tolist() == [[5, 6, 7], [8, 0, 0]]

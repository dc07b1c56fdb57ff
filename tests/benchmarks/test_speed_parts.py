"""The arithmetic of the speed benchmark, and that its peers compute what ours computes."""

import json
import math

import numpy as np
import pytest
import torch

from data_contracts.errors import UserError
from pipeline.benchmarks.speed.flops import gemm_flops, step_flops
from pipeline.benchmarks.speed.naive_dual import naive_loss, wrap
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.report import as_table, draw
from pipeline.benchmarks.speed.samples import compare, interleave, rates, ratio, summary
from pipeline.benchmarks.speed.scoring import score_by_label
from pipeline.benchmarks.speed.tasks import label_names, most_labels, task_contract, task_names
from pipeline.benchmarks.speed.trainer import CONTENDERS, training_report
from pipeline.benchmarks.speed.validation import row_by_row, row_model, synthetic_contract, synthetic_rows, vectorised
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.lora import LoraOptions
from pipeline.placement.architecture import read_architecture
from pipeline.placement.trainable import MethodChoice, trainable_of
from tests.helpers import light_learner, micro_batch, ragged, randomise, tiny_llama

VOCAB = 67
PLAN = ExpertPlan(LoraOptions(rank=3, alpha=6, dropout=0.0), ("shared", "dedicated"))
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6,
    "vocab_size": 10,
}


def test_contenders_take_turns_and_warm_up_rounds_are_not_counted():
    calls = []
    contenders = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    seconds = interleave(contenders, repeats=2, warmup=1)
    assert calls == [(name, number) for number in range(3) for name in "abc"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_median_and_quartiles_are_those_worked_out_by_hand():
    assert summary([4.0, 1.0, 3.0, 2.0, 10.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "samples": [4.0, 1.0, 3.0, 2.0, 10.0],
    }
    assert summary([1.0, 2.0])["median"] == 1.5 and summary([1.0, 2.0])["quartiles"] == [1.25, 1.75]
    assert summary([7.0])["quartiles"] == [7.0, 7.0]


def test_a_ratio_is_taken_round_by_round():
    # the medians are 4 and 2, and neither their ratio nor that of the sums is the answer
    assert ratio([3.0, 4.0, 20.0], [1.0, 5.0, 2.0])["samples"] == [3.0, 0.8, 10.0]
    assert ratio([3.0, 4.0, 20.0], [1.0, 5.0, 2.0])["median"] == 3.0
    report = compare({"ours": [1.0, 2.0], "peer": [3.0, 4.0]}, [("peer", "ours")])
    assert report["ratios"]["peer / ours"]["median"] == 2.5 and report["seconds"]["ours"]["median"] == 1.5
    assert rates([10, 30], [2.0, 3.0])["samples"] == [5.0, 10.0]


def test_training_report_compares_runs_of_the_same_round():
    note = {"rows": 8, "tokens": 100, "bytes_before_training": 5, "mean_loss": 1.0}
    times = {"sequential": [1.0, 2.0], "moe_cl": [1.5, 2.0], "peft_trainer": [2.0, 6.0]}
    peaks = {"sequential": [10, 30], "moe_cl": [20, 20], "peft_trainer": [40, 60]}
    assert set(times) == set(CONTENDERS)
    report = training_report(
        {
            name: [note | {"seconds": s, "peak_bytes": peak} for s, peak in zip(times[name], peaks[name], strict=True)]
            for name in times
        }
    )
    assert report["ratios"]["peft_trainer / sequential"]["samples"] == [2.0, 3.0]
    assert report["ratios"]["moe_cl / sequential"]["median"] == 1.25
    assert report["figures"]["sequential"]["peak_bytes"] == 20
    assert report["figures"]["peft_trainer"]["rows_per_second"]["samples"] == [4.0, 8 / 6]


@pytest.mark.parametrize(("method", "low_rank"), [("sequential", 60), ("moe_cl", 136)])
def test_operations_of_a_step_are_those_counted_by_hand(method, low_rank):
    architecture = read_architecture(CONFIG)
    flops = step_flops(architecture, trainable_of(architecture, MethodChoice(method, rank=1)), [3], answer_tokens=2)
    # a layer: q 16, k 8, v 8, o 16, three FFN maps of 24 elements; 3 tokens
    assert flops.frozen == 2 * (2 * 3 * 120) + 2 * 3 * 120 + 2 * 3 * 24  # forward; backward of layer 1, of layer 0
    assert flops.attention == 2 * 72 + 144  # 2 n^2 H d = 2 * 9 * 4 a layer
    # pairs of 10 elements on three maps of two layers, for each role; moe_cl also has two gates of 8
    assert flops.low_rank == 6 * 3 * low_rank
    assert flops.head == 4 * 2 * 4 * 10
    assert flops.total == flops.frozen + flops.attention + flops.low_rank + flops.head
    assert gemm_flops(architecture, 3) % (2 * 3 * 120) == 0


def test_the_naive_formula_computes_what_the_expert_ffn_computes():
    learner = light_learner(tiny_llama(VOCAB, num_layers=2), PLAN)
    randomise(learner)
    naive = tiny_llama(VOCAB, num_layers=2)
    ffns = wrap(naive, rank=3, scaling=2.0)
    with torch.no_grad():
        for index, ffn in enumerate(ffns):
            for role, expert in zip(("shared", "dedicated"), ffn.experts, strict=True):
                for name, pair in expert.items():
                    for part in ("lora_A", "lora_B"):
                        ours = learner.parameters[f"{role}/model.layers.{index}.mlp.{name}.{part}"]
                        getattr(pair, part).copy_(ours)
            ffn.gate.weight.copy_(learner.parameters[f"gate/model.layers.{index}.mlp.gate.weight"])
            ffn.classifier.weight.zero_()
            ffn.classifier.bias.zero_()
    batch = micro_batch(ragged([7, 4, 9], VOCAB, seed=1), ragged([2, 1, 3], VOCAB, seed=2))
    with torch.no_grad():
        logits = learner.forward(batch.input_ids, None, batch.positions, batch.position_ids)
        answers = -torch.log_softmax(logits, dim=-1).gather(1, batch.targets[:, None]).mean()
        loss = naive_loss(naive, ffns, batch, answer_tokens=len(batch.targets))
    bare = tiny_llama(VOCAB, num_layers=2)(batch.input_ids, position_ids=batch.position_ids).logits
    assert (bare.flatten(0, 1)[batch.positions] - logits).abs().max() > 0.1  # the experts speak
    # a classifier of zeros finds all of its eight classes alike
    assert abs(loss.item() - (answers.item() + 0.1 * math.log(8))) < 1e-5


def test_everything_the_naive_formula_trains_gets_a_gradient_and_nothing_else():
    model = tiny_llama(VOCAB, num_layers=2)
    ffns = wrap(model, rank=3, scaling=2.0)
    batch = micro_batch(ragged([7, 4], VOCAB, seed=1), ragged([2, 1], VOCAB, seed=2))
    naive_loss(model, ffns, batch, answer_tokens=5).backward()
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == asked
    assert len(asked) == 2 * (2 * 3 * 2 + 1 + 2)  # layers x (experts x maps x pair, gate, classifier)


def test_one_forward_per_label_scores_the_label_and_the_end():
    learner = light_learner(tiny_llama(VOCAB, num_layers=2), PLAN)
    randomise(learner, scale=0.3)
    prompts, labels = ragged([5, 9, 2], VOCAB, seed=3), [(5,), (5, 6, 7), (9, 8)]
    scores = score_by_label(learner, prompts, labels, 0, batch_tokens=30)
    expected = np.zeros((3, 3))
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            with torch.no_grad():
                logits = learner.model.backbone(input_ids=torch.tensor([[*prompt, *label]])).logits[0].double()
            for offset, token in enumerate([*label, 0]):
                expected[i, j] += torch.log_softmax(logits[len(prompt) - 1 + offset], dim=-1)[token].item()
    assert np.ptp(expected) > 1 and np.abs(scores - expected).max() < 1e-4


def test_both_ways_of_validation_reject_the_rows_that_break_the_contract():
    contract, table = synthetic_contract(), synthetic_rows(200)
    reasons = vectorised(contract, table).to_pylist()
    broken = {place: reason for place, reason in enumerate(reasons) if reason}
    expected = {
        7: "null",
        23: "rule:min_length:text",
        41: "unknown_label",
        59: "null",
        73: "rule:max_length:text",
    }
    assert broken == expected | {place + 100: reason for place, reason in expected.items()}
    model, records = row_model(contract), table.to_pylist()
    assert row_by_row(model, records) == 10
    for place, record in enumerate(records):
        assert row_by_row(model, [record]) == (place in broken)


def test_a_task_folder_becomes_a_contract_that_cuts_long_rows(data_root):
    assert task_names(str(data_root)) == ["copying", "first", "second"]
    assert label_names(str(data_root), "first") == ["negative", "neutral", "positive"]
    assert most_labels(str(data_root)) == "copying"
    contract = task_contract(str(data_root), "first", 48)
    assert contract.labels == {name: f" {name}" for name in ("negative", "neutral", "positive")}
    assert contract.limits.max_tokens == 48 and contract.limits.too_long == "truncate"
    with pytest.raises(UserError, match="the tasks of --data are copying, first, second"):
        label_names(str(data_root), "third")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cases": ("step", "speed")}, "choose from"), ({"repeats": 0}, "--repeats is 0"), ({"max_tokens": 8}, "32")],
)
def test_options_that_leave_nothing_to_measure_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SpeedOptions(backbone="b", data="d", **changes)


def test_the_table_shows_medians_and_leaves_out_empty_columns(tmp_path):
    case = compare({"ours": [1.0, 1.5, 2.0], "peer": [3.0, 3.0, 5.0]}, [("peer", "ours")])
    case["figures"] = {"ours": {"peak_bytes": 2_000_000}}
    report = {
        "machine": {"processor": "A processor", "cores": 2, "torch_threads": 1},
        "cases": {"step": case, "evaluation": case},
    }
    lines = as_table(report).splitlines()
    assert lines[0] == "A processor, 2 cores, 1 torch threads"
    assert lines[2:5] == ["step", lines[3], lines[4]]
    assert lines[3].split() == ["seconds", "quartiles", "peak", "MB"]
    assert lines[4].split() == ["ours", "1.5", "1.25", "to", "1.75", "2"]
    assert lines[7].split() == ["peer", "/", "ours", "2.500", "2.250", "to", "2.750"]
    assert len({len(line) for line in lines[6:8]}) == 1
    draw(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report)

"""The trainer case on a tiny backbone: ours and the peer learn the same rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data_contracts.errors import UserError
from pipeline.benchmarks.speed.contenders import write_spec
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.tasks import prepare_task
from pipeline.benchmarks.speed.trainer import PEER, measure_training, train_in_child
from pipeline.benchmarks.speed.trainer_child import main, peer_rows

WARMUP, STEPS, BATCH = 1, 3, 4


@pytest.fixture(scope="module")
def options(backbone_dir, data_root) -> SpeedOptions:
    """Four steps of four rows in fp32."""
    made = SpeedOptions(str(backbone_dir), str(data_root), warmup=WARMUP, steps=STEPS, batch_size=BATCH, rank=3)
    return replace(made, max_tokens=64, dtype="float32")


@pytest.fixture(scope="module")
def prepared(options, tokenizer, tmp_path_factory):
    """The task and its shards."""
    shards = tmp_path_factory.mktemp("shards") / "first"
    return prepare_task(options.data, "first", tokenizer, options.max_tokens, shards), shards


@pytest.fixture(scope="module")
def notes(options, prepared, tmp_path_factory) -> dict[str, dict]:
    """One run of ours in a process of its own, beside one of the peer in this one: nothing is timed here."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(train_in_child, options, *prepared, "moe_cl", folder / "ours")
        spec = write_spec(options, *prepared, folder / "peer", contender=PEER)
        main(str(spec))
        return {"moe_cl": ours.result(timeout=150), PEER: json.loads(spec.with_name("note.json").read_text())}


def test_ours_and_the_peer_count_the_same_steps_rows_and_tokens(notes):
    for note in notes.values():
        assert note["steps"] == STEPS and note["rows"] == STEPS * BATCH
        assert note["tokens"] == notes[PEER]["tokens"] > STEPS * BATCH
        assert note["seconds"] > 0
        assert note["peak_bytes"] >= note["bytes_before_training"] > 10_000_000


def test_the_peer_learns_from_the_same_batches(notes):
    """The learning rate is small and every LoRA pair starts at zero: the mean losses are the untrained backbone's."""
    assert notes["moe_cl"]["mean_loss"] == pytest.approx(notes[PEER]["mean_loss"], rel=0.01)
    assert notes[PEER]["mean_loss"] > 1


def test_the_peer_is_asked_for_answers_and_their_end_alone(options, prepared):
    rows = prepared[0].rows("train", 5, options.seed)
    order = np.array([3, 0, 4])
    prompts, answers = rows.tokens(order)
    made = peer_rows(rows, order)
    for row, prompt, answer in zip(made, prompts, answers, strict=True):
        assert row["input_ids"] == prompt + answer + [rows.end_of_answer]
        assert row["labels"] == [-100] * len(prompt) + answer + [rows.end_of_answer]
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_more_steps_than_there_are_rows_for_is_refused(options, prepared, tmp_path):
    with pytest.raises(UserError, match="takes 404 rows, and train has 48"):
        measure_training(replace(options, steps=100), *prepared, tmp_path)

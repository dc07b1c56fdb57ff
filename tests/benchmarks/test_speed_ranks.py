"""The ranks case: what its report says of its runs' notes, and the plan's bytes for the worlds it starts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from data_contracts.errors import UserError
from pipeline.benchmarks.speed.collectives import KINDS
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.ranks import (
    PAIRS,
    WORLDS,
    breakdown,
    measure_ranks,
    planned,
    ranks_report,
    train_in_world,
)
from pipeline.benchmarks.speed.tasks import prepare_task

LAYERS, D, F, KV, VOCABULARY, RANK, BYTES = 3, 48, 92, 24, 330, 3, 2
# both LoRA experts on three projections, gate, discriminator of eight outputs
TRAINED = LAYERS * (2 * 3 * RANK * (D + F) + 2 * D + 8 * D + 8)
# norms of each layer and the last; attention and network of each layer, two tables
NORMS = LAYERS * 2 * D + D
MATRICES = LAYERS * (2 * D * D + 2 * D * KV + 3 * D * F) + 2 * VOCABULARY * D


@pytest.fixture(scope="module")
def options(backbone_dir, data_root) -> SpeedOptions:
    return SpeedOptions(str(backbone_dir), str(data_root), rank=RANK)


def step(seconds: float, waiting: float = 0.0, passes: int = 2) -> dict[str, float]:
    """A step's note: a tenth of it gathers, a twentieth reduces."""
    parts = {"gather": 0.1 * seconds, "reduce": 0.05 * seconds, "scalar": 0.0}
    note = {f"{kind}_seconds": parts[kind] for kind in KINDS} | {f"{kind}_calls": 1 for kind in KINDS}
    note |= {f"{kind}_bytes": 100 for kind in KINDS}
    return {"seconds": seconds, "waiting_seconds": waiting, "passes": passes, "loss": 1.0, **note}


def test_ratios_rates_and_the_fullest_rank_follow_from_the_notes(options):
    notes = {}
    for place, name in enumerate(WORLDS, start=1):
        rank = {"steps": [step(place / 2)] * 2, "probed": [step(place, 0.2 * place)], "threads": 1}
        ranks = [rank | {"peak_bytes": size} for size in (10 * place, 20 * place)]
        notes[name] = [{"seconds": float(place), "rows": 8, "tokens": 60, "loss": 1.0, "ranks": ranks}] * 3
    report = ranks_report(options, notes)
    order = list(WORLDS)
    assert {name: ratio["median"] for name, ratio in report["ratios"].items()} == {
        f"{a} / {b}": (order.index(a) + 1) / (order.index(b) + 1) for a, b in PAIRS
    }
    last = report["figures"][order[-1]]
    assert last["tokens_per_second"]["median"] == 60 / len(WORLDS)
    assert last["peak_bytes"] == 20 * len(WORLDS)
    assert last["step"]["gather_bytes"] == 100 and last["step"]["gather_seconds"] == pytest.approx(0.2)


def test_the_parts_of_a_probed_step_make_it_up():
    parts = breakdown([step(2.0, 0.5)])
    assert parts == pytest.approx({"step": 2.0, "gather": 0.2, "reduce": 0.1, "waiting": 0.5, "rest": 1.2})


def test_planned_bytes_of_a_tiny_backbone_are_the_sum_by_hand(options):
    """The shipped threshold of 1,000 elements keeps norms and what is trained whole: gathered once, after the step."""
    assert planned(options, 2, 1, 1) == {"gather_bytes": 0, "reduce_bytes": 0}
    assert planned(options, 3, 1, 1) == {"gather_bytes": 0, "reduce_bytes": 0}
    assert planned(options, 2, 2, 1) == {"gather_bytes": TRAINED, "reduce_bytes": BYTES * TRAINED}
    # half of two bytes an element come from the other rank; matrices and gradients twice, in two micro-batches
    gathered = TRAINED + NORMS + 2 * MATRICES
    assert planned(options, 3, 2, 2) == {"gather_bytes": gathered, "reduce_bytes": 2 * BYTES * TRAINED}


def test_a_run_that_takes_more_rows_than_there_are_is_refused(options, tmp_path):
    with pytest.raises(UserError, match="train has 3; lower --steps"):
        measure_ranks(options, SimpleNamespace(splits={"train": [0] * 3}), tmp_path, tmp_path)


def test_two_ranks_under_zero_3_gather_and_reduce_the_plans_bytes(options, tokenizer, tmp_path):
    options = replace(options, warmup=1, steps=2, batch_size=4, max_tokens=64)
    prepared = prepare_task(options.data, "first", tokenizer, options.max_tokens, tmp_path / "shards")
    note = train_in_world(options, prepared, tmp_path / "shards", "zero3 x2", tmp_path / "run")
    for rank in note["ranks"]:
        assert len(rank["steps"]) == 2
        for step in rank["steps"]:
            plans = planned(options, 3, 2, step["passes"])
            assert {name: step[name] for name in plans} == plans and min(plans.values()) > 0
    report = ranks_report(options, {name: [note] for name in WORLDS})
    assert report["figures"]["zero3 x2"]["rows_per_second"]["median"] == pytest.approx(8 / note["seconds"])

"""Rows without a task id, and rows that need no review, as whole jobs: in a plain process and on two ranks."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs import audit
from pipeline.evaluation.task_router import random_signs
from tests.helpers import build_tokenizer
from tests.jobs.routed import ROUTER
from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


def test_the_router_is_published_once_for_all_tasks_and_audited(methods, capsys):
    work_dir, done = methods["sequential"]
    assert done.code == 0, done.text
    first, second = manifests(work_dir)
    for manifest in (first, second):
        assert manifest["state"] == {"router": manifest["bank"]["router"]}
        assert set(manifest["row_inferred"]) == set(manifest["row"])
    assert first["row_inferred"] == first["row"]  # with one task there is nothing to choose
    state = json.loads((work_dir / "champion.json").read_text())["state"]
    assert state == {"second": {"router": second["bank"]["router"]}}
    assert "the task of every row chosen by the router" in done.stdout
    assert audit.main(["--work-dir", str(work_dir)]) == 0, capsys.readouterr().out


def test_predict_auto_chooses_and_answers_as_the_row_without_task_ids_did(methods):
    out, done = methods["auto"]
    assert done.code == 0, done.text
    work_dir, _ = methods["sequential"]
    recorded = pq.read_table(work_dir / "increments" / "0002-second" / "predictions_inferred" / "first.parquet")
    rows = pq.read_table(out).to_pylist()
    assert len({row["task"] for row in rows}) == 2  # the tasks' texts are alike: some go astray
    for row, then in zip(rows, recorded.to_pylist(), strict=True):
        assert (row["row_id"], row["task"], row["answer"]) == (then["row_id"], then["task"], then["answer"])
        assert row["task_score"] == pytest.approx(then["task_score"], abs=1e-4)
    counts = {task: sum(row["task"] == task for row in rows) for task in ("first", "second")}
    assert f"task: {counts['first']} first, {counts['second']} second" in done.stdout
    row = json.loads((work_dir / "increments" / "0002-second" / "row.json").read_text())
    assert row["routing"]["first"] == counts and row["test_inferred"]["first"] == pytest.approx(
        sum(row["answer"] == row["reference"] for row in recorded.to_pylist()) / 20
    )


def test_predict_decides_what_the_published_thresholds_decide(methods):
    out, _ = methods["auto"]
    work_dir, _ = methods["sequential"]
    review = json.loads((work_dir / "increments" / "0002-second" / "review.json").read_text())
    for row in pq.read_table(out).to_pylist():
        floor = review[row["task"]]["thresholds"][row["answer"]]
        assert row["decision"] == ("review" if floor is None or row["score"] < floor else "decided")


def test_two_increments_are_compared_by_review_cost(methods):
    work_dir, done = methods["review"]
    assert done.code == 0, done.text
    shares = re.findall(r"increment (\d) +([\d.]+) % of 20 test rows", done.stdout)
    for number, share in shares:
        folder = next((work_dir / "increments").glob(f"000{number}-*"))
        test = json.loads((folder / "review.json").read_text())["first"]["test"]
        assert float(share) == pytest.approx(100 * test["stripping_rate"], abs=0.05)
    assert [number for number, _ in shares] == ["1", "2"] and "95 % interval" in done.stdout


@torch.no_grad()
def test_two_expert_parallel_ranks_sum_what_the_stock_model_reads(routed, inputs):
    assert routed.done["zero3_ep2"].code == 0, routed.done["zero3_ep2"].text
    work_dir = routed.work_dirs["zero3_ep2"]
    sums = load_file(work_dir / "bank" / f"{manifests(work_dir)[0]['bank']['router']}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(work_dir.parents[1] / "hunyuan_v1_moe", dtype=torch.float32).eval()
    tokenizer, normal, moment = build_tokenizer(), 0.0, 0.0
    states: list[torch.Tensor] = []
    model.model.layers[ROUTER["layers"] - 1].register_forward_hook(lambda _, args, output: states.append(output[0]))
    for text in pq.read_table(inputs.root / "first" / "train.parquet")["text"].to_pylist():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
        tokens = states.pop().double()
        pooled = (tokens / tokens.pow(2).mean(dim=1, keepdim=True).sqrt()).mean(dim=0)
        pooled = (pooled / pooled.pow(2).mean().sqrt()).numpy()
        features = np.maximum(pooled @ random_signs(len(pooled), ROUTER["features"], 17).numpy(), 0)
        normal, moment = normal + np.outer(features, features), moment + features
    assert np.abs(sums["normal"].numpy() - normal).max() <= 1e-4 * np.abs(normal).max()
    assert np.abs(sums["moments"].numpy()[:, 0] - moment).max() <= 1e-4 * np.abs(moment).max()

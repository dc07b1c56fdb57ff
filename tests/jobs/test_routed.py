"""Whole jobs on mixture-of-experts backbones: every shipped expert-parallel file, every method, on 2 and 4 ranks."""

import json
import re

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from jobs import audit
from tests.jobs.launch import ROOT
from tests.jobs.routed import MISTAKES, ON_FOUR_RANKS, ON_TWO_RANKS, TWO_TASKS
from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own
LEARNED = ON_TWO_RANKS | ON_FOUR_RANKS
NUM_EXPERTS = 4


def test_every_shipped_expert_parallel_file_is_run_here():
    shipped = {path.stem for path in (ROOT / "deepspeed_configs").glob("*.json") if "ep" in path.stem}
    assert shipped == {deepspeed for _, deepspeed, _ in LEARNED.values() if "ep" in deepspeed}


def test_every_method_is_run_here():
    methods = {path.stem for path in (ROOT / "pipeline" / "methods").glob("*.py")} - {"__init__", "protocol"}
    assert methods == {method["name"] for _, _, method in LEARNED.values()}


def test_every_method_learns_two_tasks_on_a_hunyuan_mixture_shared_out_over_two_ranks():
    methods = {path.stem for path in (ROOT / "pipeline" / "methods").glob("*.py")} - {"__init__", "protocol"}
    cases = [ON_TWO_RANKS[name] for name in TWO_TASKS]
    assert methods == {m["name"] for family, file, m in cases if family == "hunyuan_v1_moe" and file.endswith("ep2")}


@pytest.mark.parametrize("name", LEARNED)
def test_a_stream_is_learned_registered_and_audited(routed, name, capsys):
    done, work_dir = routed.done[name], routed.work_dirs[name]
    assert done.code == 0, done.text
    assert [m["task"] for m in manifests(work_dir)] == ["first", "second"][: 1 + (name in TWO_TASKS)]
    assert json.loads((work_dir / "finished.json").read_text())["exit_code"] == 0
    assert audit.main(["--work-dir", str(work_dir)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, (*_, method) in LEARNED.items() if method["name"] != "zero_shot"])
def test_the_bank_holds_every_routed_expert_whatever_ranks_held_them(routed, name):
    with_experts = 0
    for manifest in manifests(routed.work_dirs[name]):
        for component in ("shared", "dedicated", "adapter"):
            if component not in manifest["bank"]:
                continue
            path = routed.work_dirs[name] / "bank" / f"{manifest['bank'][component]}.safetensors"
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    shape = file.get_slice(tensor).get_shape()
                    if manifest["method"] == "moses":  # masks are of bits, values in one row
                        if tensor.endswith(("mask", "new")) and ".experts." in tensor:
                            assert shape[0] == NUM_EXPERTS and len(shape) == 3
                            with_experts += 1
                        continue
                    assert (len(shape) == 3) == (".experts." in tensor)
                    if len(shape) == 3:
                        assert shape[0] == NUM_EXPERTS
                        with_experts += 1
    assert (with_experts > 0) == (name != "attention_alone")


@pytest.mark.parametrize(
    ("first", "second"), [("zero3_ep2", "zero2_ep2"), ("zero3_ep2", "zero3_ep4"), ("moses", "moses_zero2")]
)
def test_rows_of_r_and_steps_do_not_depend_on_the_placement(routed, first, second):
    others = manifests(routed.work_dirs[second])
    assert others
    for one, other in zip(manifests(routed.work_dirs[first]), others, strict=False):
        assert one["row"] == other["row"] and one["training"] == other["training"]


@pytest.mark.parametrize("name", ["moses", "moses_zero2"])
def test_moses_serves_the_first_task_as_it_was_and_reuses_what_it_claimed(routed, name):
    first, second = manifests(routed.work_dirs[name])
    increments = sorted((routed.work_dirs[name] / "increments").iterdir())
    answers = [(folder / "predictions" / "first.parquet").read_bytes() for folder in increments]
    assert answers[0] == answers[1]
    assert second["bundles"]["second"]["past.1"] == first["bank"]["adapter"]
    account = second["training"]
    assert account["mask_reused"] > 0 and account["stored_bytes"] < first["training"]["stored_bytes"]
    new = account["mask_parameters"] - account["mask_reused"]
    assert account["pool_claimed"] == first["training"]["pool_claimed"] + new <= account["pool_parameters"]


def test_predict_and_evaluate_give_the_published_answers_again(routed):
    assert routed.done["predict"].code == 0, routed.done["predict"].text
    increment = next((routed.work_dirs["zero3_ep2"] / "increments").glob("0002-*"))
    published = pq.read_table(increment / "predictions" / "first.parquet").to_pydict()
    again = pq.read_table(routed.answers).to_pydict()
    scores = dict(zip(published["row_id"], published["label_scores"], strict=True))
    assert len(scores) == len(again["row_id"])
    for row, found in zip(again["row_id"], again["label_scores"], strict=True):
        assert found == pytest.approx(scores[row], abs=1e-5)
    done = routed.done["evaluate"]
    assert done.code == 0, done.text
    row = manifests(routed.work_dirs["zero3_ep2"])[-1]["row"]
    for task, score in row.items():
        assert re.search(rf"{task}\s+{100 * score:.1f}", done.stdout), done.stdout


SAYS = {
    "too_many": "autoep_size 4 must divide the world of 2 ranks and the 4 routed experts of a block (rests 2 and 0); "
    "here fit 1, 2",
    "dense": "autoep_size 2: a backbone of type 'llama' has no routed experts",
    "no_judge": "method.lora.targets names none",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_placement_that_cannot_work_ends_with_exit_2_and_one_sentence(routed, name):
    done = routed.done[name]
    assert [done.code, *(other.code for other in done.others)] == [2, 2], done.text
    assert len(done.stderr.splitlines()) == 1 and SAYS[name] in done.stderr, done.text
    assert not (routed.work_dirs[name] / "increments").exists()

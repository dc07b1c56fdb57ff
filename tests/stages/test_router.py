"""The router learned increment by increment, and the row of R without task ids, on a tiny model without an engine."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_contracts import load_contract
from pipeline.config import StreamConfig
from pipeline.data.ingest import ingest
from pipeline.data.tokens import open_shards, write_shards
from pipeline.evaluation.answers import Answers
from pipeline.experts.bank import Bank
from pipeline.methods.protocol import Increment
from pipeline.methods.sequential import Options, build
from pipeline.stages.infer import infer
from pipeline.stages.job import Job
from pipeline.stages.route import learn_router, read_router, router_of
from tests.helpers import light_learner, make_task, randomise, stream_dict

ROUTER = {"layers": 2, "features": 64}


def reworded(root, name: str, **changes):
    """A task whose texts are its own: every text repeats the task's name."""
    path = make_task(root, name, **changes)
    for file in (root / name).glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        pq.write_table(pa.Table.from_pylist([{**row, "text": f"{name} " * 4 + row["text"]} for row in rows]), file)
    return path


@pytest.fixture
def world(tmp_path, backbone_dir, tiny_model, tokenizer):
    """A job with random experts in every slot, and three prepared tasks: engine, garden, and `prices`, whose prompt
    needs one more column.
    """
    root = tmp_path / "data"
    paths = [reworded(root, "engine"), reworded(root, "garden", turn=1, prompt="Say {text}\nSo:"), make_task(root, "p")]
    stream = stream_dict(tmp_path / "work", backbone_dir, root, paths, router=ROUTER, method={"name": "sequential"})
    stream["method"].pop("adversary", None)
    config = StreamConfig.model_validate(stream)
    method = build(Options.model_validate({k: v for k, v in config.method.items() if k != "name"}))
    learner = light_learner(tiny_model, method.plan)
    randomise(learner)
    bank = Bank(tmp_path / "bank")
    tasks = {}
    for path in paths[:2]:
        contract = load_contract(path)
        folder = tmp_path / contract.task
        write_shards(ingest(contract, [str(root)], tokenizer=tokenizer), tokenizer, folder)
        tasks[contract.task] = open_shards(contract, folder)
    part = learner.components["adapter"]
    bundle = {"adapter": bank.put({name: p.detach() for name, p in part.items()}, {})}
    return Job(config, learner.world, tmp_path, method, tokenizer, learner, bank, {}), tasks, bundle


def increment(task: str, order: tuple[str, ...] = (), router: str | None = None) -> Increment:
    return Increment(number=len(order) + 1, task=task, seed=17, bundles={}, states={}, order=order, router=router)


def test_an_increment_adds_its_own_rows_to_what_the_bank_holds(world):
    job, tasks, bundle = world
    job.serve(bundle)  # experts speak: the router must not hear them
    only = {"garden": tasks["garden"]}  # the earlier task's rows are not at hand any more
    first, digest = learn_router(job, increment("engine"), {"engine": tasks["engine"]})
    assert job.learner.ffns[0].active == ()
    both, _ = learn_router(job, increment("garden", ("engine",), digest), only)
    alone, _ = learn_router(job, increment("garden"), only)
    assert both.tasks == ("engine", "garden")
    assert torch.equal(both.normal, first.normal + alone.normal)
    assert torch.equal(both.moments, torch.cat([first.moments, alone.moments], dim=1))
    assert torch.equal(read_router(job, digest).weights, first.weights)
    assert router_of({"x": {"state": "s"}, "engine": {"router": digest}}) == digest and router_of({}) is None


def test_the_router_reads_the_text_alone_no_prompt_and_no_label(world):
    job, tasks, _ = world
    _, digest = learn_router(job, increment("engine"), tasks)
    asked_otherwise = tasks["engine"].contract.model_copy(update={"prompt": "Why? {text}", "labels": {"x": " y"}})
    rows = tasks["engine"].splits["train"].map(lambda row: {"prompt_ids": [7, 7], "answer_ids": [9], "label": 0})
    other = replace(tasks["engine"], contract=asked_otherwise, label_ids=((5,),), splits={"train": rows})
    assert learn_router(job, increment("engine"), {"engine": other})[1] == digest


def test_other_features_start_a_new_router_from_all_rows_at_hand(world):
    job, tasks, _ = world
    _, digest = learn_router(job, increment("engine"), tasks)
    config = job.config.model_copy(update={"router": job.config.router.model_copy(update={"features": 32})})
    job = replace(job, config=config)
    router, _ = learn_router(job, increment("garden", ("engine",), digest), tasks)
    assert router.tasks == ("engine", "garden") and router.normal.shape == (32, 32)
    assert (
        learn_router(replace(job, config=config.model_copy(update={"router": None})), increment("garden"), {}) is None
    )


def test_a_row_sent_to_another_task_is_answered_as_that_tasks_rows_are_and_judged_as_its_own(world):
    job, tasks, bundle = world
    router, _ = learn_router(job, increment("garden", ("engine",)), tasks)
    serving = {"engine": bundle, "garden": {}}
    references = {task: prepared.rows("test", None, 17).column("reference") for task, prepared in tasks.items()}
    known = {task: Answers(list(told), np.ones(len(told)), None) for task, told in references.items()}  # all right
    inferred = infer(job, router, tasks, serving, known)
    assert inferred.row == {"engine": 1.0, "garden": 1.0}
    assert inferred.routing == {task: {task: 20} for task in tasks}
    swapped = replace(router, tasks=("garden", "engine"))  # everything goes astray
    astray = infer(job, swapped, tasks, serving, known)
    assert astray.routing == {"engine": {"garden": 20}, "garden": {"engine": 20}}
    table = astray.predictions["engine"]
    assert set(table["task"].to_pylist()) == {"garden"} and set(table["answer"].to_pylist()) <= {*references["garden"]}
    right = [a == b for a, b in zip(table["answer"].to_pylist(), references["engine"], strict=True)]
    assert astray.row["engine"] == sum(right) / 20
    needs_more = tasks["garden"].contract.model_copy(update={"prompt": "{text} {price}"})
    unasked = {**tasks, "garden": replace(tasks["garden"], contract=needs_more)}
    lost = infer(job, swapped, unasked, serving, {"engine": known["engine"]})
    assert lost.row == {"engine": 0.0} and set(lost.predictions["engine"]["answer"].to_pylist()) == {""}

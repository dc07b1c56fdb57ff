"""`evaluation.earlier_tasks`: how many rows an increment scores, and what stands for the tasks it leaves out."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_contracts import load_contract
from pipeline.config import GateConfig, StreamConfig
from pipeline.data.ingest import ingest
from pipeline.data.tokens import PreparedTask, open_shards, write_shards
from pipeline.evaluation.answers import Answers
from pipeline.increments import measurable
from pipeline.methods.moe_cl import Options, build
from pipeline.methods.protocol import Increment
from pipeline.placement.distributed import World
from pipeline.stages import evaluate as stage
from pipeline.stages.gate import gate
from pipeline.stages.job import Job
from pipeline.stages.train import Trained
from pipeline.tracking.history import Entry, History
from tests.helpers import ROWS, stream_dict

BUNDLE = {role: hashlib.sha256(role.encode()).hexdigest() for role in ("shared", "dedicated", "gate")}
NEW = {role: hashlib.sha256(f"new {role}".encode()).hexdigest() for role in BUNDLE}


@pytest.fixture(scope="module")
def shards(data_root, tokenizer, tmp_path_factory) -> PreparedTask:
    """A task with 20 rows each to validate and to test."""
    contract = load_contract(data_root / "first.yaml")
    folder = tmp_path_factory.mktemp("shards") / "first"
    write_shards(ingest(contract, [str(data_root)], tokenizer=tokenizer), tokenizer, folder)
    return open_shards(contract, folder)


def stream_of(shards: PreparedTask, count: int) -> tuple[dict[str, PreparedTask], History]:
    """`count` learned tasks and a new one, all with the same rows; what the chain would say of them."""
    names = [f"task_{n}" for n in range(count)] + ["new"]
    tasks = {name: replace(shards, contract=shards.contract.model_copy(update={"task": name})) for name in names}
    history = History()
    for number, name in enumerate(names[:-1], start=1):
        contract = tasks[name].contract
        entry = Entry(number, name, name, "promoted", contract, shards.data_digests, "", {name: 0.5}, {name: 0.5})
        history.entries.append(entry)
        history.learned[name] = entry
        history.row[name] = 0.5
        history._by_task[name] = [entry]
        history.in_effect.add(number)
    return tasks, history


def evaluated(monkeypatch, tmp_path, shards, count: int, earlier_tasks: int | None) -> tuple[stage.Evaluated, int]:
    """The new task's increment after `count` others, every answer right; and how many rows were answered."""
    tasks, history = stream_of(shards, count)
    scored_rows = 0

    def answer_rows(learner, contract, prompts, *rest):
        nonlocal scored_rows
        scored_rows += len(prompts)
        return Answers(["negative"] * len(prompts), np.ones(len(prompts)), None)

    monkeypatch.setattr(stage, "answer_rows", answer_rows)
    monkeypatch.setattr(Job, "serve", lambda self, bundle: None)
    config = StreamConfig.model_validate(stream_dict(tmp_path, tmp_path, tmp_path, ["unused"]))
    world = World(rank=0, size=1, device=torch.device("cpu"))
    job = Job(config, world, tmp_path, build(Options()), None, None, None, {})
    bundles = dict.fromkeys(history.learned, BUNDLE)
    increment = Increment(count + 1, "new", 17, bundles, {}, tuple(history.learned))
    scored = measurable(tasks, tasks["new"], history, "", earlier_tasks, config.seed)
    return stage.evaluate(job, increment, scored, Trained(NEW, {}, 1, 1, 0)), scored_rows


@pytest.mark.parametrize("count", [3, 30])
def test_a_sample_scores_as_many_rows_whatever_was_learned_before(monkeypatch, tmp_path, shards, count):
    result, scored_rows = evaluated(monkeypatch, tmp_path, shards, count, 2)
    # an earlier task: validation under its bundle and under the moved one, then test; the new one: validation, test
    assert scored_rows == 2 * (2 * ROWS["validation"] + ROWS["test"]) + ROWS["validation"] + ROWS["test"]
    assert len(result.row) == len(result.validation_row) == len(result.predictions) == 3


def test_without_a_sample_every_earlier_task_is_scored(monkeypatch, tmp_path, shards):
    result, scored_rows = evaluated(monkeypatch, tmp_path, shards, 5, None)
    assert scored_rows == 5 * 60 + 40 and len(result.row) == 6


def test_a_task_that_is_not_scored_stays_pinned_and_has_no_cell(monkeypatch, tmp_path, shards):
    result, _ = evaluated(monkeypatch, tmp_path, shards, 6, 2)
    left_out = {f"task_{n}" for n in range(6)} - result.row.keys()
    assert len(left_out) == 4
    for told in (result.bundles, result.validation_row, result.retention, result.predictions):
        assert not left_out & told.keys()


def test_the_gate_judges_the_tasks_that_were_scored_and_no_others():
    before = {"a": 0.9, "b": 0.9, "c": 0.9}
    verdict = gate(GateConfig(max_regression=0.02), "new", {"new": 0.5, "b": 0.8}, before)
    assert not verdict.promoted and len(verdict.reasons) == 1 and "b fell by 0.1000" in verdict.reasons[0]
    assert verdict.numbers["changes"].keys() == {"b"}

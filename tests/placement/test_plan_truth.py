"""The plan against live engines: bytes on each of 2 and 4 ranks, and payloads handed to all-to-all."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.placement.architecture import load_architecture
from pipeline.placement.cluster import Placement, Workload
from pipeline.placement.plan import Plan, plan
from pipeline.placement.trainable import MethodChoice, trainable_of
from tests.distributed.worlds import ROOT, start_ranks
from tests.helpers import stream_dict
from tests.moe_helpers import save_moe_backbone

WORKER = Path(__file__).with_name("plan_truth.py")
WITHIN = 0.01  # of what is measured
FFN = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    # some tensors persist, some do not; always-on experts, a router in fp32, the adversary's game
    "hunyuan-zero3-bf16": {
        "backbone": ("hunyuan_v1_moe", {"num_experts": 8, "top_k": 3}),
        "stage": 3,
        "dtype": "bfloat16",
        "threshold": 1500,
        "outputs": 3,
        "targets": FFN,
    },
    "hy-zero2-fp32": {
        "backbone": ("hy_v3", {"num_experts": 4}),
        "stage": 2,
        "dtype": "float32",
        "threshold": 100_000,
        "outputs": 2,
        "targets": ["experts.*", "up_proj"],
    },
    # everything is cut, every rank has experts of its own, attention is adapted, no adversary
    "qwen-zero3-fp32": {
        "backbone": ("qwen3_moe", {"num_experts": 8}),
        "stage": 3,
        "dtype": "float32",
        "threshold": 0,
        "outputs": 0,
        "targets": [*FFN, "q_proj"],
        "expert_parallel": "world",
    },
}
RANK = 3
every_world = pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 4])
every_case = pytest.mark.parametrize("name", CASES)


def degree(name: str, ranks: int) -> int:
    """Expert-parallel size of a case: 2, or the world."""
    return ranks if CASES[name].get("expert_parallel") == "world" else 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """{(case, ranks): note of every rank}, one launch for each number of ranks; started when first asked for."""
    folder = tmp_path_factory.mktemp("plan-truth")
    for name, case in CASES.items():
        save_moe_backbone(folder / name, case["backbone"][0], **case["backbone"][1])
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}

    def notes(name: str, ranks: int) -> list[dict[str, Any]]:
        if ranks not in found:
            todo = [
                {
                    "kind": "measure",
                    "name": case,
                    "folder": str(folder / f"{ranks}-{case}"),
                    "stream": stream(folder, case, degree(case, ranks)),
                }
                for case in CASES
            ]
            path = folder / f"{ranks}.json"
            path.write_text(json.dumps(todo), encoding="utf-8")
            start_ranks(ranks, path, folder / f"{ranks}.log", WORKER)
            found[ranks] = {
                case: [
                    json.loads((folder / f"{ranks}-{case}" / f"rank{rank}.json").read_text()) for rank in range(ranks)
                ]
                for case in CASES
            }
        return found[ranks][name]

    notes.folder = folder
    return notes


def stream(folder: Path, name: str, expert_parallel: int) -> dict[str, Any]:
    """The stream of a case; no task is read."""
    case = CASES[name]
    raw = json.loads((ROOT / "deepspeed_configs" / f"zero{case['stage']}.json").read_text())
    raw["zero_optimization"]["stage3_param_persistence_threshold"] = case["threshold"]
    file = folder / f"{name}-{expert_parallel}.json"
    file.write_text(json.dumps({**raw, "expert_parallel": {"autoep_size": expert_parallel}}), encoding="utf-8")
    game = {"outputs": case["outputs"]} if case["outputs"] else {"weight": 0.0}
    lora = {"rank": RANK, "alpha": 6, "dropout": 0.0, "targets": case["targets"]}
    made = stream_dict(
        folder / "work" / name,
        folder / name,
        folder,
        [folder / "task.yaml"],
        method={"name": "moe_cl", "lora": lora, "adversary": game},
        deepspeed=str(file),
    )
    made["backbone"]["dtype"] = case["dtype"]
    return made


@pytest.fixture
def notes(launched, name, ranks):
    """What every rank measured."""
    return launched(name, ranks)


@pytest.fixture
def planned(launched, notes, name, ranks) -> Plan:
    """The plan for the same backbone folder and workload."""
    case = CASES[name]
    architecture = load_architecture(str(launched.folder / name))
    method = MethodChoice("moe_cl", RANK, tuple(case["targets"]), case["outputs"])
    placement = Placement(
        devices_per_node=ranks,
        zero_stage=case["stage"],
        expert_parallel=degree(name, ranks),
        persistence_threshold=case["threshold"],
    )
    (tokens,), (sequences,) = {note["tokens"] for note in notes}, {note["sequences"] for note in notes}
    work = Workload(tokens=tokens, sequences=sequences, dtype=case["dtype"])
    return plan(architecture, trainable_of(architecture, method), placement, work)


@every_world
@every_case
def test_weights_gradients_and_optimizer_of_every_rank_are_those_planned_within_one_percent(notes, planned, ranks):
    assert len(notes) == ranks
    memory = planned.memory
    expected = {
        "frozen": memory.weights_frozen,
        "trained": memory.weights_trained,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    for note in notes:
        assert {kind: note[kind] for kind in expected} == pytest.approx(expected, rel=WITHIN)


@every_world
@every_case
def test_the_ranks_together_hand_exactly_the_planned_payload_to_all_to_all(notes, planned, ranks):
    """Together, since what an owner sends back depends on the routing; even routing is what the plan gives a rank."""
    assert planned.traffic.all_to_all > 0
    assert sum(sum(note["payload"]) for note in notes) == ranks * planned.traffic.all_to_all

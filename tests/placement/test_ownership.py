"""Who holds what, on live engines: a world of 4 ranks, full MoE-CL, expert-parallel sizes 1, 2 and 4, ZeRO-2 and 3.

Expected bytes are sums over shapes, worked out below. `pytest -s tests/placement/test_ownership.py` prints the table.
E = 12 is a multiple of the world, so no expert tensor is padded at any size and the laws hold to the byte.
"""

import json
import re
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

WORKER = Path(__file__).with_name("ownership.py")
WORLD, STEPS, BYTES = 4, 2, 4  # fp32
LAYERS, D, F, E, R, ROLES, OUTPUTS, VOCABULARY = 2, 48, 40, 12, 5, 2, 3, 330
HEADS, KV_HEADS, HEAD = 4, 2, 14
THRESHOLD = 500  # elements; the smallest LoRA tensor on 3 routed experts, at EP 4, has 3 * 5 * 40 = 600
LARGE_THRESHOLD = 2000  # above a LoRA tensor on 6 routed experts, 6 * 5 * 48 = 1440

# elements of the whole model, by kind
BACKBONE_EXPERTS = LAYERS * E * 3 * D * F  # gate, up and down of each
LORA_ON_EXPERTS = LAYERS * E * ROLES * 3 * R * (D + F)  # A reads one side of a projection, B writes the other
EXPERTS = BACKBONE_EXPERTS + LORA_ON_EXPERTS
LORA_ON_ALWAYS_ON = ROLES * 3 * R * (D + F)  # of a layer, as all that follow
GATE, DISCRIMINATOR = ROLES * D, OUTPUTS * D  # the discriminator has a bias beside
NORMS, HEAD_NORMS = 2 * D, 2 * HEAD
MLP_REST = E * D + 3 * D * F + LORA_ON_ALWAYS_ON + GATE + DISCRIMINATOR + OUTPUTS  # router, always-on FFN, ...
ATTENTION = 2 * D * HEADS * HEAD + 2 * D * KV_HEADS * HEAD
REST = LAYERS * (ATTENTION + NORMS + HEAD_NORMS + MLP_REST) + 2 * VOCABULARY * D + D  # two tables and the last norm
# ZeRO-3 pads what four ranks cannot share evenly: two norms of 14 elements to 16, and a bias of 3 to 4, a layer
PADDING = LAYERS * (2 * 2 + 1)
SMALL_REST = LAYERS * (NORMS + HEAD_NORMS + LORA_ON_ALWAYS_ON + GATE + DISCRIMINATOR + OUTPUTS) + D + PADDING
TRAINED_REST = LAYERS * (LORA_ON_ALWAYS_ON + GATE + DISCRIMINATOR + OUTPUTS + 1)  # with the padding of the bias

SIZES = [(ep, stage) for ep in (1, 2, 4) for stage in (2, 3)]
SMALL = "ep2-zero3-small"  # the LoRA tensors on routed experts are below the threshold too
every_size = pytest.mark.parametrize(("ep", "stage"), SIZES)
every_ep = pytest.mark.parametrize("ep", [1, 2, 4])
Notes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[str, Any]:
    """{case: note of every rank} of the one launch; under "backbone" the backbone's folder."""
    folder = tmp_path_factory.mktemp("ownership")
    # vocabulary, heads and widths of the helper are the D, F, ... above
    backbone = save_moe_backbone(folder / "backbone", "hunyuan_v1_moe", num_experts=E, top_k=3)
    cases = {f"ep{ep}-zero{stage}": (ep, stage, THRESHOLD) for ep, stage in SIZES} | {SMALL: (2, 3, LARGE_THRESHOLD)}
    todo = []
    for name, (ep, stage, threshold) in cases.items():
        raw = json.loads((ROOT / "deepspeed_configs" / f"zero{stage}.json").read_text())
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**raw, "expert_parallel": {"autoep_size": ep}}), encoding="utf-8")
        method = {"lora": {"rank": R, "alpha": 10, "dropout": 0.0}, "adversary": {"outputs": OUTPUTS}}
        training = {"micro_batch_size": 2, "warmup_fraction": 0.0}  # one pass a rank and step
        sections = {"method": method, "training": training, "deepspeed": str(file)}
        stream = stream_dict(folder / "work" / name, backbone, folder, [folder / "task.yaml"], **sections)
        todo.append({"kind": "own", "name": name, "folder": str(folder / name), "stream": stream})
    path = folder / "plan.json"
    path.write_text(json.dumps(todo), encoding="utf-8")
    start_ranks(WORLD, path, folder / "log", WORKER)
    notes = {
        name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(WORLD)] for name in cases
    }
    return {**notes, "backbone": backbone}


@pytest.fixture
def notes(launched, ep, stage) -> Notes:
    """What every rank noted."""
    return launched[f"ep{ep}-zero{stage}"]


def planned(launched: dict[str, Any], ep: int, stage: int, threshold: int = THRESHOLD) -> Plan:
    """What `pipeline.placement.plan` says of the same backbone and world."""
    architecture = load_architecture(str(launched["backbone"]))
    trainable = trainable_of(architecture, MethodChoice("moe_cl", R, discriminator_outputs=OUTPUTS))
    placement = Placement(devices_per_node=WORLD, zero_stage=stage, expert_parallel=ep, persistence_threshold=threshold)
    return plan(architecture, trainable, placement, Workload(dtype="float32"))


def only(values) -> Any:
    """The one value that all of them are."""
    (value,) = {json.dumps(value, sort_keys=True) for value in values}
    return json.loads(value)


def resident(notes: Notes) -> dict[str, int]:
    """Bytes between steps, the same on every rank."""
    return only(note["resident"] for note in notes)


@every_size
def test_each_rank_holds_the_routed_experts_of_its_place_and_no_others(notes, ep, stage):
    for rank, note in enumerate(notes):
        first = rank % ep * (E // ep)  # consecutive ranks share out the experts
        own = [[expert] for expert in range(first, first + E // ep)]
        assert len(note["held"]) == LAYERS * 2  # gate and up stacked, down
        assert len(note["held_lora"]) == LAYERS * ROLES * 3 * 2  # A and B of three projections
        assert {**note["held"], **note["held_lora"]} == dict.fromkeys([*note["held"], *note["held_lora"]], own)


@every_ep
def test_resident_expert_bytes_fall_as_one_over_ep_under_zero2(launched, ep):
    found = resident(launched[f"ep{ep}-zero2"])
    assert found["backbone"] * ep == BYTES * BACKBONE_EXPERTS
    assert found["lora"] * ep == BYTES * LORA_ON_EXPERTS
    assert found["storage"] * ep == BYTES * EXPERTS  # nothing more behind them
    assert found["rest"] == BYTES * REST


@every_ep
def test_resident_expert_bytes_are_one_over_the_world_under_zero3_at_every_ep(launched, ep):
    found = resident(launched[f"ep{ep}-zero3"])
    assert found["backbone"] * WORLD == BYTES * BACKBONE_EXPERTS
    assert found["lora"] * WORLD == BYTES * LORA_ON_EXPERTS
    # DeepSpeed keeps the shares of all that is trained in one buffer
    assert found["storage"] * WORLD == BYTES * (EXPERTS + TRAINED_REST)
    assert found["rest"] == BYTES * ((REST + PADDING) // WORLD + SMALL_REST)


@every_ep
def test_small_tensors_stay_whole_beside_their_shares_and_none_of_them_is_a_routed_expert(launched, ep):
    case = launched[f"ep{ep}-zero3"]
    names = only(note["persistent"] for note in case)
    layer = [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.query_layernorm.weight",
        "self_attn.key_layernorm.weight",
    ]
    block = "model.layers.{}.mlp"
    expected = ["model.norm.weight", *(f"model.layers.{i}.{name}" for i in range(LAYERS) for name in layer)]
    for i in range(LAYERS):
        at = block.format(i)
        expected += [f"gate/{at}.gate.weight", f"discriminator/{at}.discriminator.weight"]
        expected += [f"discriminator/{at}.discriminator.bias"]
        for role in ("shared", "dedicated"):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                expected += [f"{role}/{at}.shared_mlp.{projection}.lora_{matrix}" for matrix in "AB"]
    assert sorted(names) == sorted(expected)
    assert resident(case)["rest_whole"] == BYTES * SMALL_REST


def test_small_lora_tensors_on_routed_experts_stay_whole_and_are_counted_so(launched):
    """At EP 2 with a larger threshold: a rank's half of them, whole, beside a quarter that is its share."""
    found = resident(launched[SMALL])
    assert found["backbone"] == BYTES * BACKBONE_EXPERTS // WORLD
    assert found["lora"] == BYTES * (LORA_ON_EXPERTS // WORLD + LORA_ON_EXPERTS // 2)
    assert sum(".experts." in name for name in launched[SMALL][0]["persistent"]) == LAYERS * ROLES * 3 * 2
    memory = planned(launched, 2, 3, LARGE_THRESHOLD).memory
    weights = only(note["weights"] for note in launched[SMALL])
    assert weights == {"frozen": memory.weights_frozen, "trained": memory.weights_trained}


@every_size
def test_optimizer_state_exists_for_the_active_components_alone(notes, stage):
    for note in notes:
        state = note["optimizer"]
        assert state["states"] == 0, "Adam keeps state of something that is in no group"
        assert state["mixed"] == 0, "an optimizer group has routed and other tensors"
        # A and B on three projections of the routed experts and of the always-on FFN; weight and bias
        per_layer = {"shared": 12, "dedicated": 12, "gate": 1, "discriminator": 2}
        counts = {kind: sum(name.startswith(f"{kind}/") for name in state["names"]) for kind in per_layer}
        assert counts == {kind: LAYERS * count for kind, count in per_layer.items()}
        assert len(state["names"]) == len(set(state["names"])) == sum(counts.values())
        assert state["experts"] * WORLD == LORA_ON_EXPERTS
        # ZeRO-2 pads the 294 elements of the discriminator to 296, ZeRO-3 each bias: the same here
        assert state["rest"] * WORLD == TRAINED_REST
        assert state["bytes"] == 3 * BYTES * (state["experts"] + state["rest"])  # a master copy and two moments


@every_size
def test_live_bytes_of_an_moe_layers_experts_fall_as_one_over_ep(notes, ep, stage):
    """Inside the layer's forward, of every layer, in every step."""
    for note in notes:
        assert sorted(seen["layer"] for seen in note["live"]) == sorted([*range(LAYERS)] * STEPS)
        for seen in note["live"]:
            assert seen["backbone"] * ep == BYTES * BACKBONE_EXPERTS // LAYERS
            assert seen["lora"] * ep == BYTES * LORA_ON_EXPERTS // LAYERS
            assert seen["rest"] == BYTES * MLP_REST


@every_size
def test_the_steps_are_real_and_every_gathered_byte_is_accounted_for(notes, ep, stage):
    for note in notes:
        assert len(note["steps"]) == STEPS
        for step in note["steps"]:
            assert step["terms"]["adversary"] > 0  # the game is on
            assert step["whole"] == step["stated"] > 0
            assert step["lists"] == 0


@every_ep
def test_expert_bytes_gathered_a_step_under_zero3_fall_as_one_over_ep_and_none_is_where_ep_is_the_world(launched, ep):
    """The step that ZeRO-3 traces gathers in forward and in backward; later ones keep the experts for the backward."""
    for note in launched[f"ep{ep}-zero3"]:
        for step, times in zip(note["steps"], (2, 1), strict=True):
            assert step["experts"] == (0 if ep == WORLD else times * BYTES * EXPERTS // ep)
            # of a tensor over world / ep ranks a rank has one share already: 1 / ep - 1 / world come from others
            assert step["experts_received"] == times * BYTES * (EXPERTS // ep - EXPERTS // WORLD)


@every_ep
def test_updated_lora_gathered_a_step_under_zero2_falls_likewise(launched, ep):
    for note in launched[f"ep{ep}-zero2"]:
        for step in note["steps"]:
            assert step["experts"] == (0 if ep == WORLD else BYTES * LORA_ON_EXPERTS // ep)


@every_size
def test_the_plan_has_the_measured_numbers(launched, notes, ep, stage):
    expected = planned(launched, ep, stage)
    memory = expected.memory
    assert expected.experts_per_rank == E // ep == only(len(rows) for n in notes for rows in n["held"].values())
    for note in notes:
        assert note["weights"] == {"frozen": memory.weights_frozen, "trained": memory.weights_trained}
        assert note["resident"]["rest_whole"] == memory.weights_whole
        assert note["optimizer"]["bytes"] == memory.optimizer
        first, later = (step["experts_received"] for step in note["steps"])
        assert first == expected.traffic.all_gather_experts >= later
        if stage == 3 and ep < WORLD:  # where EP is the world, the largest fetch is an embedding table
            assert only(seen["fetched"] for seen in note["live"]) == memory.largest_layer


@every_size
def test_bytes_gathered_and_reduced_in_a_later_step_are_the_plans(launched, notes, ep, stage):
    """Of three of four ranks' shares what is gathered, with the padding; the whole is handed to the reduction.

    ZeRO-2 fills its one buffer of weights that all ranks share up to a multiple of the ranks.
    """
    traffic = planned(launched, ep, stage).traffic
    shared = traffic.all_gather_rest * WORLD // ((WORLD - 1) * BYTES)  # elements
    for note in notes:
        later = note["steps"][1]
        padding = PADDING if stage == 3 else -shared % WORLD
        assert later["gather_bytes"] == traffic.all_gather_later + BYTES * padding * (WORLD - 1) // WORLD
        assert later["reduce_bytes"] == traffic.gradients + (BYTES * LAYERS if stage == 3 else 0)


def test_table(launched):
    """Printed with `pytest -s`: bytes on one rank of a world of 4, the same on each."""
    heads = ["EP", "ZeRO", "resident", "of all", "live", "gathered 1", "gathered 2", "received 1", "received 2"]
    heads += ["Adam", "resident rest", "of it small", "live rest"]
    rows = []
    for ep, stage in SIZES:
        case = launched[f"ep{ep}-zero{stage}"]
        held, adam, live = resident(case), only(n["optimizer"]["experts"] for n in case), case[0]["live"][0]
        experts = held["backbone"] + held["lora"]
        steps = only([{key: step[key] for key in ("experts", "experts_received")} for step in n["steps"]] for n in case)
        row = [ep, stage, experts, f"1/{BYTES * EXPERTS / experts:g}", live["backbone"] + live["lora"]]
        row += [step["experts"] for step in steps] + [step["experts_received"] for step in steps]
        rows.append([*row, 3 * BYTES * adam, held["rest"], held["rest_whole"], live["rest"]])
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    print(f"\nBytes a rank, world {WORLD}, {E} routed experts x {LAYERS} layers, fp32, threshold {THRESHOLD} elements.")
    print("Routed experts and their LoRA: resident between steps; live in one layer's forward; made whole by")
    print("all-gathers, and received from other ranks by them, in step 1 (traced) and 2; Adam. Then all other tensors.")
    for row in [heads, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    # layers, roles and the two matrices of a pair are left out
    names = [name.rpartition("/")[2].removeprefix("model.") for name in launched["ep1-zero3"][0]["persistent"]]
    small = sorted({re.sub(r"layers\.\d+\.|_[AB]$", "", name) for name in names})
    print("Small tensors, whole beside their shares under ZeRO-3:", ", ".join(small))
    assert len(rows) == 6

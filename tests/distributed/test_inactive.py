"""Nothing inactive moves: asserted on the live engine of worlds of 1 and 2 ranks, ZeRO 2 and 3."""

import pytest
from safetensors.torch import load_file

from tests.distributed.learning import TASKS, tensor_digest
from tests.distributed.worlds import FFN_WIDTH, FRESH, GOES_ON, OUTPUTS, PROTOTYPE, RANK

WORLDS = {
    "zero3 x2": ("pair_a", "zero3"),
    "zero2 x2": ("pair_b", "zero2"),
    "zero3 sharded x2": ("pair_b", "zero3-sharded"),
    "zero3 offload x2": ("pair_a", "zero3-offload"),
    "zero3 x1": ("single", "zero3"),
    "zero2 x1": ("single", "zero2"),
}
SERVED = {world: WORLDS[world] for world in ("zero3 x2", "zero2 x2", "zero3 x1")}
INCREMENTS = (FRESH, PROTOTYPE, GOES_ON)
LAYERS, WIDTH = 3, 48


def expected_sizes() -> dict[str, int]:
    """Elements of every trainable tensor, from rank, model width, FFN width and the discriminator's outputs."""
    sizes = {}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.mlp"
        for role in ("shared", "dedicated"):
            for projection, out, into in (
                ("gate_proj", FFN_WIDTH, WIDTH),
                ("up_proj", FFN_WIDTH, WIDTH),
                ("down_proj", WIDTH, FFN_WIDTH),
            ):
                sizes[f"{role}/{path}.{projection}.lora_A"] = RANK * into
                sizes[f"{role}/{path}.{projection}.lora_B"] = out * RANK
        sizes[f"gate/{path}.gate.weight"] = 2 * WIDTH
        sizes[f"discriminator/{path}.discriminator.weight"] = OUTPUTS * WIDTH
        sizes[f"discriminator/{path}.discriminator.bias"] = OUTPUTS
    return sizes


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_adam_holds_the_active_components_and_nothing_else(worlds, world, number):
    case, sizes = worlds.case(*WORLDS[world]), expected_sizes()
    reports = [case.increment(number, rank)["optimizer"] for rank in range(len(case.notes))]
    for report in reports:
        assert report["class"] == "torch.optim.adamw.AdamW"
        assert sorted(report["trained"]) == sorted(sizes)
        assert sorted(report["asking"]) == sorted(report["active"].values())
        assert report["active"].keys() == sizes.keys()
    # moments of all ranks together: every trainable element once, plus less than one padding element a tensor and rank
    held, needed = sum(report["elements"] for report in reports), sum(sizes.values())
    assert needed <= held < needed + len(sizes) * len(reports)


@pytest.mark.parametrize("number", INCREMENTS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_backbone_weight_keeps_its_bits(worlds, world, number):
    files = load_file(worlds.backbone / "model.safetensors")
    expected = {name: tensor_digest(tensor) for name, tensor in files.items()}
    assert len(expected) == 3 + 9 * LAYERS  # embedding, norm, head; four attention, three FFN, two norms a layer
    case = worlds.case(*WORLDS[world])
    for rank in range(len(case.notes)):
        backbone = case.increment(number, rank)["backbone"]
        assert backbone["before"] == expected
        assert backbone["after"] == expected


@pytest.mark.parametrize("number", (PROTOTYPE, GOES_ON))
@pytest.mark.parametrize("world", WORLDS)
def test_every_earlier_expert_in_the_bank_keeps_its_bytes(worlds, world, number):
    bank = worlds.case(*WORLDS[world]).increment(number)["bank"]
    earlier = worlds.case(*WORLDS["zero3 x2"]).records
    digests = {digest for n in range(1, number) for part in earlier[str(n)].values() for digest in part.values()}
    assert digests <= {name.removesuffix(".safetensors") for name in bank["before"]}
    assert bank["after"].items() >= bank["before"].items()
    assert all(name == f"{digest}.safetensors" for name, digest in bank["after"].items())


@pytest.mark.parametrize("world", SERVED)
def test_a_pinned_task_scores_the_same_bits_after_later_increments(worlds, world):
    case = worlds.case(*SERVED[world])
    first, second, third = (case.increment(number)["pinned"] for number in INCREMENTS)
    assert len(first) == 6 and all(len(scores) == 3 for scores in first)
    assert first == second == third
    # and the later increments did learn something else
    bundles = [case.records[str(number)]["bundle"] for number in INCREMENTS]
    assert TASKS[FRESH] == TASKS[GOES_ON]
    assert len({bundle["dedicated"] for bundle in bundles}) == len({bundle["shared"] for bundle in bundles}) == 3

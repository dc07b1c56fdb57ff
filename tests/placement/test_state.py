"""State out of and into a live engine, to the bit: ZeRO 2 and 3, 1 and 2 ranks, fp32 and bf16, odd sizes.

And the parts of DeepSpeed that `placement/state.py` and `placement/distributed.py` reach into.
"""

import pytest
from safetensors.torch import load_file

from tests.distributed.worlds import FFN_WIDTH, RANK, ROUND_TRIPS

RANKS = {"pair_b": 2, "single": 1}
CHECKS = {
    "start values in the master copy",
    "start values in the working weights",
    "working weights after two steps",
    "restored state",
    "restored working weights",
    "Adam's step after restoring",
    "trained again",
    "state after a refused one",
    "written working weights",
    "master copy after writing weights",
    "restored into a new engine",
    "trained on in a new engine",
    "working weights in a new engine",
}
TENSORS = 45  # three layers: two experts of three pairs, a gate, a discriminator's weight and bias
every_world = pytest.mark.parametrize("launch", RANKS)
every_setting = pytest.mark.parametrize("setting", ROUND_TRIPS)


@pytest.fixture
def notes(worlds, launch, setting):
    """What every rank of a launch found in a round trip."""
    found = worlds.case(launch, f"round-trips-{setting}").notes
    assert len(found) == RANKS[launch]
    return found


@every_world
@every_setting
def test_what_goes_into_an_engine_comes_out_and_trains_on_to_the_bit(notes):
    for note in notes:
        assert note["tensors"] == TENSORS
        assert note["differing"].keys() == CHECKS
        assert {check: names for check, names in note["differing"].items() if names} == {}


@every_world
@every_setting
def test_what_the_disk_refuses_of_rank_0_in_the_midst_of_gathering_is_raised_on_every_rank(notes):
    assert [note["refused"] for note in notes] == ["the disk is full"] * len(notes)


@every_world
@every_setting
def test_a_penalty_is_in_the_gradient_that_the_step_clips_and_applies(notes, setting):
    rounding = 1e-5 if "fp32" in setting else 1e-2
    for note in notes:
        found = note["penalised"]
        assert found["added"] < rounding and found["moment"] < rounding and found["clipped"] < 1
        assert found["told"] == pytest.approx(found["penalty"], rel=1e-5, abs=1e-6)


@every_setting
def test_squared_gradients_of_single_rows_do_not_depend_on_the_number_of_ranks(worlds, setting):
    pair, single = (load_file(worlds.case(n, f"round-trips-{setting}").folder / "fisher.safetensors") for n in RANKS)
    assert len(pair) == TENSORS and pair.keys() == single.keys()
    for name, value in pair.items():
        assert bool(value.any()) == (not name.startswith("discriminator/"))
        rounding = 1e-5 if "fp32" in setting else 0.1
        assert (value - single[name]).abs().max() <= rounding * single[name].abs().max(), name


@every_world
@every_setting
def test_training_between_the_round_trips_moved_every_tensor_in_play(notes):
    for note in notes:
        # one class: the discriminator is out of the game
        assert len(note["unmoved"]) == 6 and all(name.startswith("discriminator/") for name in note["unmoved"])
        assert set(note["adam_steps"]) == {4.0}


@every_world
@every_setting
def test_adam_keeps_two_moments_and_a_step_for_each_flat_partition(notes):
    """`restore_state` creates exactly these before the first step, under the partitions it takes from the engine."""
    for note in notes:
        held = note["held"]
        assert held["adam_class"] == "torch.optim.adamw.AdamW"
        assert held["adam_keys"] == ["exp_avg", "exp_avg_sq", "step"]
        assert held["keys_are_flat"]
        assert held["dtypes"] == ["torch.float32"]
        assert len(held["flat"]) == len(note["adam_steps"]) == 4  # shared, dedicated, gate, discriminator


@every_world
@pytest.mark.parametrize("setting", [name for name in ROUND_TRIPS if "zero3" in name])
def test_zero_3_cuts_each_tensor_into_equal_padded_parts(notes):
    """`_local_part` cuts a full tensor the same way; odd sizes need padding on two ranks."""
    for note in notes:
        held, ranks = note["held"], len(notes)
        assert held["class"] == "DeepSpeedZeroOptimizer_Stage3"
        assert held["parts"] == {name: -(-size // ranks) for name, size in held["sizes"].items()}
        assert sum(held["flat"]) == sum(held["parts"].values())
        odd = [name for name, size in held["sizes"].items() if size % 2]
        assert len(odd) == 21 and {held["sizes"][name] for name in odd} == {RANK * FFN_WIDTH, 3}


@every_world
@pytest.mark.parametrize("setting", ["zero3-fp32", "zero3-bf16-persistent"])
def test_lora_tensors_are_sharded_where_nothing_may_persist(notes, setting):
    for note in notes:
        assert len(note["held"]["persistent"]) == (TENSORS if setting.endswith("persistent") else 0)
        assert len(note["held"]["sharded"]) == TENSORS


@every_world
@pytest.mark.parametrize("setting", [name for name in ROUND_TRIPS if "zero2" in name])
def test_zero_2_cuts_the_flattened_component_not_the_tensor(notes):
    """So a tensor may lie across two ranks: the whole component, padded, is shared out."""
    ranks = len(notes)
    for note in notes:
        held = note["held"]
        assert held["class"] == "DeepSpeedZeroOptimizer"
        totals = {}
        for name, size in held["sizes"].items():
            component = name.partition("/")[0]
            totals[component] = totals.get(component, 0) + size
        assert totals["shared"] % 2 and totals["discriminator"] % 2
        for flat, component in zip(held["flat"], ("shared", "dedicated", "gate", "discriminator"), strict=True):
            assert totals[component] <= flat * ranks < totals[component] + 8


def test_the_shared_memory_op_is_still_switched_by_the_table_we_switch():
    """`start_world` sets this key: DeepSpeed would compile an op with g++, and leave 69 MB a rank in /dev/shm."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops import __compatible_ops__

    assert CPU_Accelerator().create_op_builder("ShareMemCommBuilder").NAME == "deepspeed_shm_comm"
    assert "deepspeed_shm_comm" in __compatible_ops__


@every_world
def test_no_rank_built_the_shared_memory_op(worlds, launch):
    notes = worlds.case(launch, "zero2").notes
    assert [note["shared_memory_op"] for note in notes] == ["None"] * RANKS[launch]

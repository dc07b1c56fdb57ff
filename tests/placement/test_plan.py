"""The plan's arithmetic, against sums worked out by hand, against live modules, and against the bank.

The small backbone of the sums, a Mixtral: V = 10, D = 4, two layers, 2 heads and 1 key-value head of 2, E = 4 experts
of F = 3, K = 2, untied. Elements: embedding and head 40 each, last norm 4; in each layer q and o 16, k and v 8, two
norms of 4, router 16, routed experts 96 (gate and up) and 48 (down).
"""

from dataclasses import replace

import pytest

from data_contracts.errors import UserError
from pipeline.experts.attach import ExpertPlan
from pipeline.experts.bank import Bank
from pipeline.experts.lora import LoraOptions
from pipeline.methods import moe_cl, per_task, sequential, zero_shot
from pipeline.placement.architecture import load_architecture, read_architecture
from pipeline.placement.cluster import Placement, Workload
from pipeline.placement.memory import activations_of, memory_of
from pipeline.placement.plan import USABLE, plan, smallest_world
from pipeline.placement.traffic import RoutedPass, routed_pass
from pipeline.placement.trainable import ROLES, MethodChoice, bank_growth, trainable_of
from tests.helpers import light_learner, tiny_llama
from tests.moe_helpers import MOE_TYPES, tiny_moe
from tests.placement.loading_proof import CASES, Sizes, expected_bytes

SMALL = {
    "model_type": "mixtral",
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ARCHITECTURE = read_architecture(SMALL)
# rank 1 on the routed experts' up-projections: A (4, 1, 4) and B (4, 3, 1) in each layer
ADAPTER = trainable_of(ARCHITECTURE, MethodChoice("sequential", 1, ("experts.up_proj",)))
FOUR = Placement(devices_per_node=4, persistence_threshold=20)
WORK = Workload(tokens=3, sequences=2, answer_tokens=1)


def small_plan(expert_parallel, zero_stage=3, dtype="bfloat16", **changes):
    placement = replace(FOUR, expert_parallel=expert_parallel, zero_stage=zero_stage, **changes)
    return plan(ARCHITECTURE, ADAPTER, placement, replace(WORK, dtype=dtype))


def test_zero3_memory_of_the_small_backbone_is_the_sum_by_hand():
    memory = small_plan(2).memory
    # shares over 4 ranks, over 2 for experts; tensors of at most 20 elements are whole beside their share:
    # 10 + 10 + (1 + 4); in a layer (4 + 16) (2 + 8) (2 + 8) (4 + 16) + 2 x (1 + 4) + (4 + 16) + 24 + 12 = 126
    assert memory.weights_frozen == 2 * (25 + 2 * 126)
    # on the rank A has 8 elements and B 6: (4 + 8) + (3 + 6)
    assert memory.weights_trained == 2 * (2 * 21)
    # 4, and in a layer 16 + 8 + 8 + 16 + 4 + 4 + 16 and the LoRA's 8 + 6
    assert memory.weights_whole == 2 * (4 + 2 * (72 + 14))
    # 4 + 3 elements in each layer: bf16 gradients; fp32 master copy and two moments
    assert (memory.gradients, memory.optimizer) == (2 * 14, 12 * 14)
    # gathered are embedding and head with 40 elements and the experts of a layer with 48 + 24
    assert memory.largest_layer == 2 * 72
    assert memory.gathered == 2 * (40 + 40 + 2 * 72)
    assert memory.buffers == 2 * 5_000_000


def test_zero3_in_fp32_keeps_a_master_copy_too():
    memory = small_plan(2, dtype="float32").memory
    assert (memory.gradients, memory.optimizer) == (4 * 14, 12 * 14)
    assert memory.weights_frozen == 4 * (25 + 2 * 126)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zero2_memory_of_the_small_backbone_is_the_sum_by_hand(dtype):
    size = {"bfloat16": 2, "float32": 4}[dtype]
    memory = small_plan(2, zero_stage=2, dtype=dtype).memory
    # everything whole, half of the experts: 84; in a layer 48 + 8 + 16 + 48 + 24
    assert memory.weights_frozen == size * (84 + 2 * 144)
    assert memory.weights_trained == size * 28
    assert (memory.weights_whole, memory.gathered, memory.largest_layer) == (0, 0, 0)
    # 28 elements over the 2 ranks with the same experts; the master copy is one in fp32 too
    assert (memory.gradients, memory.optimizer) == (size * 14, 12 * 14)


def test_partitions_are_padded_as_deepspeed_pads_them():
    five = replace(FOUR, devices_per_node=5)
    # ZeRO-2: 56 elements in one optimizer group, padded to a multiple of 2 x 5
    zero2 = memory_of(ARCHITECTURE, ADAPTER, replace(five, zero_stage=2), WORK)
    assert (zero2.weights_trained, zero2.gradients, zero2.optimizer) == (2 * 60, 2 * 12, 12 * 12)
    # ZeRO-3: tensor by tensor, 16 to 20 and 12 to 15
    zero3 = memory_of(ARCHITECTURE, ADAPTER, replace(five, persistence_threshold=0), WORK)
    assert (zero3.weights_trained, zero3.gradients, zero3.optimizer) == (2 * 14, 2 * 14, 12 * 14)


def test_a_group_of_one_rank_gathers_nothing_and_keeps_nothing_twice():
    memory = small_plan(1, devices_per_node=1).memory
    assert memory.weights_frozen == 2 * ARCHITECTURE.parameters
    assert (memory.weights_whole, memory.gathered) == (0, 0)
    # at expert-parallel size 4 the same holds of the experts alone: 24 and 12 elements and 4 + 3 of LoRA are the
    # rank's own; all else as in the sum above
    memory = small_plan(4).memory
    assert memory.weights_frozen == 2 * (25 + 2 * (126 - 36 + 36))
    assert memory.weights_trained == 2 * 14
    assert memory.gathered == 2 * (40 + 40)


def test_expert_bytes_fall_with_the_expert_parallel_size_and_under_zero3_are_one_share_at_every_size():
    # without whole small tensors: 4 ranks hold 2 bytes x 288 elements of experts, and of all else
    shares, wholes = 10 + 10 + 1 + 2 * (4 + 2 + 2 + 4 + 1 + 1 + 4), 84 + 2 * 72
    for size in (1, 2, 4):
        zero2 = small_plan(size, zero_stage=2)
        zero3 = small_plan(size, persistence_threshold=0)
        assert zero2.memory.weights_frozen == 2 * (wholes + 288 // size)
        assert zero3.memory.weights_frozen == 2 * (shares + 288 // 4)
        assert zero2.experts_per_rank == zero3.experts_per_rank == 4 // size


def test_live_bytes_of_a_routed_layer_fall_with_the_expert_parallel_size():
    eight = replace(FOUR, devices_per_node=8)
    # the experts' 144 elements and the LoRA's 28 are shared out; the router's 16 are not
    for size in (1, 2, 4):
        placement = replace(eight, expert_parallel=size, persistence_threshold=0)
        assert memory_of(ARCHITECTURE, ADAPTER, placement, WORK).largest_layer == 2 * (172 // size + 16)


def test_a_router_in_fp32_counts_four_bytes():
    keys = {**SMALL, "model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2, "head_dim": 2}
    architecture = read_architecture(keys)
    untrained = trainable_of(architecture, MethodChoice("zero_shot"))
    placement = Placement(devices_per_node=1, zero_stage=2)
    memory = memory_of(architecture, untrained, placement, WORK)
    assert memory.weights_frozen == 2 * architecture.parameters + 2 * 2 * 16
    assert memory.weights_trained == memory.gradients == memory.optimizer == memory.buffers == 0


def test_what_loading_reads_and_holds_is_the_sum_by_hand():
    loading = small_plan(2).loading
    # shares: 10 + 10 + 1, in a layer 4 + 2 + 2 + 4 + 1 + 1 + 4 + 24 + 12 = 54
    assert (loading.requested, loading.resident) == (2 * 129, 2 * 129)
    # one layer with half of its experts: 48 + 8 + 16 + 48 + 24
    assert (loading.largest_layer, loading.peak) == (2 * 144, 2 * (129 + 144))
    whole = small_plan(4, zero_stage=2).loading
    assert whole.requested == whole.resident == 2 * (84 + 2 * (72 + 36))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loading_is_the_arithmetic_of_the_four_rank_proof(case):
    stage, size = case
    sizes = Sizes()
    architecture = read_architecture(
        {
            "model_type": "hunyuan_v1_moe",
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.ffn_width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head,
            "num_experts": sizes.experts,
            "moe_topk": 1,
        }
    )
    placement = Placement(devices_per_node=4, zero_stage=stage, expert_parallel=size)
    loading = plan(architecture, trainable_of(architecture, MethodChoice("zero_shot")), placement, WORK).loading
    share, layer = expected_bytes(sizes, 4, stage, size)
    assert (loading.requested, loading.resident, loading.largest_layer) == (share, share, layer)


def test_kept_activations_are_the_sum_by_hand():
    # a layer: attention 2 x 4 + 2 x (2 + 1) x 2 = 20; routed, one LoRA expert: 8 + 2 copies x (8 + 5 x 3) = 54
    logits = 1 * 10 * (2 + 8)
    assert activations_of(ARCHITECTURE, ADAPTER, WORK) == 2 * 3 * 2 * 74 + logits
    recomputed = replace(WORK, activation_checkpointing=True)
    assert activations_of(ARCHITECTURE, ADAPTER, recomputed) == 2 * 3 * (2 * 4 + 74) + logits
    # nothing is kept below the first trained layer
    upper = trainable_of(ARCHITECTURE, MethodChoice("sequential", 1, ("model.layers.1.mlp.experts.*",)))
    assert activations_of(ARCHITECTURE, upper, WORK) == 2 * 3 * 74 + logits


def test_the_payload_of_one_routed_layer_is_the_sum_by_hand():
    # 3 tokens, 2 copies each, rows of 4 bf16 numbers; 4 experts and one number of sequences for each of 2 ranks
    assert routed_pass(3, 2, 4, 4, 2, 2) == RoutedPass(counts=8 * 6, dispatch=48, combine=48, notes=0, pooled=0)
    # the game: two fp32 numbers a copy; one row for each of 2 sequences of each of 2 ranks
    playing = routed_pass(3, 2, 4, 4, 2, 2, sequences=2)
    assert (playing.notes, playing.pooled) == (3 * 2 * 8, 2 * 2 * 4 * 2)
    assert playing.forward == 48 + 48 + 48 + 48 + 32
    assert playing.backward == 48 + 48 + 32
    assert routed_pass(3, 2, 4, 4, 1, 2, sequences=2).forward == 0


def test_traffic_of_the_small_backbone_is_the_sum_by_hand():
    traffic = plan(ARCHITECTURE, ADAPTER, replace(FOUR, expert_parallel=2), replace(WORK, micro_batches=2)).traffic
    # two layers, two micro-batches: 48 + 48 + 48 forward and 48 + 48 backward
    assert (traffic.all_to_all, traffic.all_to_all_leaving) == (4 * 240, 2 * 240)
    # from the other of 2 ranks: gate-up 96 and down 48 bytes, four times; LoRA 16 and 12 bytes once
    assert traffic.all_gather_experts == 2 * (4 * 48 + 4 * 24 + 8 + 6)
    # from 3 of 4 ranks: embedding forward alone, head forward and backward; the small ones after the step:
    # 8 bytes, in a layer 32 + 16 + 16 + 32 + 8 + 8 + 32
    assert traffic.all_gather_rest == 2 * 60 + 4 * 60 + 6 + 2 * 108
    # kept from forward to backward: once a micro-batch
    assert traffic.all_gather_later == 2 * (2 * 48 + 2 * 24 + 8 + 6) + 2 * 60 + 2 * 60 + 6 + 2 * 108
    assert (traffic.gradients, traffic.gradients_leaving) == (2 * 2 * 28, 2 * 28)
    zero2 = small_plan(2, zero_stage=2).traffic
    # the updated LoRA weights; gradients in an all-reduce, two ways round
    assert (zero2.all_gather_experts, zero2.all_gather_rest) == (2 * (8 + 6), 0)
    assert zero2.all_gather_later == 2 * (8 + 6)
    # 84 elements, and in a layer 48 + 8 + 16 + 48 + 24 and the LoRA's 8 + 6 on the rank: three times as many are 1,200
    for distance, kept in ((1201, True), (1200, False)):
        found = small_plan(2, max_reuse_distance=distance).traffic
        assert (found.all_gather_later < found.all_gather_experts + found.all_gather_rest) == kept
    assert (zero2.gradients, zero2.gradients_leaving) == (2 * 28, 2 * 28)


def test_nothing_below_the_first_trained_module_is_gathered_for_backward():
    # received from 3 of 4 ranks: embedding 60, head 2 x 60, last norm 2 x 6, router 2 x 24 and norms 2 x 12 a layer,
    # attention 72 once in layer 0 and twice in layer 1
    bare = small_plan(1, persistence_threshold=0).traffic
    assert bare.all_gather_rest == 60 + 120 + 12 + 2 * (48 + 24) + 72 + 144
    attention = trainable_of(ARCHITECTURE, MethodChoice("sequential", 1, ("q_proj",)))
    placement = replace(FOUR, persistence_threshold=0)
    # q_proj's LoRA beside: A (1, 4) and B (4, 1), each of 6 bytes from the others, twice in two layers
    more = plan(ARCHITECTURE, attention, placement, WORK).traffic.all_gather_rest
    assert more == bare.all_gather_rest + 72 + 2 * 2 * 2 * 6
    upper = trainable_of(ARCHITECTURE, MethodChoice("sequential", 1, ("model.layers.1.mlp.experts.*",)))
    two = plan(ARCHITECTURE, upper, replace(FOUR, expert_parallel=2), WORK).traffic
    assert two.all_to_all == (48 + 48 + 48) + (48 + 48 + 48 + 48 + 48)


def test_the_game_is_counted_where_routed_experts_carry_lora_and_only_while_it_is_on():
    playing = MethodChoice("moe_cl", 1, ("experts.up_proj",))
    placement = replace(FOUR, expert_parallel=2)

    def sent(method, **changes):
        found = plan(ARCHITECTURE, trainable_of(ARCHITECTURE, method), placement, replace(WORK, **changes))
        return found.traffic.all_to_all

    assert sent(playing) == 2 * (48 + 48 + 48 + 48 + 32 + 48 + 48 + 32)
    assert sent(playing, adversary=False) == sent(replace(playing, discriminator_outputs=0)) == 2 * 240
    attention = replace(playing, targets=("q_proj",), discriminator_outputs=0)
    assert sent(attention) == 2 * 240


def test_times_are_bytes_over_bandwidth():
    traffic = small_plan(2, bandwidth=100.0).traffic
    assert traffic.seconds["all_to_all"] == pytest.approx(traffic.all_to_all_leaving / 100)
    received = traffic.all_gather_later
    assert traffic.total_seconds == pytest.approx(
        (traffic.all_to_all_leaving + received + traffic.gradients_leaving) / 100
    )


METHODS = {"moe_cl": moe_cl, "sequential": sequential, "per_task": per_task, "zero_shot": zero_shot}
TARGETS = [("gate_proj", "up_proj", "down_proj"), ("down_proj", "q_proj", "o_proj"), ("*.mlp.*up_proj",)]


def live(model_type, seed=0):
    return tiny_llama(50, seed=seed) if model_type == "llama" else tiny_moe(model_type, 50, seed=seed)


@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
@pytest.mark.parametrize("model_type", ["llama", *MOE_TYPES])
def test_every_trained_tensor_has_the_name_and_shape_it_has_in_the_model(model_type, targets):
    model = live(model_type)
    architecture = read_architecture(model.config.to_dict())
    roles = ("shared", "dedicated")
    learner = light_learner(model, ExpertPlan(LoraOptions(rank=3, targets=targets), roles, 5))
    trainable = trainable_of(architecture, MethodChoice("moe_cl", 3, targets, 5))
    found = {f"{tensor.component}/{tensor.name}": tensor.shape for tensor in trainable.tensors}
    assert found == {name: tuple(parameter.shape) for name, parameter in learner.parameters.items()}
    assert len(found) == len(trainable.tensors)
    assert len(trainable.adapted_layers) == len(learner.ffns)
    for tensor in trainable.tensors:
        assert tensor.expert_owned == (".mlp.experts." in tensor.name)


def test_methods_train_the_roles_they_have():
    assert ROLES.keys() == METHODS.keys()
    for name, module in METHODS.items():
        built = module.build(module.Options())
        assert ROLES[name] == (built.plan.roles if built.plan else ())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "hunyuan_v1_moe"])
def test_the_bank_grows_by_the_tensor_bytes_of_the_files_a_task_publishes(tmp_path, name, model_type):
    import torch

    method = METHODS[name].build(METHODS[name].Options())
    model = live(model_type)
    architecture = read_architecture(model.config.to_dict())
    learner = light_learner(model, method.plan)
    values = {key: torch.zeros(parameter.shape) for key, parameter in learner.parameters.items()}
    files = {role: {k: v for k, v in values.items() if k.startswith(f"{role}/")} for role in method.published()}
    if method.wants_pooled():
        statistics = torch.zeros(2, len(learner.ffns), architecture.hidden_size)
        files["state"] = method.state((statistics[0], statistics[1]), values)
    bank, sizes = Bank(tmp_path), {}
    for role, tensors in files.items():
        data = bank.path(bank.put(tensors)).read_bytes()
        sizes[role] = len(data) - 8 - int.from_bytes(data[:8], "little")  # without length and header
    assert bank_growth(architecture, trainable_of(architecture, MethodChoice(name))) == sizes


def test_a_target_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(UserError, match=r"c_proj matches no projection.*mlp\.experts\.up_proj.*self_attn\.q_proj"):
        trainable_of(ARCHITECTURE, MethodChoice(targets=("up_proj", "c_proj")))


def test_an_adversary_without_a_feed_forward_network_is_refused():
    with pytest.raises(UserError, match="discriminator-outputs 0"):
        trainable_of(ARCHITECTURE, MethodChoice("moe_cl", targets=("q_proj",)))


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"name": "magic"}, "moe_cl"), ({"rank": 0}, "rank is 0"), ({"discriminator_outputs": 1}, "outputs is 1")],
)
def test_a_method_that_cannot_be_is_refused(choice, said):
    with pytest.raises(UserError, match=said):
        MethodChoice(**choice)


@pytest.mark.parametrize(("size", "world"), [(3, (3, 4)), (8, (2, 4)), (2, (1, 3)), (16, (1, 4))])
def test_degrees_that_do_not_fit_are_refused_with_all_numbers(size, world):
    nodes, devices = world
    placement = replace(FOUR, nodes=nodes, devices_per_node=devices, expert_parallel=size)
    with pytest.raises(UserError) as raised:
        plan(ARCHITECTURE, ADAPTER, placement, WORK)
    ranks = nodes * devices
    for number in (size, ranks, nodes, devices, 4, ranks % size, 4 % size):
        assert str(number) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "work", "said"),
    [
        ({"nodes": 0}, {}, "nodes: 0"),
        ({"zero_stage": 1}, {}, "stages 2 and 3"),
        ({"expert_parallel": 0}, {}, "expert-parallel size: 0"),
        ({"device_memory": 0.0}, {}, "device memory"),
        ({}, {"tokens": 0}, "tokens: 0"),
        ({}, {"dtype": "float16"}, "bfloat16"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, work, said):
    with pytest.raises(UserError, match=said):
        plan(ARCHITECTURE, ADAPTER, replace(FOUR, **changes), replace(WORK, **work))


def test_a_dense_backbone_has_no_expert_parallel_size_but_one():
    dense = read_architecture({**SMALL, "model_type": "llama"})
    trainable = trainable_of(dense, MethodChoice())
    assert plan(dense, trainable, FOUR, WORK).traffic.all_to_all == 0
    with pytest.raises(UserError, match="no routed experts"):
        plan(dense, trainable, replace(FOUR, expert_parallel=2), WORK)


@pytest.mark.parametrize(
    ("zero_stage", "memory"),
    [(3, 11e6), (3, 8e6), (3, 4e6), (3, 2.4e6), (3, 1.5e6), (3, 1e5), (2, 6e6), (2, 2.5e6), (2, 1e5)],
)
def test_the_smallest_world_fits_and_no_smaller_one_does(zero_stage, memory):
    """Against a search through every world and size, where 1 to 24 devices are needed or none will do."""
    keys = {**SMALL, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 1000, "num_local_experts": 6}
    architecture = read_architecture(keys)
    trainable = trainable_of(architecture, MethodChoice("moe_cl", 4))
    base = Placement(devices_per_node=3, zero_stage=zero_stage, device_memory=memory / USABLE, reduce_bucket_size=0)
    base = replace(base, prefetch_bucket_size=0, max_reuse_distance=0, persistence_threshold=2000)
    work = Workload(tokens=8, sequences=2, answer_tokens=1)
    worlds = [(1, 1), (1, 2), *((nodes, 3) for nodes in range(1, 9))]
    fitting = []
    for nodes, devices in worlds:
        for size in (1, 2, 3, 6):
            there = replace(base, nodes=nodes, devices_per_node=devices, expert_parallel=size)
            if there.world % size == 0 and plan(architecture, trainable, there, work).fits:
                fitting.append(there)
    found = smallest_world(architecture, trainable, base, work)
    if not fitting:
        assert found is None
        return
    least = min(there.world for there in fitting)
    assert found.world == least
    times = {
        there: plan(architecture, trainable, there, work).traffic.total_seconds
        for there in fitting
        if there.world == least
    }
    assert times[found] == min(times.values())


def test_no_world_is_named_where_the_activations_alone_are_too_many():
    large = load_architecture("hunyuan-large")
    trainable = trainable_of(large, MethodChoice())
    assert smallest_world(large, trainable, Placement(), Workload(tokens=4096)) is None

"""One rank of the ownership tests: what live engines hold and gather; see tests/distributed/worker.py.

    deepspeed --num_accelerators 4 tests/placement/ownership.py plan.json

Each case trains full MoE-CL, adversary included, for the steps its rows make, through the product's loop. It only
records: tests/placement/test_ownership.py compares.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import AutoModelForCausalLM

import pipeline.training.loop as loop
from pipeline.benchmarks.speed.collectives import Collectives
from pipeline.config import StreamConfig, build_method
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.methods.protocol import Increment
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner, build_learner
from pipeline.placement.state import Whole, full_shape, gathered
from pipeline.training.checks import optimizer_parameters
from pipeline.training.stop import StopFlag
from tests.distributed import worker
from tests.helpers import ragged
from tests.moe.worlds import GivenRows
from tests.placement.plan_truth import bytes_of, optimizer_bytes, storage_bytes, weight_bytes

PROMPTS, ANSWERS = [9, 4, 6, 11, 5, 8, 3, 7] * 2, [2, 1, 3, 2] * 4  # tokens of each row: two global batches of eight
SPACING = 0.01  # a routed LoRA expert e starts at (e + 1) * SPACING in every entry; two steps move it by 2e-3


def own(world: World, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and note which experts are here, the bytes of everything, and what was gathered in each step."""
    config = StreamConfig.model_validate(case["stream"])
    method = build_method(config)
    learner = build_learner(config, method.plan, world, train=True)
    start = start_values(learner)
    method.begin(second_increment(learner), learner.ffns, start)
    learner.set_active(method.plan.roles)
    live = LiveBytes(learner)
    steps: list[dict[str, Any]] = []
    with Gathers(learner) as gathers, Collectives() as collectives:
        gathers.watch(learner.model.parameters())
        loop.train_rows(
            learner,
            method,
            config,
            GivenRows(ragged(PROMPTS, 300, seed=1), ragged(ANSWERS, 300, seed=2), end=0),
            Whole(start),
            seed=config.seed,
            inflight=folder / "inflight",
            key=folder.name,
            title=folder.name,
            stop=StopFlag(),
            on_step=lambda log: steps.append({"terms": log.terms, **gathers.taken(), **collectives.taken()}),
        )
    note = {
        "steps": steps,
        "live": live.seen,
        "resident": resident(learner),
        "weights": weight_bytes(learner),
        "optimizer": optimizer(learner),
        "persistent": [name for name, p in public_names(learner).items() if getattr(p, "ds_persist", False)],
        "held": held_experts(learner, config.backbone.path),
        "held_lora": held_lora(learner),
    }
    learner.engine.destroy()
    return note


def start_values(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole start tensors: of routed LoRA experts the number of the expert, of all else small draws."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, parameter in learner.parameters.items():
        shape = full_shape(parameter)
        values[name] = torch.randn(shape, generator=generator) * 0.1
        if len(shape) == 3:
            values[name] = (torch.arange(1.0, shape[0] + 1) * SPACING).view(-1, 1, 1).expand(shape).contiguous()
    return values


def second_increment(learner: Learner) -> Increment:
    """An increment after another task, whose made-up state brings the adversary's game on."""
    layers, width = len(learner.ffns), learner.model.backbone.config.hidden_size
    generator = torch.Generator().manual_seed(3)
    state = {
        "prototype_mean": torch.randn(layers, width, generator=generator),
        "prototype_variance": torch.ones(layers, width),
        "discriminator_weight": torch.randn(layers, width, generator=generator) * 0.1,
        "discriminator_bias": torch.zeros(layers),
    }
    return Increment(2, "second", 0, {}, {}, ("first",), {"first": state})


def backbone_experts(ffn: ExpertFFN) -> list[nn.Parameter]:
    """The frozen routed experts of a block."""
    return list(getattr(ffn.ffn, ffn.routed.experts).parameters())


def lora_on_experts(ffn: ExpertFFN) -> list[nn.Parameter]:
    """The LoRA experts on them."""
    return list(ffn.experts[ffn.routed.experts].parameters())


def on_experts(learner: Learner) -> list[nn.Parameter]:
    """Everything with a routed-expert dimension."""
    return [p for ffn in learner.ffns for p in (*backbone_experts(ffn), *lora_on_experts(ffn))]


def public_names(learner: Learner) -> dict[str, nn.Parameter]:
    """Trained parameters by component and public name, frozen ones by their name in the model."""
    trained = {id(parameter): name for name, parameter in learner.parameters.items()}
    return {trained.get(id(p), name): p for name, p in learner.model.backbone.named_parameters()}


class LiveBytes:
    """Bytes of each MoE layer's parameters inside its forward, by kind; noted when the layer calls its router."""

    def __init__(self, learner: Learner) -> None:
        self.seen: list[dict[str, int]] = []
        for ffn in learner.ffns:
            getattr(ffn.ffn, ffn.routed.router).register_forward_hook(self._hook(ffn))

    def _hook(self, ffn: ExpertFFN) -> Callable[..., None]:
        backbone, lora = backbone_experts(ffn), lora_on_experts(ffn)
        known = {id(parameter) for parameter in (*backbone, *lora)}
        rest = [parameter for parameter in ffn.parameters() if id(parameter) not in known]

        def note(*_: Any) -> None:
            kinds = {"backbone": backbone, "lora": lora, "rest": rest}
            found = {kind: bytes_of(p.data for p in parameters) for kind, parameters in kinds.items()}
            fetched = bytes_of(p.data for p in ffn.parameters() if is_cut(p))
            self.seen.append({**found, "layer": ffn.layer, "fetched": fetched})

        return note


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds a share alone between uses: no small tensor, and more than one rank to share with."""
    return hasattr(parameter, "ds_id") and not parameter.ds_persist and parameter.ds_zero_partition_world_size > 1


class Gathers:
    """Bytes that DeepSpeed's all-gathers make whole on this rank, since last taken, and whose they are.

    The collectives are counted where they leave DeepSpeed. Under ZeRO-3 a call serves many parameters: each states its
    own (padded) size, and both sums are noted. Under ZeRO-2 an optimizer group is gathered into its own buffer. The
    loop's own check of gradients after the first backward is left out.
    """

    def __init__(self, learner: Learner) -> None:
        self._experts = {id(parameter) for parameter in on_experts(learner)}
        self._buffers = {p.data.untyped_storage().data_ptr() for p in on_experts(learner) if not hasattr(p, "ds_id")}
        self._backend, self._check = deepspeed.comm.comm.cdb, loop.check_gradients
        self._stock, self._stock_list = self._backend.all_gather_into_tensor, self._backend.all_gather
        self._paused = self._stated_already = False
        self._counts: dict[str, int] = {}
        self.taken()

    def __enter__(self) -> "Gathers":
        self._backend.all_gather_into_tensor, self._backend.all_gather = self._collective, self._list_collective
        loop.check_gradients = self._check_uncounted
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.all_gather_into_tensor, self._backend.all_gather = self._stock, self._stock_list
        loop.check_gradients = self._check

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have parameters that ZeRO-3 partitions state what a gather of them makes whole."""
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                parameter.all_gather_coalesced = self._coalesced(parameter.all_gather_coalesced)
                parameter.all_gather = self._blocking(parameter, parameter.all_gather)

    def taken(self) -> dict[str, int]:
        """What was counted; starts anew. `lists`: gathers into lists, which no step is to make."""
        counts = self._counts
        self._counts = dict.fromkeys(("whole", "stated", "experts", "experts_received", "lists"), 0)
        return counts

    def _check_uncounted(self, learner: Learner) -> None:
        self._paused = True
        self._check(learner)
        self._paused = False

    def _collective(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, **named: Any):
        if not self._paused:
            self._counts["whole"] += bytes_of([output_tensor])
            if not self._stated_already:
                is_experts = output_tensor.untyped_storage().data_ptr() in self._buffers
                self._state(bytes_of([output_tensor]), deepspeed.comm.get_world_size(group), is_experts)
        return self._stock(output_tensor, input_tensor, group=group, **named)

    def _list_collective(self, *arguments: Any, **named: Any) -> Any:
        self._counts["lists"] += not self._paused
        return self._stock_list(*arguments, **named)

    def _coalesced(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def gather(parameters: Iterable[nn.Parameter], **named: Any) -> Any:
            parameters = list(parameters)
            return self._stating(parameters, lambda: stock(parameters, **named))

        return gather

    def _blocking(self, parameter: nn.Parameter, stock: Callable[..., Any]) -> Callable[..., Any]:
        def gather(param_list: list[nn.Parameter] | None = None, **named: Any) -> Any:
            absent = [p for p in param_list or [parameter] if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            return self._stating(absent, lambda: stock(param_list, **named))

        return gather

    def _stating(self, parameters: list[nn.Parameter], gather: Callable[[], Any]) -> Any:
        for parameter in parameters:
            ranks = parameter.ds_zero_partition_world_size
            if ranks > 1:
                share = parameter.ds_tensor.ds_numel * parameter.ds_tensor.element_size()
                self._state(share * ranks, ranks, id(parameter) in self._experts)
        self._stated_already = True
        try:
            return gather()
        finally:
            self._stated_already = False

    def _state(self, whole: int, ranks: int, is_experts: bool) -> None:
        self._counts["stated"] += whole
        if is_experts:
            self._counts["experts"] += whole
            self._counts["experts_received"] += whole // ranks * (ranks - 1)


def resident(learner: Learner) -> dict[str, int]:
    """Bytes between steps by kind: shares, and whole tensors beside them with their padding.

    `storage` is the same of everything on routed experts by all storages behind it, each once.
    """
    backbone = [p for ffn in learner.ffns for p in backbone_experts(ffn)]
    lora = [p for ffn in learner.ffns for p in lora_on_experts(ffn)]
    known = {id(p) for p in (*backbone, *lora)}
    rest = [p for p in learner.model.parameters() if id(p) not in known]
    kinds = {"backbone": backbone, "lora": lora, "rest": rest}
    shares = {kind: bytes_of(parts(p)[0] for p in parameters) for kind, parameters in kinds.items()}
    whole = {kind: storage_bytes(w for p in parameters for w in parts(p)[1:]) for kind, parameters in kinds.items()}
    return {
        **{kind: shares[kind] + whole[kind] for kind in kinds},
        "rest_whole": whole["rest"],
        "storage": storage_bytes(tensor for p in (*backbone, *lora) for tensor in parts(p)),
    }


def parts(parameter: nn.Parameter) -> list[torch.Tensor]:
    """The share of a partitioned parameter, then the whole where it is kept in memory of its own."""
    if not hasattr(parameter, "ds_id"):
        return [parameter.data]
    share, whole = parameter.ds_tensor.data, parameter.data
    apart = whole.untyped_storage().data_ptr() != share.untyped_storage().data_ptr()
    return [share, *([whole] if apart else [])]


def optimizer(learner: Learner) -> dict[str, Any]:
    """Adam's state on this rank: whose it is, elements on routed experts and on the rest, bytes with master copies."""
    zero = learner.engine.optimizer
    stage3 = learner.engine.zero_optimization_stage() == 3
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    experts = {id(parameter) for parameter in on_experts(learner)}
    names = {id(parameter): name for name, parameter in public_names(learner).items()}
    note: dict[str, Any] = {"bytes": optimizer_bytes(learner), "experts": 0, "rest": 0, "names": [], "mixed": 0}
    for flat, parameters in zip(flats, optimizer_parameters(learner), strict=True):
        owned = {id(parameter) in experts for parameter in parameters}
        note["mixed"] += len(owned) > 1
        state = zero.optimizer.state[flat]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == flat.shape
        note["experts" if owned == {True} else "rest"] += flat.numel()
        note["names"] += [names.get(id(parameter), "unknown") for parameter in parameters]
    note["states"] = len(zero.optimizer.state) - len(flats)  # of anything else
    return note


@torch.no_grad()
def held_experts(learner: Learner, backbone: str) -> dict[str, list[list[int]]]:
    """{parameter: for each local row the experts of the stock model with these values}, gathered over its group."""
    stock = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).state_dict()
    found = {}
    for ffn in learner.ffns:
        experts = getattr(ffn.ffn, ffn.routed.experts)
        for name, parameter in experts.named_parameters():
            wanted = stock[f"{ffn.path}.{ffn.routed.experts}.{name}"]
            with gathered([parameter]):
                rows = [[e for e, row in enumerate(wanted) if torch.equal(own, row)] for own in parameter.data]
            found[f"{ffn.path}.{name}"] = rows
    return found


@torch.no_grad()
def held_lora(learner: Learner) -> dict[str, list[list[int]]]:
    """{public name: for each local row the expert it started as}: all entries stayed near the expert's start value."""
    known = {id(parameter) for parameter in on_experts(learner)}
    found = {}
    for name, parameter in learner.parameters.items():
        if id(parameter) in known:
            with gathered([parameter]):
                nearest = (parameter.data / SPACING).round().long() - 1
                found[name] = [row.unique().tolist() for row in nearest]
    return found


if __name__ == "__main__":
    sys.exit(worker.main({"own": own}))

"""The model on its ranks: backbone, LoRA experts, DeepSpeed engine, from one configuration.

Memory and start-up do not depend on how many tasks were learned: the engine holds one set of expert slots, filled
from the bank.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from data_contracts.errors import UserError
from pipeline.backbones.answer_model import AnswerModel
from pipeline.backbones.checkpoint import Checkpoint
from pipeline.backbones.families import PROJECTIONS, family_of
from pipeline.backbones.fetch import local_backbone
from pipeline.backbones.load import load_config, skeleton
from pipeline.config import StreamConfig
from pipeline.experts.attach import Components, ExpertPlan, Experts, attach_experts, components_of, pairs_of
from pipeline.experts.checkpointing import checkpoint_activations
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.linear import ExpertLinear
from pipeline.experts.lora import targeted_projections
from pipeline.placement.distributed import World
from pipeline.placement.expert_parallel import Marker, check_degrees, join, share_out
from pipeline.placement.materialise import materialise, stock_tensors
from pipeline.placement.state import Source, experts_of, full_shape, write_weights

# what the stream says, the DeepSpeed file must not say again
_OWNED_BY_STREAM = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_tokens",
    "gradient_clipping": "training.gradient_clipping",
    "bf16": "backbone.dtype",
    "fp16": "backbone.dtype",
    "optimizer": "training.learning_rate",
    "scheduler": "training.warmup_fraction",
}


@dataclass
class Learner:
    """A backbone with expert slots on this world's ranks.

    `engine` is None where nothing is trained and nothing is partitioned; `forward` is what runs the model in any case.
    """

    world: World
    model: AnswerModel
    experts: Experts
    components: Components
    engine: Any | None

    @property
    def ffns(self) -> list[ExpertFFN]:
        """The adapted feed-forward networks, first layer first."""
        return self.experts.ffns

    @property
    def forward(self):
        """The callable that runs the model (`AnswerModel.forward`'s arguments)."""
        return self.engine if self.engine is not None else self.model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every expert, gate and discriminator parameter by `<component>/<public name>`."""
        return {f"{component}/{name}": p for component, part in self.components.items() for name, p in part.items()}

    def set_active(self, roles: tuple[str, ...]) -> None:
        """Which LoRA experts speak; none is the bare backbone."""
        for module in [*self.experts.ffns, *self.experts.linears]:
            module.active = roles

    def fill(self, component: str, values: Source) -> None:
        """Write a component's tensors, by public name, into the working weights of their slots."""
        write_weights(self.components[component], values)

    @torch.no_grad()
    def set_past(self, role: str, past: Sequence[tuple[Source, float]]) -> None:
        """Add frozen LoRA experts, weighted, to a role's own wherever it speaks; none takes them away.

        They are not parameters: no rank shares them out but by routed experts, and nothing is trained in them. In the
        working precision sum_k w_k B_k A_k has rank sum_k R_k, and costs as much.
        """
        for path, pair in pairs_of(self.experts)[role].items():
            parts = [(pair.lora_A, "lora_A"), (pair.lora_B, "lora_B")]
            read = [[s.read(f"{path}.{name}", experts_of(p)) for s, _ in past] for p, name in parts]
            pair.past = None
            if past:
                weighted = [lora_b * weight for lora_b, (_, weight) in zip(read[1], past, strict=True)]
                stacked = torch.cat(read[0], dim=-2), torch.cat(weighted, dim=-1)
                pair.past = tuple(t.to(self.world.device, pair.lora_A.dtype) for t in stacked)


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. Raises UserError for what the stream sets itself and for stages other than 2 and
    3.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"deepspeed: cannot read {path} ({error.strerror}); see deepspeed_configs/ for files that work"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed: {path} is not valid JSON ({error}); correct the file") from error
    if not isinstance(raw, dict):
        raise UserError(f"deepspeed: {path} must hold a JSON object")
    for key, owner in _OWNED_BY_STREAM.items():
        if key in raw:
            raise UserError(
                f"deepspeed: {path} sets '{key}', which the stream sets by {owner}; remove it from the file"
            )
    zero = raw.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (2, 3):
        raise UserError(f"deepspeed: {path} has zero_optimization.stage {stage}; this pipeline runs stages 2 and 3")
    parallel = raw.get("expert_parallel", {"autoep_size": 1})
    if not isinstance(parallel, dict) or parallel.keys() != {"autoep_size"} or not _is_degree(parallel["autoep_size"]):
        raise UserError(
            f'deepspeed: {path} must give expert_parallel as {{"autoep_size": N}} with a whole N from 1, and nothing '
            "more: dispatch is this pipeline's own"
        )
    return raw


def _is_degree(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def engine_config(raw: dict[str, Any], config: StreamConfig) -> dict[str, Any]:
    """The complete DeepSpeed configuration. The loop normalises the loss and marks the accumulation boundaries
    itself.
    """
    return {
        **raw,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.gradient_clipping,
        "bf16": {"enabled": config.backbone.dtype == "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where the state is offloaded: no compiled op
        "steps_per_print": 10**9,
    }


def expert_parallel_size(config: StreamConfig) -> int:
    """The degree that the DeepSpeed file asks for; 1 where it asks for none."""
    return read_deepspeed_config(config.deepspeed).get("expert_parallel", {}).get("autoep_size", 1)


def check_before_loading(config: StreamConfig, plan: ExpertPlan | None) -> None:
    """Raise UserError for a DeepSpeed file, backbone or target that cannot work, before any weight is read."""
    read_deepspeed_config(config.deepspeed)
    model, family = skeleton(config.backbone)
    if plan is None:
        return
    targets = targeted_projections(family, model, plan.lora.targets)
    if plan.num_discriminator_outputs and all(site.endswith(f".{family.attention}") for site in targets):
        raise UserError(
            "method.adversary judges the feed-forward networks, and method.lora.targets names none; add one of "
            f"{', '.join(PROJECTIONS)} or set method.adversary.weight=0"
        )


def check_world(config: StreamConfig, world: World) -> None:
    """Raise UserError where the expert-parallel degree does not fit the world or the backbone."""
    model_config = load_config(config.backbone)
    check_degrees(expert_parallel_size(config), world.size, family_of(model_config), model_config)


def build_learner(
    config: StreamConfig,
    plan: ExpertPlan | None,
    world: World,
    *,
    train: bool,
    passed: Callable[[str], None] = lambda phase: None,
) -> Learner:
    """Load, attach experts, partition. With `train` there is an optimizer over the plan's components and nothing else.

    `check_before_loading` and `check_world` have refused what cannot work. `passed` is told when the phases `backbone`
    and `engine` are done.
    """
    raw = read_deepspeed_config(config.deepspeed)
    parallel = join(raw.pop("expert_parallel", {}).get("autoep_size", 1))
    stage = raw["zero_optimization"]["stage"]
    backbone, family = skeleton(config.backbone)
    settings = engine_config(raw, config)
    if parallel is not None:
        share_out(backbone, family, parallel)
    parameters, buffers = stock_tensors(backbone)
    experts = attach_experts(backbone, family, plan, parallel)
    components = components_of(experts)
    if config.training.activation_checkpointing:
        checkpoint_activations(backbone, family)
    checkpoint = Checkpoint(local_backbone(config.backbone.path), family, backbone.config)
    dtype = getattr(torch, config.backbone.dtype)
    materialise(parameters, buffers, checkpoint, world.device, dtype, settings if stage == 3 else None)
    model = AnswerModel(backbone)
    if parallel is not None:
        model.expert_parallel = Marker(parallel, getattr(backbone.config, family.routed.num_experts))
    train = train and bool(components)
    for component in components.values():
        for parameter in component.values():
            parameter.requires_grad_(train)
    if stage == 3 and (leaves := {type(m) for m in model.modules()} & {ExpertFFN, ExpertLinear}):
        set_z3_leaf_modules(model, list(leaves))
    passed("backbone")
    engine = None
    if train or stage == 3:
        optimizer = None
        if train:
            groups = parameter_groups(config, plan, components)
            optimizer = torch.optim.AdamW(groups, lr=config.training.learning_rate)
        wide = {p: p.data for p in parameters.values() if stage != 3 and p.dtype == torch.float32}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        for parameter, data in wide.items():  # a router that the family keeps in fp32: the engine casts everything
            parameter.data = data.to(world.device)
    else:
        model.to(world.device)
    passed("engine")
    return Learner(world, model, experts, components, engine)


def parameter_groups(config: StreamConfig, plan: ExpertPlan, components: Components) -> list[dict[str, Any]]:
    """Optimizer groups: one a component, and one more for its part on routed experts.

    Weight decay is for the LoRA experts, not for gates and discriminators. DeepSpeed knows the group of parameters that
    are shared out over ranks by `moe` and the name of the ranks' group.
    """
    base = config.training.learning_rate
    groups = []
    for component, parameters in components.items():
        learning_rate = plan.learning_rates.get(component) or base
        for routed in (False, True):
            chosen = [p for name, p in parameters.items() if (len(full_shape(p)) == 3) == routed]
            if not chosen:
                continue
            group = {
                "params": chosen,
                "name": component,
                "lr": learning_rate,
                "base_lr": learning_rate,
                "routed": routed,
                "weight_decay": config.training.weight_decay if component in plan.roles else 0.0,
            }
            if hasattr(chosen[0], "expert_slice"):
                group |= {"moe": True, "name": chosen[0].group_name}
            groups.append(group)
    return groups

"""The model on its ranks: backbone, LoRA experts, DeepSpeed engine, from one configuration.

Memory and start-up do not depend on how many tasks were learned: the engine holds one set of expert slots, filled
from the bank (DESIGN section 9).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from data_contracts.errors import UserError
from pipeline.backbones.answer_model import AnswerModel
from pipeline.backbones.families import family_of
from pipeline.backbones.load import load_backbone, load_config
from pipeline.config import StreamConfig
from pipeline.experts.attach import Components, ExpertPlan, attach_experts, components_of
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.lora import targeted_projections
from pipeline.placement.distributed import World
from pipeline.placement.state import write_weights

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
    ffns: list[ExpertFFN]
    components: Components
    engine: Any | None
    hf_deepspeed: HfDeepSpeedConfig | None = field(default=None, repr=False)  # kept alive: transformers holds it weakly

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
        for ffn in self.ffns:
            ffn.active = roles

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Collective: write full tensors (by `<component>/<public name>`) into the working weights of their slots."""
        parameters = self.parameters
        write_weights({name: parameters[name] for name in tensors}, tensors)


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
    except ValueError as error:
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
    return raw


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


def check_before_loading(config: StreamConfig, plan: ExpertPlan | None) -> None:
    """Raise UserError for a DeepSpeed file, backbone or target that cannot work, before any weight is read."""
    read_deepspeed_config(config.deepspeed)
    model_config = load_config(config.backbone)
    family = family_of(model_config)
    if plan is not None:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        targeted_projections(family, skeleton, plan.lora.targets)


def build_learner(config: StreamConfig, plan: ExpertPlan | None, world: World, *, train: bool) -> Learner:
    """Load, attach experts, partition. With `train` there is an optimizer over the plan's components and nothing else.

    `check_before_loading` has refused what cannot work.
    """
    raw = read_deepspeed_config(config.deepspeed)
    settings = engine_config(raw, config)
    stage = raw["zero_optimization"]["stage"]
    hf_deepspeed = HfDeepSpeedConfig(settings) if stage == 3 else None
    backbone = load_backbone(config.backbone)
    ffns: list[ExpertFFN] = []
    if plan is not None:
        ffns = attach_experts(backbone.model, backbone.family, plan)
    components = components_of(ffns)
    model = AnswerModel(backbone.model)
    train = train and bool(components)
    for component in components.values():
        for parameter in component.values():
            parameter.requires_grad_(train)
    engine = None
    if stage == 3 and ffns:
        set_z3_leaf_modules(model, [ExpertFFN])
    if train:
        optimizer = torch.optim.AdamW(parameter_groups(config, plan, components), lr=config.training.learning_rate)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    elif stage == 3:
        engine = deepspeed.initialize(model=model, config=settings)[0]
    else:
        model.to(world.device)
    return Learner(world, model, ffns, components, engine, hf_deepspeed)


def parameter_groups(config: StreamConfig, plan: ExpertPlan, components: Components) -> list[dict[str, Any]]:
    """One optimizer group a component. Weight decay is for the LoRA experts, not for gates and discriminators."""
    base = config.training.learning_rate
    rates = {component: plan.learning_rates.get(component) or base for component in components}
    return [
        {
            "params": list(parameters.values()),
            "name": component,
            "lr": rates[component],
            "base_lr": rates[component],
            "weight_decay": config.training.weight_decay if component in plan.roles else 0.0,
        }
        for component, parameters in components.items()
    ]

"""Put LoRA experts into a backbone, and name their parameters without regard to rank or world size.

A *component* is what is trained and published as one: a role's LoRA expert over all layers, the gate, or the
discriminator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from pipeline.backbones.families import DenseFamily
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.lora import LoraOptions, targeted_projections


@dataclass(frozen=True)
class ExpertPlan:
    """Which LoRA experts a method puts into every adapted FFN."""

    lora: LoraOptions
    roles: tuple[str, ...]  # more than one are mixed by a gate
    num_discriminator_outputs: int = 0  # 0: no discriminator
    # of each component; None, or a component left out, takes training.learning_rate
    learning_rates: Mapping[str, float | None] = field(default_factory=dict)


Components = dict[str, dict[str, nn.Parameter]]  # {component: {public tensor name: parameter}}


def attach_experts(model: nn.Module, family: DenseFamily, plan: ExpertPlan) -> list[ExpertFFN]:
    """Replace every targeted FFN by an `ExpertFFN` around it; returns them, first layer first.

    Raises UserError where a target matches nothing.
    """
    projections = targeted_projections(family, model, plan.lora.targets)
    ffns = []
    for path, layer, ffn in list(family.feed_forwards(model)):
        if path not in projections:
            continue
        wrapped = ExpertFFN(ffn, len(ffns), plan.roles, projections[path], plan.lora, plan.num_discriminator_outputs)
        wrapped.path = path
        setattr(layer, family.ffn, wrapped)
        ffns.append(wrapped)
    return ffns


def components_of(ffns: list[ExpertFFN]) -> Components:
    """Every trainable parameter under its component and its public name, e.g.
    `shared` -> `model.layers.3.mlp.gate_proj.lora_A` (R, D), `gate` -> `model.layers.3.mlp.gate.weight` (roles, D)."""
    components: Components = {}
    for ffn in ffns:
        for role, expert in ffn.experts.items():
            for projection, pair in expert.items():
                for name, parameter in pair.named_parameters():
                    components.setdefault(role, {})[f"{ffn.path}.{projection}.{name}"] = parameter
        for component in ("gate", "discriminator"):
            for name, parameter in getattr(ffn, component, nn.Module()).named_parameters():
                components.setdefault(component, {})[f"{ffn.path}.{component}.{name}"] = parameter
    return components

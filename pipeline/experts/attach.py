"""Put LoRA experts into a backbone, and name their parameters without regard to rank or world size.

A *component* is what is trained and published as one: a role's LoRA expert over all layers, the gate, or the
discriminator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from pipeline.backbones.families import PROJECTIONS, Family
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.linear import ExpertLinear
from pipeline.experts.lora import LoraExpert, LoraOptions, LoraPair, targeted_projections
from pipeline.experts.pool import SubExperts
from pipeline.experts.sub_experts import SparsePair


@dataclass(frozen=True)
class ExpertPlan:
    """Which LoRA experts a method puts into every adapted FFN."""

    lora: LoraOptions
    roles: tuple[str, ...]  # more than one are mixed by a gate
    num_discriminator_outputs: int = 0  # 0: no discriminator
    # of each component; None, or a component left out, takes training.learning_rate
    learning_rates: Mapping[str, float | None] = field(default_factory=dict)
    sub_experts: SubExperts | None = None  # of every LoRA pair; None: it is one expert


class Sharing(Protocol):
    """How routed experts are shared out over ranks; see placement/expert_parallel.py."""

    group: Any

    def own(self, parameter: nn.Parameter, num_experts: int) -> None:
        """Mark a parameter that holds this rank's share."""


@dataclass
class Experts:
    """The modules that carry LoRA experts, first layer first, and those that only hold routed experts."""

    ffns: list[ExpertFFN] = field(default_factory=list)
    linears: list[ExpertLinear] = field(default_factory=list)  # of the attentions
    bare: list[ExpertFFN] = field(default_factory=list)  # routed blocks that nothing is attached to


Components = dict[str, dict[str, nn.Parameter]]  # {component: {public tensor name: parameter}}


def attach_experts(
    model: nn.Module, family: Family, plan: ExpertPlan | None, sharing: Sharing | None = None
) -> Experts:
    """Replace every targeted FFN, and every routed block, by an `ExpertFFN` around it, and targeted projections of the
    attentions by an `ExpertLinear`.

    With `sharing` the routed blocks hold this rank's share of their experts. Raises UserError where a target matches
    nothing.
    """
    targets = targeted_projections(family, model, plan.lora.targets) if plan else {}
    experts = Experts()
    for path, layer, ffn in list(family.feed_forwards(model)):
        routed = family.routed if family.is_routed(ffn) else None
        wrapped = ExpertFFN(ffn, path, routed, sharing.group if sharing else None)
        sites = {part: f"{path}.{part}" if part else path for part in wrapped.parts}
        adapted = {part: targets[site] for part, site in sites.items() if site in targets}
        if adapted:
            by_part = {
                part: lora_experts(wrapped.parts[part], projections, plan, sharing, wrapped.num_experts)
                for part, projections in adapted.items()
            }
            width = model.config.hidden_size
            wrapped.attach(len(experts.ffns), plan.roles, by_part, plan.lora, plan.num_discriminator_outputs, width)
            experts.ffns.append(wrapped)
        elif routed:
            experts.bare.append(wrapped)
        else:
            continue
        setattr(layer, family.ffn, wrapped)
    for path, attention in family.attentions(model):
        for projection in targets.get(path, ()):
            frozen = getattr(attention, projection)
            shape = (frozen.out_features, frozen.in_features)
            pairs = {role: new_pair(plan, shape, frozen.weight) for role in plan.roles}
            linear = ExpertLinear(frozen, f"{path}.{projection}", pairs, plan.lora)
            setattr(attention, projection, linear)
            experts.linears.append(linear)
    return experts


def lora_experts(
    frozen: nn.Module, projections: list[str], plan: ExpertPlan, sharing: Sharing | None, num_experts: int
) -> dict[str, LoraExpert]:
    """A LoRA expert for each role on one part of an FFN: on its networks' weights, stacked or single."""
    shapes = _projection_shapes(frozen)
    weight = next(frozen.parameters())
    by_role = {}
    for role in plan.roles:
        pairs = {name: new_pair(plan, shapes[name], weight) for name in projections}
        by_role[role] = LoraExpert(pairs)
        if sharing and len(shapes["down_proj"]) == 3:
            for parameter in by_role[role].parameters():
                sharing.own(parameter, num_experts)
    return by_role


def new_pair(plan: ExpertPlan, shape: tuple[int, ...], weight: nn.Parameter) -> LoraPair:
    """What one role adds to a frozen weight of that shape; `weight` has the dtype and the device."""
    if plan.sub_experts is not None:
        return SparsePair(shape, plan.lora.rank, plan.sub_experts, weight.dtype, _real(weight))
    return LoraPair(shape, plan.lora.rank, weight.dtype, _real(weight))


def _projection_shapes(frozen: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shape of each projection: (out, in), or (E, out, in) for the stacked weights of routed experts."""
    if hasattr(frozen, "gate_up_proj"):
        num_experts, width, ffn_width = frozen.down_proj.shape
        inner = (num_experts, ffn_width, width)
        return {"gate_proj": inner, "up_proj": inner, "down_proj": (num_experts, width, ffn_width)}
    linears = {name: getattr(frozen, name) for name in PROJECTIONS}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _real(weight: nn.Parameter):
    """Where LoRA tensors start: with the weight; on the CPU for a weight that is not loaded yet."""
    return "cpu" if weight.device.type == "meta" else weight.device


def components_of(experts: Experts) -> Components:
    """Every trainable parameter under its component and its public name, e.g.
    `shared` -> `model.layers.3.mlp.gate_proj.lora_A` (R, D), or, of routed experts,
    `model.layers.3.mlp.experts.gate_proj.lora_A` (E, R, D); `gate` -> `model.layers.3.mlp.gate.weight` (roles, D)."""
    components: Components = {
        role: {f"{path}.{name}": p for path, pair in pairs.items() for name, p in pair.named_parameters()}
        for role, pairs in pairs_of(experts).items()
    }
    for module in [*experts.ffns, *experts.linears]:
        for component in ("gate", "discriminator"):
            for name, parameter in getattr(module, component, nn.Module()).named_parameters():
                components.setdefault(component, {})[f"{module.path}.{component}.{name}"] = parameter
    return components


def pairs_of(experts: Experts) -> dict[str, dict[str, LoraPair]]:
    """Every LoRA pair under its role and the public name of its projection, e.g. `model.layers.3.mlp.gate_proj`."""
    pairs: dict[str, dict[str, LoraPair]] = {}
    for ffn in experts.ffns:
        for part, by_role in ffn.experts.items():
            path = ffn.path if part == "ffn" else f"{ffn.path}.{part}"
            for role, expert in by_role.items():
                pairs.setdefault(role, {}).update({f"{path}.{name}": pair for name, pair in expert.items()})
    for linear in experts.linears:
        for role, pair in linear.experts.items():
            pairs.setdefault(role, {})[linear.path] = pair
    return pairs

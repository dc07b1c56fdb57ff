"""What a method trains in a backbone, as names and shapes, and what each task adds to the bank (METHODS section 1).

Nothing is built: the names are the public names of `pipeline.experts.attach`, the shapes follow from the architecture.

Legend: D model width, F FFN width, E routed experts, R LoRA rank, M discriminator outputs, L adapted FFN blocks.
"""

import fnmatch
from dataclasses import dataclass, field

from data_contracts.errors import UserError
from pipeline.experts.pool import SubExperts, num_kept
from pipeline.placement.architecture import Architecture, TensorSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROLES = {  # method -> its LoRA experts; more than one are mixed by a gate
    "moe_cl": ("shared", "dedicated"),
    **dict.fromkeys(("sequential", "per_task", "replay", "multitask", "ewc", "olora", "mocl"), ("adapter",)),
    "moses": ("adapter",),
    "zero_shot": (),
}
KINDS = ("lora_attention", "lora_dense_ffn", "lora_always_on", "lora_routed_experts", "gate", "discriminator")


@dataclass(frozen=True)
class MethodChoice:
    """A continual-learning method and the shape of its LoRA experts."""

    name: str = "moe_cl"
    rank: int = 8
    targets: tuple[str, ...] = PROJECTIONS  # names, or patterns over a projection's path
    discriminator_outputs: int = 8  # of moe_cl; 0: no adversary
    sub_experts: SubExperts = field(default_factory=SubExperts)  # of moses

    def __post_init__(self) -> None:
        if self.name not in ROLES:
            raise UserError(f"--method {self.name} is not known; choose one of {', '.join(ROLES)}")
        if self.rank < 1:
            raise UserError(f"--rank is {self.rank}; a LoRA expert has a rank of at least 1")
        if self.discriminator_outputs < 0 or self.discriminator_outputs == 1:
            raise UserError(f"--discriminator-outputs is {self.discriminator_outputs}; 2 or more, or 0 for none")
        pool = self.sub_experts
        if not 1 <= pool.top_k <= pool.number or not 0 < pool.density <= 1:
            raise UserError(
                f"--sub-experts {pool.number}, --choose {pool.top_k}, --density {pool.density}: a task chooses from 1 "
                "to all sub-experts, and of each a share above 0 and up to 1"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """The LoRA experts of every adapted projection."""
        return ROLES[self.name]

    @property
    def plays(self) -> bool:
        """Whether there is a discriminator."""
        return self.name == "moe_cl" and self.discriminator_outputs > 0


@dataclass(frozen=True)
class Trainable:
    """What is trained: tensors by component and public name, and the adapted FFN blocks' layers, first first."""

    method: MethodChoice
    tensors: tuple[TensorSpec, ...]
    adapted_layers: tuple[int, ...]
    first_layer: int | None  # the first layer with anything trained in it; None: nothing is
    attention_first: bool = False  # in that layer, attention is trained too

    @property
    def parameters(self) -> int:
        """Elements of all trained tensors."""
        return sum(tensor.numel for tensor in self.tensors)


def trainable_of(architecture: Architecture, method: MethodChoice) -> Trainable:
    """Every trained tensor of a method in a backbone. Raises UserError for a target that matches nothing."""
    if not method.roles:
        return Trainable(method, (), (), None)
    unused = set(method.targets)
    tensors: list[TensorSpec] = []
    adapted: list[int] = []
    for layer in range(architecture.num_layers):
        block = f"model.layers.{layer}.mlp"
        parts = [part for part in _projections(architecture, layer) if _matches(part.path, method.targets, unused)]
        for part in parts:
            for role in method.roles:
                tensors += part.trained(role, method)
            if part.kind == "lora_attention" and len(method.roles) > 1:
                tensors.append(_gate(part.path, (len(method.roles), part.in_features), layer))
        if all(part.kind == "lora_attention" for part in parts):
            continue
        adapted.append(layer)
        if len(method.roles) > 1:
            tensors.append(_gate(block, (len(method.roles), architecture.hidden_size), layer))
        if method.plays:
            outputs, name = method.discriminator_outputs, f"{block}.discriminator"
            shapes = {"weight": (outputs, architecture.hidden_size), "bias": (outputs,)}
            for part_name, shape in shapes.items():
                tensors.append(
                    TensorSpec(f"{name}.{part_name}", shape, "discriminator", layer, component="discriminator")
                )
    if unused:
        there = ", ".join(sorted({part.path.split(".", 3)[3] for part in _projections(architecture, None)}))
        raise UserError(
            f"--targets: {', '.join(sorted(unused))} matches no projection; in its layers there are {there}"
        )
    if method.plays and not adapted:
        raise UserError(
            "--targets names no feed-forward network, which the adversary of moe_cl judges; add one of "
            f"{', '.join(PROJECTIONS)}, or give --discriminator-outputs 0"
        )
    layers = [tensor.layer for tensor in tensors if tensor.layer is not None]
    first = min(layers, default=None)
    attention_first = any(tensor.layer == first and ".self_attn." in tensor.name for tensor in tensors)
    return Trainable(method, tuple(tensors), tuple(adapted), first, attention_first)


def bank_growth(architecture: Architecture, trainable: Trainable) -> dict[str, int]:
    """Bytes that one learned task adds to the bank, by file: fp32 tensors, their headers (about 150 bytes a tensor)
    left out.

    Every increment publishes a new version of each component of the serving bundle; `state` holds the task's prototype
    (mean and variance, (L, D) each) and its row of the discriminator ((L, D) and (L,)), of `ewc` the Fisher information
    of every trained element, of `mocl` and `moses` the prompts' mean and variance. Of `moses` it is what the first task
    adds, and the most that one can.
    """
    if trainable.method.name == "moses":
        parts = _projections(architecture, None)
        adapted = [part for part in parts if _matches(part.path, trainable.method.targets, set())]
        claims = sum(part.claim_bytes(trainable.method) for part in adapted)
        return {"adapter": claims, "state": 8 * architecture.hidden_size}
    growth: dict[str, int] = {}
    for tensor in trainable.tensors:
        if tensor.component != "discriminator":
            growth[tensor.component] = growth.get(tensor.component, 0) + 4 * tensor.numel
    if trainable.method.plays:
        growth["state"] = 4 * len(trainable.adapted_layers) * (3 * architecture.hidden_size + 1)
    if trainable.method.name == "ewc":
        growth["state"] = 4 * trainable.parameters
    if trainable.method.name == "mocl":
        growth["state"] = 8 * architecture.hidden_size
    return growth


@dataclass(frozen=True)
class _Projection:
    """One linear map, or E of them, that LoRA pairs can be put on."""

    path: str
    kind: str
    layer: int
    out_features: int
    in_features: int
    num_experts: int = 0  # stacked along the first dimension; 0: one map, no such dimension

    def trained(self, role: str, method: MethodChoice) -> list[TensorSpec]:
        """A (R, in) and B (out, R), or one of each per routed expert; of sub-experts their scores and matches too."""
        stack, number = (self.num_experts,) if self.num_experts else (), method.sub_experts.number
        rank = method.rank * (number if method.name == "moses" else 1)
        shapes = {"lora_A": (*stack, rank, self.in_features), "lora_B": (*stack, self.out_features, rank)}
        if method.name == "moses":
            shapes |= {f"score_{side}": (*stack, number, size) for side, size in self.blocks(method).items()}
            shapes["match"] = (*stack, number, 1)
        return [
            TensorSpec(f"{self.path}.{name}", shape, self.kind, self.layer, bool(stack), component=role)
            for name, shape in shapes.items()
        ]

    def blocks(self, method: MethodChoice) -> dict[str, int]:
        """Parameters of one sub-expert's A and B."""
        return {"A": method.rank * self.in_features, "B": method.rank * self.out_features}

    def claim_bytes(self, method: MethodChoice) -> int:
        """Bytes that a task stores of it if nothing that it uses is claimed (experts/claims.py)."""
        top_k, total = method.sub_experts.top_k, 5  # a number and a weight
        for size in self.blocks(method).values():
            kept = num_kept(size, method.sub_experts.density)
            total += -(-size // 8) + -(-kept // 8) + 4 * kept
        return max(1, self.num_experts) * top_k * total


def _projections(architecture: Architecture, layer: int | None) -> list[_Projection]:
    """The projections of one layer; of all layers where it is None."""
    if layer is None:
        return [part for index in range(architecture.num_layers) for part in _projections(architecture, index)]
    path, width = f"model.layers.{layer}", architecture.hidden_size
    found = [
        _Projection(f"{path}.self_attn.{name}", "lora_attention", layer, *shape)
        for name, shape in architecture.attention_projections(layer).items()
    ]
    if layer in architecture.dense_layers:
        ffns = [(f"{path}.mlp", "lora_dense_ffn", architecture.dense_width, 0)]
    else:
        ffns = [
            (f"{path}.mlp.experts", "lora_routed_experts", architecture.expert_width, architecture.num_experts),
        ]
        if architecture.always_on:
            ffns.append((f"{path}.mlp.{architecture.always_on}", "lora_always_on", architecture.always_on_width, 0))
    for ffn, kind, ffn_width, num_experts in ffns:
        for name in PROJECTIONS:
            shape = (width, ffn_width) if name == "down_proj" else (ffn_width, width)
            found.append(_Projection(f"{ffn}.{name}", kind, layer, *shape, num_experts))
    return found


def _matches(path: str, targets: tuple[str, ...], unused: set[str]) -> bool:
    hits = {t for t in targets if t == path or fnmatch.fnmatchcase(path, f"*.{t}") or fnmatch.fnmatchcase(path, t)}
    unused -= hits
    return bool(hits)


def _gate(path: str, shape: tuple[int, int], layer: int) -> TensorSpec:
    return TensorSpec(f"{path}.gate.weight", shape, "gate", layer, component="gate")

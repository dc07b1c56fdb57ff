"""The expert FFN: a frozen feed-forward network or routed block with LoRA experts and a token-wise gate.

    z_e = sum_k w_k z_{e, routed expert k} + z_e of the always-on network;   y = sum_e beta_e z_e,  beta = softmax(G x)

or, on a dense layer, one network alone. The frozen down-projection is linear and the gate sums to one, so mixing
happens before it and costs one frozen matmul (METHODS section 1; the algebra is in swiglu.py).

Legend: B sequences, packed into N rows of S tokens (T = N * S); D model width, F FFN width, K top-k, C token copies on
the rank that owns their routed expert.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from pipeline.backbones.families import RoutedBlock
from pipeline.experts.discriminator import AdversaryStep, AttachLoss, Discriminator, Places
from pipeline.experts.dispatch import route
from pipeline.experts.kernel import MixedSwiglu
from pipeline.experts.lora import LoraExpert, LoraOptions
from pipeline.experts.segment import Frozen, Shape
from pipeline.experts.swiglu import GroupedLinear, add, expert_down, plain_mixed


class ExpertFFN(nn.Module):
    """Holds the frozen FFN, or routed block, and its LoRA experts, one for each role ('shared', 'dedicated', ...).

    `active` names the roles that speak: none is the bare backbone, one speaks alone, more are mixed by the gate.
    It is a ZeRO-3 leaf module: all its parameters are fetched together, since its forward reads them directly, and
    since ranks that route differently must fetch the same.
    """

    def __init__(self, ffn: nn.Module, path: str, routed: RoutedBlock | None, group: Any) -> None:
        """`routed` describes a block whose experts are spread over the ranks of `group` (None: all are here)."""
        super().__init__()
        self.ffn = ffn
        self.path = path  # public: model.layers.3.mlp
        self.routed = routed
        router = getattr(ffn, routed.router) if routed else None
        self.num_experts, self.top_k = (router.num_experts, router.top_k) if routed else (0, 0)
        self.group = group
        self.layer = -1  # index among the adapted layers
        self.experts = nn.ModuleDict()  # part of the FFN -> role -> LoraExpert
        self.scaling = 1.0
        self.dropout = nn.Dropout(0.0)
        self.active: tuple[str, ...] = ()
        self.adversary: AdversaryStep | None = None  # set for one micro-batch by the method
        self.pool: torch.Tensor | None = None  # (B, T): when set, `pooled` collects the shared expert's mean output
        self.pooled: torch.Tensor | None = None
        self.register_forward_pre_hook(require_input_gradient)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Name -> frozen module of what can carry LoRA experts: '' is the whole of a dense layer."""
        if self.routed is None:
            return {"": self.ffn}
        names = [self.routed.experts, *([self.routed.always_on] if self.routed.always_on else [])]
        return {name: getattr(self.ffn, name) for name in names}

    def attach(
        self,
        layer: int,
        roles: tuple[str, ...],
        experts: dict[str, dict[str, LoraExpert]],
        lora: LoraOptions,
        num_discriminator_outputs: int,
        width: int,
    ) -> None:
        """Add LoRA experts: {part: {role: LoraExpert}}; with more than one role a gate, and perhaps a discriminator."""
        self.layer = layer
        self.roles = roles
        self.scaling = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        # a module's name cannot be empty
        self.experts = nn.ModuleDict({part or "ffn": nn.ModuleDict(by_role) for part, by_role in experts.items()})
        some = next(self.experts.parameters())
        if len(roles) > 1:
            self.gate = nn.Linear(width, len(roles), bias=False, dtype=some.dtype, device=some.device)
        if num_discriminator_outputs:
            self.discriminator = Discriminator(width, num_discriminator_outputs, dtype=some.dtype, device=some.device)
        self.active = roles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token states of N packed rows, (N, S, D) -> (N, S, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        pool = self.adversary.pool if self.adversary is not None else self.pool
        if self.routed is None:
            y, pooled = self._dense("", tokens, pool)
        else:
            y, pooled = self._block(tokens, pool)
        if self.adversary is not None:
            step = self.adversary
            loss = self.discriminator.loss(pooled, step, self.layer)
            step.cross_entropy.append(loss.detach())
            y = AttachLoss.apply(y, loss * step.scale)
        if self.pool is not None:
            self.pooled = pooled
        return y.view_as(x)

    def gate_weights(self, x: torch.Tensor) -> torch.Tensor:
        """beta = softmax(G x): (..., D) -> (..., roles), summing to one over the roles."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.softmax(F.linear(x, self.gate.weight), dim=-1, dtype=wide).to(x.dtype)

    def _block(self, x: torch.Tensor, pool: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A routed block: (T, D) -> (T, D), and mean(z_s) over each sequence, (B, D), of the parts with experts."""
        block = self.routed
        y, pooled = self._routed(x, pool)
        if block.always_on:
            beside, more = self._dense(block.always_on, x, pool)
            wide = torch.float32 if getattr(self.ffn, "enable_moe_fp32_combine", False) else y.dtype
            y = (y.to(wide) + beside.to(wide)).to(y.dtype)
            pooled = more if pooled is None else add(pooled, more)
        return y, pooled

    def _dense(self, part: str, x: torch.Tensor, pool: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One SwiGLU network on all tokens. The leaf module fetched the weights: no call through the children."""
        ffn = self.parts[part]
        experts = self._speaking(part)
        if not experts:
            return _linear(ffn.down_proj, ffn.act_fn(_linear(ffn.gate_proj, x)) * _linear(ffn.up_proj, x)), None
        gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        frozen = Frozen(gate.weight, up.weight, down.weight, gate.bias, up.bias)
        notes = None
        if pool is not None:
            places = self.adversary.places if self.adversary is not None else Places.of(pool)
            notes = places.slot, places.share, len(pool)  # the division comes after the sum
        y, sums = self._mixed(experts, frozen, ffn.act_fn, x, notes, None)
        y = add(y, down.bias)
        if pool is None:
            return y, None
        mean = sums / places.lengths.to(sums.dtype)
        return y, add(_linear(down, mean), expert_down([mean], experts[self._shared() :][:1], self.scaling))

    def _routed(self, x: torch.Tensor, pool: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The routed experts: every token to the ranks of its experts and back. Collective over the group."""
        block, stock = self.routed, getattr(self.ffn, self.routed.experts)
        weights, chosen = block.route(self.ffn, x)
        experts = self._speaking(block.experts)
        pool = pool if experts else None
        way = route(chosen, self.num_experts, 0 if pool is None else len(pool), self.group)
        tokens = way.dispatch(x)
        if not experts:
            grouped = GroupedLinear(way.counts)
            a, b = grouped(tokens, stock.gate_up_proj).chunk(2, dim=-1)
            return way.combine(grouped(stock.act_fn(a) * b, stock.down_proj), weights), None
        num_slots = sum(way.sequences)
        notes = None
        if pool is not None:
            share, slot = way.slots(way.dispatch(_notes(pool, weights.detach())))
            notes = slot, share, num_slots
        frozen = Frozen(stock.gate_up_proj, None, stock.down_proj)
        y, means = self._mixed(experts, frozen, stock.act_fn, tokens, notes, tuple(way.counts))
        y = way.combine(y, weights)
        if pool is None:
            return y, None
        # for each local expert, one row a sequence of all senders: the sum of w h_s over its copies there, by n
        rows = GroupedLinear([num_slots] * len(way.counts))
        shared = experts[self._shared() :][:1]
        z = add(rows(means, stock.down_proj), expert_down([means], shared, self.scaling, rows))
        return y, way.home(z.view(len(way.counts), num_slots, -1).sum(dim=0))

    def _mixed(
        self,
        experts: list[LoraExpert],
        frozen: Frozen,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        notes: tuple[torch.Tensor, torch.Tensor, int] | None,
        counts: tuple[int, ...] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed output of the speaking experts, (C, D), and the pooled sums; `notes` are slot, share, rows."""
        slot, share, pooled_rows = notes or (None, None, 0)
        dropout = self.dropout.p if self.training else 0.0
        dropped = self.dropout(x) if dropout else None  # one mask on x, for every expert and for the pooled path
        # the gate reads x alone, so the owner of a routed expert computes it again where the token landed
        beta = self.gate_weights(x)[:, self._places()] if len(experts) > 1 else None
        targeted = tuple(experts[0])
        whole = len(experts) == len(self.roles) == 2  # the softmax is over those that speak
        shape = Shape(counts, self.scaling, targeted, len(experts), dropout, pooled_rows, self._shared(), whole)
        if not isinstance(act_fn, (nn.SiLU, SiLUActivation)) or frozen.gate.requires_grad:
            return plain_mixed(shape, act_fn, x, dropped, beta, slot, share, frozen, experts)
        lora = [factor for expert in experts for name in targeted for factor in expert[name].factors()]
        return MixedSwiglu.apply(shape, x, dropped, beta, slot, share, *frozen, *lora)

    def _speaking(self, part: str) -> list[LoraExpert]:
        """The active LoRA experts of a part, in the order of the roles."""
        part = part or "ffn"
        if part not in self.experts:
            return []
        return [expert for role, expert in self.experts[part].items() if role in self.active]

    def _places(self) -> list[int]:
        """Which outputs of the gate belong to the active roles."""
        return [index for index, role in enumerate(self.roles) if role in self.active]

    def _shared(self) -> int:
        """The place of the shared expert among those that speak; 0 where it does not."""
        speaking = [role for role in self.roles if role in self.active]
        return speaking.index("shared") if "shared" in speaking else 0


def require_input_gradient(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Forward pre-hook of modules with LoRA experts, for ZeRO-3 and for the all-to-all of the backward pass.

    ZeRO-3 collects a leaf module's gradients when that of its input is complete: below the first adapted layer nothing
    is trained, so its input would have none and the gradients would be collected before they are there.
    """
    (x,) = inputs
    if torch.is_grad_enabled() and module.training and len(module.experts) and not x.requires_grad:
        return (x.detach().requires_grad_(),)
    return None


def _notes(pool: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """For every token copy its route weight over its sequence's length (0 for padding) and its sequence's slot,
    (T, K, 2), at least fp32."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    members = pool.to(wide)
    per_token = (members / members.sum(dim=1, keepdim=True)).sum(dim=0)  # (T,) 1 / n, or 0 for padding
    share = weights.to(wide) * per_token.unsqueeze(1)
    return torch.stack([share, pool.argmax(dim=0).to(wide).unsqueeze(1).expand_as(share)], dim=-1)


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)

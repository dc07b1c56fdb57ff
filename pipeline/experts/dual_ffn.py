"""The expert FFN: a frozen SwiGLU feed-forward network with LoRA experts and a token-wise gate (METHODS section 1).

    a = W_gate x, b = W_up x                                  frozen, once
    h_e = act(a + L_gate,e x) * (b + L_up,e x)                one a LoRA expert e
    beta = softmax(G x)
    y = W_down (sum_e beta_e h_e) + sum_e L_down,e (beta_e h_e)

The frozen down-projection is linear and the gate sums to one, so this equals mixing two whole FFNs, at one frozen
matmul.

Legend: B sequences, packed into N rows of S tokens; D model width, F FFN width, R LoRA rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.experts.discriminator import AdversaryStep, AttachLoss, Discriminator, pooled_mean
from pipeline.experts.lora import LoraExpert, LoraOptions, LoraPair


class ExpertFFN(nn.Module):
    """Holds the frozen FFN and its LoRA experts, one for each role ('shared', 'dedicated', 'adapter', ...).

    `active` names the roles that speak: none is the bare backbone, one speaks alone, more are mixed by the gate.
    It is a ZeRO-3 leaf module: all its parameters are fetched together, since its forward reads them directly.
    """

    def __init__(
        self,
        ffn: nn.Module,
        layer: int,
        roles: tuple[str, ...],
        projections: list[str],
        lora: LoraOptions,
        num_discriminator_outputs: int = 0,
    ) -> None:
        super().__init__()
        self.ffn = ffn
        self.layer = layer  # index among the adapted layers
        self.scaling = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        weight = ffn.gate_proj.weight
        dtype, device = weight.dtype, weight.device
        width, ffn_width = ffn.gate_proj.in_features, ffn.gate_proj.out_features
        shapes = {name: (width, ffn_width) if name == "down_proj" else (ffn_width, width) for name in projections}
        self.experts = nn.ModuleDict(
            {
                role: LoraExpert({name: LoraPair(shape, lora.rank, dtype, device) for name, shape in shapes.items()})
                for role in roles
            }
        )
        if len(roles) > 1:
            self.gate = nn.Linear(width, len(roles), bias=False, dtype=dtype, device=device)
        if num_discriminator_outputs:
            self.discriminator = Discriminator(width, num_discriminator_outputs, dtype=dtype, device=device)
        self.active: tuple[str, ...] = roles
        self.adversary: AdversaryStep | None = None  # set for one micro-batch by the method
        self.pool: torch.Tensor | None = (
            None  # (B, tokens): when set, `pooled` collects the shared expert's mean output
        )
        self.pooled: torch.Tensor | None = None
        self.register_forward_pre_hook(_require_input_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token states of N packed rows, (N, S, D) -> (N, S, D)."""
        a = _linear(self.ffn.gate_proj, x)
        b = _linear(self.ffn.up_proj, x)
        if not self.active:
            return _linear(self.ffn.down_proj, self.ffn.act_fn(a) * b)
        dropped = self.dropout(x)  # one mask on x, for every expert and for the pooled path
        hidden = self._hidden(dropped, a, b, self.active)
        if len(self.active) > 1:
            beta = self.gate_weights(x)
            places = [list(self.experts).index(role) for role in self.active]
            hidden = [h * beta[..., index : index + 1] for index, h in zip(places, hidden, strict=True)]
        y = _linear(self.ffn.down_proj, sum(hidden))
        down = self._down([self.dropout(h) for h in hidden], self.active)
        y = y if down is None else y + down
        if self.pool is not None:
            self.pooled = self.pooled_output(dropped, a, b, self.pool)
        if self.adversary is not None:
            step = self.adversary
            loss = self.discriminator.loss(self.pooled_output(dropped, a, b, step.pool), step, self.layer)
            step.cross_entropy.append(loss.detach())
            y = AttachLoss.apply(y, loss * step.scale)
        return y

    def gate_weights(self, x: torch.Tensor) -> torch.Tensor:
        """beta = softmax(G x): (N, S, D) -> (N, S, roles), summing to one over the roles."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.softmax(F.linear(x, self.gate.weight), dim=-1, dtype=wide).to(x.dtype)

    def pooled_output(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """mean(z_s) over each sequence's tokens, (B, D), as W_down mean(h_s) + L_down,s mean(h_s): one row a sequence.

        x, a, b are detached: only the shared expert of this layer is on the path. `x` carries the dropout mask already;
        the mean of h_s gets none.
        """
        (hidden,) = self._hidden(x.detach(), a.detach(), b.detach(), ("shared",))
        mean = pooled_mean(hidden, pool)
        down = self._down([mean], ("shared",))
        out = _linear(self.ffn.down_proj, mean)
        return out if down is None else out + down

    def _hidden(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, roles: tuple[str, ...]) -> list[torch.Tensor]:
        """h_e for each role, (N, S, F). All A-products that read x are one matmul with stacked A."""
        pairs = [(role, name) for role in roles for name in ("gate_proj", "up_proj") if name in self.experts[role]]
        deltas = {}
        if pairs:
            stacked = torch.cat([self.experts[role][name].lora_A for role, name in pairs])
            for (role, name), low in zip(pairs, F.linear(x, stacked).chunk(len(pairs), dim=-1), strict=True):
                deltas[role, name] = F.linear(low, self.experts[role][name].lora_B) * self.scaling
        result = []
        for role in roles:
            gate = a + deltas[role, "gate_proj"] if (role, "gate_proj") in deltas else a
            up = b + deltas[role, "up_proj"] if (role, "up_proj") in deltas else b
            result.append(self.ffn.act_fn(gate) * up)
        return result

    def _down(self, hidden: list[torch.Tensor], roles: tuple[str, ...]) -> torch.Tensor | None:
        """sum_e L_down,e h_e, (..., D); None where the down-projection is not targeted."""
        if "down_proj" not in self.experts[roles[0]]:
            return None
        pairs = [self.experts[role]["down_proj"] for role in roles]
        low = [F.linear(h, pair.lora_A) for h, pair in zip(hidden, pairs, strict=True)]
        return F.linear(torch.cat(low, dim=-1), torch.cat([pair.lora_B for pair in pairs], dim=-1)) * self.scaling


def _require_input_gradient(module: ExpertFFN, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    # ZeRO-3 collects a leaf module's gradients when that of its input is complete: below the first adapted layer
    # nothing is trained, so its input would have none and the gradients would be collected before they are there
    (x,) = inputs
    if torch.is_grad_enabled() and module.training and not x.requires_grad:
        return (x.detach().requires_grad_(),)
    return None


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    # the leaf module fetched the weights already: no call through the child's own hooks
    return F.linear(x, layer.weight, layer.bias)

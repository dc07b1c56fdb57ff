"""A projection of the attention with LoRA experts: y = W x + sum_e beta_e L_e x, beta = softmax(G x)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.experts.dual_ffn import require_input_gradient
from pipeline.experts.lora import LoraOptions, LoraPair


class ExpertLinear(nn.Module):
    """Holds a frozen linear map and one LoRA pair for each role. A ZeRO-3 leaf module, like `ExpertFFN`."""

    def __init__(self, linear: nn.Linear, path: str, pairs: Mapping[str, LoraPair], lora: LoraOptions) -> None:
        """`pairs` are the LoRA pairs by role."""
        super().__init__()
        self.linear = linear
        self.path = path  # public: model.layers.3.self_attn.q_proj
        roles = tuple(pairs)
        self.roles = self.active = roles  # `active` names the roles that speak, as in ExpertFFN
        self.scaling = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        weight = linear.weight
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        self.experts = nn.ModuleDict(pairs)
        if len(roles) > 1:
            self.gate = nn.Linear(linear.in_features, len(roles), bias=False, dtype=weight.dtype, device=device)
        self.register_forward_pre_hook(require_input_gradient)

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight, for code of transformers that asks a projection for its dtype."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.linear.weight, self.linear.bias)
        if not self.active:
            return y
        pairs = [self.experts[role].factors() for role in self.active]
        low = F.linear(self.dropout(x), torch.cat([lora_a for lora_a, _ in pairs]))  # (..., roles * R)
        if len(pairs) > 1:
            wide = torch.promote_types(x.dtype, torch.float32)
            beta = torch.softmax(F.linear(x, self.gate.weight), dim=-1, dtype=wide).to(x.dtype)
            beta = beta[..., [self.roles.index(role) for role in self.active]]
            low = (low.unflatten(-1, (len(pairs), -1)) * beta.unsqueeze(-1)).flatten(-2)
        return y + F.linear(low, torch.cat([lora_b for _, lora_b in pairs], dim=-1)) * self.scaling

"""The naive single process of mixture-of-experts backbones, in fp64: METHODS section 1 written out for routed blocks.

As tests/distributed/oracle.py, whose training it runs, with two whole SwiGLU networks for every routed expert and for
the always-on network. The stock router chooses; its weights are taken in fp64, where the stock ones are in fp32.

Legend: B rows, S sequence, T = B * S tokens, E routed experts, K top-k, D model width, F FFN width, R LoRA rank.
"""

from collections.abc import Sequence

import torch
from torch import nn

from tests.distributed.oracle import ROLES, NaiveFFN, Oracle, Run, Setting, Tensors

MARGIN = 1e-4  # least distance between the last chosen expert and the first one left out
ALWAYS_ON = {"hunyuan_v1_moe": "shared_mlp", "hy_v3": "shared_experts"}


def routes(model_type: str, block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Route weights (T, K) and experts (T, K) of tokens (T, D), and the numbers (T, E) that chose them."""
    if model_type == "hy_v3":
        bias = block.e_score_correction_bias
        _, stock_weights, chosen = block.gate(x, bias)
        scores = torch.sigmoid(x @ block.gate.weight.double().T)
        numbers = scores + bias.double()
        taken = scores.gather(1, chosen)
        weights = block.gate.router_scaling_factor * taken / taken.sum(dim=1, keepdim=True)
    else:
        _, stock_weights, chosen = block.gate(x)
        weight = block.gate.wg.weight if model_type == "hunyuan_v1_moe" else block.gate.weight
        numbers = x @ weight.double().T
        taken = torch.exp(numbers - numbers.max()).gather(1, chosen)
        weights = taken / taken.sum(dim=1, keepdim=True)
    assert torch.allclose(weights.float(), stock_weights.float(), rtol=1e-4, atol=1e-6)
    return weights, chosen, numbers


class NaiveBlock(nn.Module):
    """A routed block with its experts, expert by expert, role by role. `values` are the trainable tensors by name."""

    def __init__(self, model_type: str, block: nn.Module, path: str, values: Tensors, scaling: float) -> None:
        super().__init__()
        self.model_type, self.block = model_type, block
        self.path, self.values, self.scaling = path, values, scaling
        gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
        gate, up = gate_up[:, : gate_up.shape[1] // 2], gate_up[:, gate_up.shape[1] // 2 :]
        self.routed = [
            {"gate_proj": gate[e], "up_proj": up[e], "down_proj": down[e]} for e in range(block.experts.num_experts)
        ]
        self.always_on_name = ALWAYS_ON.get(model_type)
        if self.always_on_name:
            ffn = getattr(block, self.always_on_name)
            self.always_on = {name: getattr(ffn, name).weight.detach() for name in self.routed[0]}
        self.x: torch.Tensor | None = None  # (B, S, D), input of the last pass
        self.route: tuple[torch.Tensor, torch.Tensor] | None = None  # weights and experts of the last pass
        self.numbers: torch.Tensor | None = None  # (T, E), what chose them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        weights, chosen, self.numbers = routes(self.model_type, self.block, x.reshape(-1, x.shape[-1]))
        self.route = weights, chosen
        logits = x @ self.values[f"gate/{self.path}.gate.weight"].T
        beta = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
        return sum(beta[..., i : i + 1] * self.expert(role, x, weights) for i, role in enumerate(ROLES))

    def expert(self, role: str, x: torch.Tensor, weights: torch.Tensor, *, adapted_only: bool = False) -> torch.Tensor:
        """z_e = sum_k w_k z_{e, expert k} + z_e of the always-on network, (B, S, D).

        With `adapted_only` a part without LoRA experts of this role is left out.
        """
        tokens = x.reshape(-1, x.shape[-1])
        z = torch.zeros_like(tokens)
        routed, always = f"{self.path}.experts", f"{self.path}.{self.always_on_name}"
        if not adapted_only or self.carries(role, routed):
            for index, frozen in enumerate(self.routed):
                token, place = (self.route[1] == index).nonzero(as_tuple=True)
                out = self.swiglu(tokens[token], frozen, role, routed, index)
                z = z.index_add(0, token, weights[token, place, None] * out)
        if self.always_on_name and (not adapted_only or self.carries(role, always)):
            z = z + self.swiglu(tokens, self.always_on, role, always, None)
        return z.view_as(x)

    def carries(self, role: str, part: str) -> bool:
        """Whether a part of the block has LoRA experts."""
        return any(name.startswith(f"{role}/{part}.") for name in self.values)

    def swiglu(self, x: torch.Tensor, frozen: Tensors, role: str, part: str, index: int | None) -> torch.Tensor:
        """(W_down + L_down) (silu((W_gate + L_gate) x) * (W_up + L_up) x); routed expert `index` of stacked tensors."""
        whole = {}
        for name, weight in frozen.items():
            pair = f"{role}/{part}.{name}"
            whole[name] = weight
            if f"{pair}.lora_A" in self.values:
                low, high = self.values[f"{pair}.lora_A"], self.values[f"{pair}.lora_B"]
                low, high = (low, high) if index is None else (low[index], high[index])
                whole[name] = weight + self.scaling * high @ low
        gate = x @ whole["gate_proj"].T
        return (gate * torch.sigmoid(gate) * (x @ whole["up_proj"].T)) @ whole["down_proj"].T

    def pooled(self, mask: torch.Tensor) -> torch.Tensor:
        """Mean of z_s over each row's tokens; the path into the layer, the route weights included, is cut. (B, D)"""
        z = self.expert("shared", self.x.detach(), self.route[0].detach(), adapted_only=True)
        return torch.stack([states[kept.bool()].mean(dim=0) for states, kept in zip(z, mask, strict=True)])


class NaiveNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in fp64; the stock one goes through fp32."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


class MoeOracle(Oracle):
    """A whole model with naive layers. `margin` is the least one of all tokens seen so far."""

    def __init__(self, backbone, start: Tensors, setting: Setting) -> None:
        self.margin = float("inf")
        super().__init__(backbone, start, setting)
        for name, module in list(self.model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                self.model.set_submodule(name, NaiveNorm(module))

    def naive(self, ffn: nn.Module, path: str) -> NaiveFFN | NaiveBlock:
        if hasattr(ffn, "experts"):
            return NaiveBlock(self.model.config.model_type, ffn, path, self.values, self.setting.scaling)
        return super().naive(ffn, path)

    def logits(self, prompts, answers) -> tuple[torch.Tensor, torch.Tensor]:
        """As the dense oracle's; notes the routers' margins, padding left out."""
        logits, mask = super().logits(prompts, answers)
        for layer in self.layers:
            if isinstance(layer, NaiveBlock):
                top_k = layer.route[1].shape[1]
                ordered = layer.numbers.detach()[mask.bool().flatten()].sort(dim=1, descending=True).values
                self.margin = min(self.margin, (ordered[:, top_k - 1] - ordered[:, top_k]).min().item())
        return logits, mask

    def train(self, *arguments, **options) -> Run:
        """As the dense oracle's; no token's route may hang on rounding."""
        run = super().train(*arguments, **options)
        assert self.margin > MARGIN, f"a router's top-k margin is {self.margin:.1e}; take another seed"
        return run

    @torch.no_grad()
    def label_scores(self, prompts, label_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-probability of every label and the end after it, (rows, labels)."""
        columns = []
        for label in label_ids:
            logits, _ = self.logits(prompts, [label] * len(prompts))
            log_p = torch.log_softmax(logits, dim=-1)
            wanted = list(enumerate([*label, self.setting.end]))
            scores = [sum(log_p[row, len(p) - 1 + i, t] for i, t in wanted) for row, p in enumerate(prompts)]
            columns.append(torch.stack(scores))
        return torch.stack(columns, dim=1)

"""The naive single process, in fp64: MoE-CL written out from METHODS section 1.

Without DeepSpeed and without the product's FFN and loop: two whole SwiGLU networks a layer, mixed by the gate; every
row of a global batch in one padded batch; torch's AdamW and clipping. Taken as inputs, since they are drawn: start
values, order of rows, and the negatives' draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM

ROLES = ("shared", "dedicated")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """Numbers of the run: `rates` by component, weight decay for the LoRA experts alone."""

    scaling: float  # alpha / rank
    rates: Mapping[str, float]
    weight_decay: float
    clipping: float
    adversary: float  # weight of the game
    num_steps: int
    end: int  # token that closes an answer


@dataclass
class Run:
    """What the oracle found: one entry a step, tensors by public name."""

    losses: list[float] = field(default_factory=list)
    games: list[float] = field(default_factory=list)  # mean cross-entropy of the discriminators
    norms: list[float] = field(default_factory=list)  # of all gradients, before clipping
    gradient: Tensors = field(default_factory=dict)  # of the first step, before clipping
    final: Tensors = field(default_factory=dict)


class NaiveFFN(nn.Module):
    """One layer's network with its experts, term by term. `values` are the trainable tensors by public name."""

    def __init__(self, ffn: nn.Module, path: str, values: Tensors, scaling: float) -> None:
        super().__init__()
        self.frozen = {name: getattr(ffn, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj")}
        self.path, self.values, self.scaling = path, values, scaling
        self.x: torch.Tensor | None = None  # input of the last pass

    def expert(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """z_e = (W_down + L_down) (silu((W_gate + L_gate) x) * (W_up + L_up) x), token by token."""
        whole = {}
        for name, weight in self.frozen.items():
            pair = f"{role}/{self.path}.{name}"
            whole[name] = weight + self.scaling * self.values[f"{pair}.lora_B"] @ self.values[f"{pair}.lora_A"]
        gate = x @ whole["gate_proj"].T
        return (gate * torch.sigmoid(gate) * (x @ whole["up_proj"].T)) @ whole["down_proj"].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        logits = x @ self.values[f"gate/{self.path}.gate.weight"].T
        weights = torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)
        return sum(weights[..., i : i + 1] * self.expert(role, x) for i, role in enumerate(ROLES))

    def pooled(self, mask: torch.Tensor) -> torch.Tensor:
        """Mean of z_s over each row's tokens; the path into the layer is cut. (B, D)"""
        z = self.expert("shared", self.x.detach())
        return torch.stack([states[kept.bool()].mean(dim=0) for states, kept in zip(z, mask, strict=True)])


class Oracle:
    """A whole model with naive layers. `start` holds every trainable tensor."""

    def __init__(self, backbone, start: Tensors, setting: Setting) -> None:
        self.setting = setting
        self.values = {name: value.double().clone().requires_grad_() for name, value in start.items()}
        self.model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float64).requires_grad_(False)
        self.layers: list[NaiveFFN] = []
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp = self.naive(layer.mlp, f"model.layers.{index}.mlp")
            self.layers.append(layer.mlp)

    def naive(self, ffn: nn.Module, path: str) -> NaiveFFN:
        """What stands in for a layer's stock network."""
        return NaiveFFN(ffn, path, self.values, self.setting.scaling)

    def logits(self, prompts, answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, S, V) of padded rows and their mask; the end of the answer is predicted, never read."""
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return self.model(input_ids=ids, attention_mask=mask).logits, mask

    def answer_loss(self, logits: torch.Tensor, prompts, answers) -> torch.Tensor:
        """Mean of -log p over all answer tokens of the batch, ends included."""
        terms = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for offset, token in enumerate([*answer, self.setting.end]):
                terms.append(-torch.log_softmax(logits[row, len(prompt) - 1 + offset], dim=0)[token])
        return torch.stack(terms).mean()

    def game(self, mask: torch.Tensor, negatives, num_classes: int, *, for_judge: bool) -> torch.Tensor:
        """Mean cross-entropy over layers and sequences, one negative a sequence; gradients reach one side alone."""
        terms = []
        for index, layer in enumerate(self.layers):
            judge = f"discriminator/{layer.path}.discriminator"
            weight, bias = self.values[f"{judge}.weight"], self.values[f"{judge}.bias"]
            pooled = layer.pooled(mask)
            if for_judge:
                pooled = pooled.detach()
            else:
                weight, bias = weight.detach(), bias.detach()
            features = [(feature, 0) for feature in pooled]
            drawn, classes = negatives
            features += [(drawn[index, row].double(), int(cls)) for row, cls in enumerate(classes)]
            for feature, cls in features:
                used = weight[:num_classes] @ feature + bias[:num_classes]
                terms.append(torch.logsumexp(used, dim=0) - used[cls])
        return torch.stack(terms).mean()

    def train(self, batches, negatives=None, num_classes: int = 1, reversal: float = -1.0) -> Run:
        """One step a batch of (prompts, answers); `negatives(step)` gives (features (L, B, D), classes (B,)).

        The discriminator minimises its cross-entropy, the shared expert takes `reversal` times its gradient.
        """
        run, setting = Run(), self.setting
        groups = [
            {
                "params": [value for name, value in self.values.items() if name.startswith(f"{component}/")],
                "lr": rate,
                "base": rate,
                "weight_decay": setting.weight_decay if component in ROLES else 0.0,
            }
            for component, rate in setting.rates.items()
        ]
        optimizer = torch.optim.AdamW(groups)
        for step, (prompts, answers) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * (1 + math.cos(math.pi * step / setting.num_steps)) / 2
            logits, mask = self.logits(prompts, answers)
            loss = total = self.answer_loss(logits, prompts, answers)
            if num_classes > 1:
                judge = self.game(mask, negatives(step), num_classes, for_judge=True)
                expert = self.game(mask, negatives(step), num_classes, for_judge=False)
                total = loss + setting.adversary * (judge + reversal * expert)
                run.games.append(judge.item())
            optimizer.zero_grad(set_to_none=False)
            total.backward()
            if step == 0:
                zero = torch.zeros(())
                run.gradient = {
                    name: (zero.expand(value.shape) if value.grad is None else value.grad).clone()
                    for name, value in self.values.items()
                }
            run.losses.append(loss.item())
            run.norms.append(float(nn.utils.clip_grad_norm_(list(self.values.values()), setting.clipping)))
            optimizer.step()
        run.final = {name: value.detach().clone() for name, value in self.values.items()}
        return run

    @torch.no_grad()
    def prototype(self, prompts, answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, (L, D) each, of the pooled z_s over rows."""
        _, mask = self.logits(prompts, answers)
        pooled = torch.stack([layer.pooled(mask) for layer in self.layers])
        return pooled.mean(dim=1), pooled.var(dim=1, correction=0)

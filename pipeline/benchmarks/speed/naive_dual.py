"""The dual-expert formula of METHODS section 1 as it is written down: the peer of `moe_cl`'s step.

As in the method's public reference: LoRA pairs, gate and classifier are fp32 over a backbone in its own dtype, every
expert runs the frozen down-projection on its own h, and logits are computed for all tokens. The frozen gate and up
projections run once a layer, as the formula says. It gets the same packed sequences as ours.

Legend: B sequences, packed into N rows of S tokens; D model width, R LoRA rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_contracts.errors import UserError
from pipeline.backbones.families import PROJECTIONS, family_of
from pipeline.backbones.fetch import local_backbone
from pipeline.benchmarks.speed.contenders import Batches
from pipeline.config import StreamConfig
from pipeline.data.collate import MicroBatch
from pipeline.experts.discriminator import GradientReversal
from pipeline.placement.distributed import World
from pipeline.training.prefetch import read_batches

CLASSES = 8  # outputs of the classifier, as many as `moe_cl` has
WEIGHT = 0.1  # of the classifier's cross-entropy


class Fp32Pair(nn.Module):
    """A LoRA pair in fp32 beside a frozen linear map of any dtype."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, frozen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """W x + scaling B A x from `frozen` = W x, in the dtype of `frozen`."""
        low = F.linear(F.linear(x.float(), self.lora_A), self.lora_B) * self.scaling
        return frozen + low.to(frozen.dtype)


class NaiveDualFFN(nn.Module):
    """A frozen SwiGLU with two LoRA experts, the first of them shared, a token-wise gate and a task classifier."""

    def __init__(self, ffn: nn.Module, rank: int, scaling: float) -> None:
        super().__init__()
        self.ffn = ffn
        width, device = ffn.gate_proj.in_features, ffn.gate_proj.weight.device
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: Fp32Pair(getattr(ffn, name), rank, scaling) for name in PROJECTIONS}) for _ in range(2)
        )
        self.gate = nn.Linear(width, 2, bias=False, device=device, dtype=torch.float32)
        self.classifier = nn.Linear(width, CLASSES, device=device, dtype=torch.float32)
        self.pool: torch.Tensor | None = None  # (B, N * S), set for one micro-batch
        self.class_logits: torch.Tensor | None = None  # (B, CLASSES) of the last forward pass with `pool`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, S, D) -> (N, S, D)."""
        a, b = self.ffn.gate_proj(x), self.ffn.up_proj(x)
        states = []
        for expert in self.experts:
            h = self.ffn.act_fn(expert["gate_proj"](a, x)) * expert["up_proj"](b, x)
            states.append(expert["down_proj"](self.ffn.down_proj(h), h))
        beta = torch.softmax(self.gate(x.float()), dim=-1)
        if self.pool is not None:
            mean = self.pool @ states[0].flatten(0, 1).float() / self.pool.sum(dim=1, keepdim=True)
            self.class_logits = self.classifier(GradientReversal.apply(mean))
        return (beta[..., :1] * states[0] + beta[..., 1:] * states[1]).to(x.dtype)


def wrap(model: PreTrainedModel, rank: int, scaling: float) -> list[NaiveDualFFN]:
    """Freeze a dense backbone and replace its feed-forward networks. Raises UserError for one with routed experts."""
    family = family_of(model.config)
    model.requires_grad_(False)
    wrapped = []
    for path, layer, ffn in list(family.feed_forwards(model)):
        if family.is_routed(ffn):
            raise UserError(f"the benchmark's naive formula is for dense backbones, and {path} has routed experts")
        wrapped.append(NaiveDualFFN(ffn, rank, scaling))
        setattr(layer, family.ffn, wrapped[-1])
    return wrapped


def naive_loss(model: PreTrainedModel, ffns: list[NaiveDualFFN], batch: MicroBatch, answer_tokens: int) -> torch.Tensor:
    """The micro-batch's share of the loss of its global batch: answers, and the classifiers' game."""
    for ffn in ffns:
        ffn.pool = batch.pool
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    labels = torch.full((batch.num_tokens,), -100, device=logits.device)
    labels[batch.positions] = batch.targets
    loss = F.cross_entropy(logits.float().view(len(labels), -1), labels, reduction="sum") / answer_tokens
    own = torch.zeros(len(batch.places), dtype=torch.long, device=logits.device)
    game = sum(F.cross_entropy(ffn.class_logits, own, reduction="sum") for ffn in ffns)
    return loss + game * (WEIGHT / (len(ffns) * batch.global_rows))


def naive_step(config: StreamConfig, batches: Batches, world: World) -> Callable[[int], None]:
    """One optimizer step of the formula on batch k: the same micro-batches, AdamW, gradient clipping; one rank."""
    lora, settings, rows = config.method["lora"], config.training, batches.rows
    model = AutoModelForCausalLM.from_pretrained(
        local_backbone(config.backbone.path),
        dtype=getattr(torch, config.backbone.dtype),
        attn_implementation="sdpa",
        trust_remote_code=False,
    ).to(world.device)
    ffns = wrap(model, lora["rank"], lora["alpha"] / lora["rank"])
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def step(number: int) -> None:
        chosen = batches(number)
        answer_tokens = int(rows.answer_lengths[chosen].sum())
        for batch in read_batches(world, settings, rows, chosen, number):
            naive_loss(model, ffns, batch.to(world.device), answer_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.gradient_clipping or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step

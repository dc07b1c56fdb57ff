"""The adversarial task discriminator: gradient reversal, one classifier a layer, its loss hung onto the layer's output.

Why the loss is hung onto the output: under ZeRO-3 a module's parameters are present during backward only after the
gradient of its *output* has arrived. `AttachLoss` lets the layer's own loss ride on that output, so that no pooled
tensor has to leave the module. Source: MoE-CL, arXiv 2509.18133; what is done differently and why: METHODS section 1.

Legend: B sequences, N rows of S tokens that the sequences are packed into, D model width, L adapted layers, M
discriminator outputs, K earlier tasks drawn.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn


class GradientReversal(torch.autograd.Function):
    """Identity forward; backward negates the gradient (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class AttachLoss(torch.autograd.Function):
    """Return `output` unchanged; backward also sends gradient 1 to the scalar `loss`, as if it were added to the
    total.
    """

    @staticmethod
    def forward(ctx, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        ctx.loss_device = loss.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)


@dataclass
class Negatives:
    """Pooled features drawn for earlier tasks, one a sequence: `features` (L, B, D), `classes` (B,)."""

    features: torch.Tensor
    classes: torch.Tensor


@dataclass(frozen=True)
class Places:
    """Where each token is pooled."""

    slot: torch.Tensor  # (tokens,) its sequence
    share: torch.Tensor  # (tokens,) 1, or 0 for padding
    lengths: torch.Tensor  # (B, 1) tokens of each sequence

    @classmethod
    def of(cls, pool: torch.Tensor) -> "Places":
        """From a pool, (B, tokens)."""
        return cls(pool.argmax(dim=0), pool.sum(dim=0), pool.sum(dim=1, keepdim=True))


@dataclass
class AdversaryStep:
    """What the layers need to play the game on one micro-batch.

    `scale` turns a sum of cross-entropies over this micro-batch's sequences into this micro-batch's share of the
    total loss: weight / (layers * sequences of the global batch, negatives included), times the world size that
    DeepSpeed divides by.
    """

    pool: torch.Tensor  # (B, tokens): 1 at each token of a sequence, else 0
    row_weight: torch.Tensor  # (B,): 1, or 0 for a spare row
    class_index: int  # the current task's output
    num_classes: int  # outputs in use; the others are masked
    scale: float
    negatives: Negatives | None = None
    cross_entropy: list[torch.Tensor] = field(default_factory=list)  # one detached sum a layer, for the log

    @cached_property
    def places(self) -> Places:
        """The same as `pool` by token, worked out once for all layers."""
        return Places.of(self.pool)


class Discriminator(nn.Linear):
    """Task classifier of one layer on the pooled output of the shared expert: (B, D) -> (B, M) logits.

    M is fixed (the current task and at most M - 1 earlier ones), so its cost does not grow with the number of tasks.
    """

    def loss(self, pooled: torch.Tensor, step: AdversaryStep, layer: int) -> torch.Tensor:
        """Sum of cross-entropies over the micro-batch; the gradient into `pooled` is reversed. Scalar, at least
        fp32.
        """
        current = torch.full((pooled.shape[0],), step.class_index, device=pooled.device)
        total = (self._cross_entropy(GradientReversal.apply(pooled), current, step) * step.row_weight).sum()
        if step.negatives is not None:
            drawn = step.negatives.features[layer].to(pooled.dtype)
            total = total + (self._cross_entropy(drawn, step.negatives.classes, step) * step.row_weight).sum()
        return total

    def _cross_entropy(self, features: torch.Tensor, classes: torch.Tensor, step: AdversaryStep) -> torch.Tensor:
        wide = torch.promote_types(features.dtype, torch.float32)
        logits = F.linear(features.to(wide), self.weight.to(wide), self.bias.to(wide))
        logits[:, step.num_classes :] = float("-inf")
        return F.cross_entropy(logits, classes, reduction="none")

"""Activation checkpointing: a decoder layer keeps its input alone and is computed again when its gradients are.

What a layer reads beside its input must be the same the second time: dropout masks (the generator's state is put back),
and the adversary's side of the game, which the method takes away from the layers before backward begins. What a pass
leaves behind, its cross-entropy for the log, must not be left twice.

A layer's backward runs within the one backward pass of the engine (`use_reentrant=False`), so that gradients come in
the order, and once, as DeepSpeed counts them. Under ZeRO-3 a frozen weight that is fetched to compute a layer again
stays until the module in whose backward that happens is done. It must be the whole layer: `_Again` begins with it
before any module of the layer asks for what it saved, and so each weight is gathered once for both. A layer is computed
to its end (no early stop), so that all its modules end their second pass.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pipeline.backbones.families import Family
from pipeline.experts.discriminator import AdversaryStep
from pipeline.experts.dual_ffn import ExpertFFN
from pipeline.experts.linear import ExpertLinear


def checkpoint_activations(model: nn.Module, family: Family) -> None:
    """Have every decoder layer from the first with LoRA experts on computed again in backward; in training alone.

    Below that layer nothing is kept for backward, so nothing is gained there.
    """
    adapted = False
    for _, layer, ffn in family.feed_forwards(model):
        adapted = adapted or any(isinstance(m, (ExpertFFN, ExpertLinear)) and len(m.experts) for m in layer.modules())
        if adapted:  # attributes of transformers' GradientCheckpointingLayer
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(_recomputed, ffn)
            # before DeepSpeed's hooks, hence inside them: its own for the layer's backward has run by then
            layer.register_forward_hook(lambda _module, _inputs, output: _Again.apply(output))


class _Again(torch.autograd.Function):
    """Identity; its backward asks for something saved, which has the layer computed again."""

    @staticmethod
    def forward(ctx, output: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        assert len(ctx.saved_tensors) == 1
        return grad


def _recomputed(ffn: nn.Module, run: Callable[..., Any], *inputs: Any) -> Any:
    """`run(*inputs)`, one decoder layer with the network `ffn`, whose activations are computed again in backward."""
    step = ffn.adversary if isinstance(ffn, ExpertFFN) else None
    again = nullcontext if step is None else functools.partial(_playing, ffn, replace(step, cross_entropy=[]))

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), again()

    if not torch.is_grad_enabled():
        return run(*inputs)
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


@contextmanager
def _playing(ffn: ExpertFFN, step: AdversaryStep) -> Iterator[None]:
    """The network plays this step's game inside the context, and whatever it played before afterwards."""
    before, ffn.adversary = ffn.adversary, step
    try:
        yield
    finally:
        ffn.adversary = before

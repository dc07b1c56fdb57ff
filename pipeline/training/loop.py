"""The training loop of one increment: global batches, micro-batches, loss, engine steps, in-flight state, stop on
request.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pipeline.config import StreamConfig
from pipeline.data.batching import global_batch, micro_batches, num_steps, row_order
from pipeline.data.collate import MicroBatch, collate
from pipeline.data.tokens import RowView
from pipeline.files import sha256_text
from pipeline.methods.protocol import Method
from pipeline.placement.learner import Learner
from pipeline.placement.state import TrainableState, gather_state, gather_values, restore_state
from pipeline.training.checks import check_gradients
from pipeline.training.inflight import load_inflight, save_inflight
from pipeline.training.progress import Progress
from pipeline.training.schedule import rate
from pipeline.training.stop import StopFlag, StoppedOnRequest


@dataclass(frozen=True)
class StepLog:
    """One optimizer step as the log and the tracker see it; losses are means over the global batch."""

    step: int  # from 1
    loss: float  # per answer token
    terms: dict[str, float]  # what the method added, per sequence
    learning_rate: float  # of training.learning_rate; components scale with it
    grad_norm: float
    tokens: int  # over all ranks, padding left out
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What training leaves: full fp32 tensors by public name, and the account of rows."""

    values: dict[str, torch.Tensor]
    steps: int
    rows_consumed: int
    continuations: int


def train_rows(
    learner: Learner,
    method: Method,
    config: StreamConfig,
    rows: RowView,
    start: dict[str, torch.Tensor],
    *,
    seed: int,
    inflight: Path,
    key: str,
    title: str,
    stop: StopFlag,
    on_step: Callable[[StepLog], None] = lambda log: None,
) -> TrainResult:
    """Train the active components on `rows` from the start values, or from the in-flight state of the same `key`.

    Raises StoppedOnRequest on all ranks, with the state saved, when any rank was asked to stop.
    """
    world, settings = learner.world, config.training
    total = num_steps(len(rows), settings.epochs, settings.batch_size)
    order = row_order(len(rows), settings.epochs, seed)
    saved = load_inflight(inflight, key) if world.is_main else None
    step, optimizer_steps, continuations = world.broadcast(
        (saved.step, saved.state.optimizer_steps, saved.continuations + 1) if saved else (0, 0, 0)
    )
    restore_state(learner.engine, learner.parameters, _shared_state(learner, saved, start, optimizer_steps))
    learner.model.train()
    progress = Progress(title, total, start=step, show=world.is_main)

    def save(done: int) -> None:
        state = gather_state(learner.parameters, done)
        if world.is_main:
            save_inflight(inflight, key, done, state, continuations)

    while step < total:
        begin = time.monotonic()
        chosen = global_batch(order, step, settings.batch_size)
        factor = rate(step, total, settings.warmup_fraction)
        for group in learner.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        sums = run_global_batch(learner, method, config, rows, chosen, step, seed)
        learner.engine.step()
        step += 1
        nll, answer_tokens, asked, *terms = world.sum([*sums.totals, float(stop.requested), *sums.terms.values()])
        loss = nll / answer_tokens
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{title}: the loss is {loss} at step {step} (rows {chosen.tolist()}); nothing was published; "
                "lower training.learning_rate or turn on training.gradient_clipping"
            )
        named = {name: value / len(chosen) for name, value in zip(sums.terms, terms, strict=True)}
        tokens = int(rows.lengths[chosen].sum())
        norm = float(learner.engine.get_global_grad_norm() or 0.0)
        on_step(StepLog(step, loss, named, settings.learning_rate * factor, norm, tokens, time.monotonic() - begin))
        progress.update(step, tokens, {"loss": loss, **named, "lr": settings.learning_rate * factor})
        if asked:
            save(step)
            world.barrier()
            raise StoppedOnRequest(f"{title}: stopped at step {step} of {total}; the same command continues")
        if step % settings.save_every == 0 or step == total:
            save(step)
    values = gather_values(learner.parameters)
    return TrainResult(values, total, len(order), continuations)


@dataclass
class BatchSums:
    """Sums over one rank's share of a global batch."""

    totals: tuple[float, float]  # negative log-likelihood, answer tokens
    terms: dict[str, float]


def run_global_batch(
    learner: Learner, method: Method, config: StreamConfig, rows: RowView, chosen, step: int, seed: int
) -> BatchSums:
    """Forward and backward over one global batch; the caller steps the engine.

    The loss of every micro-batch is divided by the global batch's answer tokens and multiplied by the world size, which
    DeepSpeed's gradient average divides by again: world size and accumulation change nothing.
    """
    world, settings = learner.world, config.training
    passes = micro_batches(
        rows.lengths[chosen].tolist(), world.rank, world.size, settings.micro_batch_size, settings.micro_batch_tokens
    )
    answer_tokens = int(rows.answer_lengths[chosen].sum())
    # dropout masks come from (seed, step, rank): a continued run draws what an unbroken one draws
    torch.manual_seed(int(sha256_text(f"dropout/{seed}/{step}/{world.rank}")[:15], 16))
    nll_sum, own_tokens = 0.0, 0.0
    terms: dict[str, float] = {}
    for index, part in enumerate(passes):
        prompts, answers = rows.tokens(chosen[list(part.places)])
        batch = collate(
            prompts,
            answers,
            rows.end_of_answer,
            places=part.places,
            weight=part.weight,
            step=step,
            global_rows=len(chosen),
            world_size=world.size,
            device=world.device,
        )
        learner.engine.set_gradient_accumulation_boundary(index == len(passes) - 1)
        nll, added = forward(learner, method, batch)
        learner.engine.backward(nll * (world.size / answer_tokens))
        nll_sum += nll.item()
        own_tokens += batch.target_weight.sum().item()
        for name, value in added.items():
            terms[name] = terms.get(name, 0.0) + value
    if step == 0:
        check_gradients(learner)
    return BatchSums((nll_sum, own_tokens), terms)


def forward(learner: Learner, method: Method, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """Summed negative log-likelihood of the micro-batch's answer tokens (a scalar), and what the method added."""
    method.before_forward(learner.ffns, batch)
    logits = learner.engine(batch.input_ids, None, batch.positions, batch.position_ids)
    added = method.after_forward(learner.ffns)
    losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.target_weight).sum(), added


def _shared_state(learner: Learner, saved, start: dict[str, torch.Tensor], optimizer_steps: int) -> TrainableState:
    """Rank 0's in-flight state on every rank, or the fresh start values with zero moments."""
    world = learner.world
    if optimizer_steps == 0:
        return TrainableState(start, {}, 0)
    values = world.broadcast_tensors(saved.state.values if saved else None)
    names = ("exp_avg", "exp_avg_sq")
    moments = {name: world.broadcast_tensors(saved.state.moments[name] if saved else None) for name in names}
    return TrainableState(values, moments, optimizer_steps)

"""The training loop of one increment: global batches, micro-batches, loss, engine steps, in-flight state, stop on
request.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.config import StreamConfig, TrainingConfig
from pipeline.data.collate import MicroBatch
from pipeline.data.mixing import JoinedRows, plain_batches
from pipeline.data.tokens import RowView
from pipeline.files import seed_of
from pipeline.methods.protocol import Method
from pipeline.placement.learner import Learner
from pipeline.placement.state import Source, restore_state, state_shapes, stream_state
from pipeline.spans.record import begin_step, each, end_step, span
from pipeline.training.checks import check_gradients
from pipeline.training.failure import TrainingFailed, failure, went_wrong
from pipeline.training.inflight import Progressed, load_inflight, open_inflight, save_inflight
from pipeline.training.penalty import add_penalties
from pipeline.training.prefetch import one_ahead, read_batches
from pipeline.training.progress import Progress
from pipeline.training.schedule import rate, routed_ratio
from pipeline.training.stop import StopFlag, StoppedOnRequest
from pipeline.watch.rank import report


@dataclass(frozen=True)
class StepLog:
    """One optimizer step as the log and the tracker see it; losses are means over the global batch."""

    step: int  # from 1
    loss: float  # per answer token
    terms: dict[str, float]  # what the method added: per sequence, and its `penalty`
    learning_rate: float  # of training.learning_rate; components scale with it
    grad_norm: float
    tokens: int  # over all ranks, padding left out
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """The account of training; what was learned stands in the engine."""

    steps: int
    rows_consumed: int  # counted step by step, over all launches
    continuations: int


def train_rows(
    learner: Learner,
    method: Method,
    config: StreamConfig,
    rows: RowView | JoinedRows,
    start: Source,
    *,
    seed: int,
    inflight: Path,
    key: str,
    title: str,
    stop: StopFlag,
    on_step: Callable[[StepLog], None] = lambda log: None,
    batches: Sequence[np.ndarray] | None = None,
    read_here: Callable[[Path], Path] = lambda path: path,
) -> TrainResult:
    """Train the active components on `rows` from the start values, or from the in-flight state of the same `key`.

    `batches` are the row numbers of every global batch (default: `plain_batches`); `read_here` says where this rank
    reads a file that rank 0 wrote. Raises on all ranks:
    StoppedOnRequest, with the state saved, when any rank was asked to stop; TrainingFailed where loss or gradient are
    no numbers or the loss explodes, the state on disk being one from before that step.
    """
    world, settings = learner.world, config.training
    batches = batches or plain_batches(len(rows), settings.epochs, settings.batch_size, seed)
    total = len(batches)
    saved = world.on_main(lambda: load_inflight(inflight, key))
    step, continuations, consumed = (saved.step, saved.continuations + 1, saved.rows) if saved else (0, 0, 0)
    kept = step  # of the state on disk
    vocab_size = learner.model.backbone.config.vocab_size
    values, moments = open_inflight(inflight, read_here) if saved else (start, {})
    restore_state(learner.engine, learner.parameters, values, moments, step)
    penalties = method.penalties(learner, start)
    world.barrier()  # nobody replaces the file while another rank reads it
    learner.model.train()
    progress = Progress(title, total, start=step, show=world.is_main)
    batch_tokens = float(rows.lengths.mean()) * settings.batch_size
    routed = routed_rate(learner, settings, batch_tokens)

    def save(done: int) -> None:
        report(f"{title}: saving the state after step {done} of {total}")
        tensors = stream_state(learner.parameters)
        so_far = Progressed(key, done, continuations, consumed)
        with span("save", part=True):
            world.on_main(lambda: save_inflight(inflight, so_far, state_shapes(learner.parameters), tensors), tensors)

    coming = (
        batch for number in range(step, total) for batch in read_batches(world, settings, rows, batches[number], number)
    )
    with closing(one_ahead(coming)) as ready:
        while step < total:
            report(f"{title}: step {step + 1} of {total}")
            begin = time.monotonic()
            begin_step(step + 1)
            chosen = batches[step]
            factor = rate(step, total, settings.warmup_fraction)
            for group in learner.engine.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor * (routed if group["routed"] else 1.0)
            sums = run_global_batch(learner, method, config, rows, chosen, step, seed, ready)
            with span("optimizer"):
                penalty = add_penalties(learner, penalties)
                learner.engine.step()
            step += 1
            consumed += len(chosen)
            norm = float(learner.engine.get_global_grad_norm() or 0.0)
            lost = not math.isfinite(norm) or norm < 0  # DeepSpeed says -1 for a norm that is no number
            with span("wait"):  # for the slowest rank, all else being done
                nll, answer_tokens, asked, lost, *terms = world.sum(
                    [*sums.totals, float(stop.requested), float(lost), *sums.terms.values()]
                )
            end_step()
            loss = nll / answer_tokens
            # before the state is saved: the one on disk is from before this step
            if problem := went_wrong(loss, bool(lost), settings.max_loss_factor, vocab_size):
                raise TrainingFailed(failure(f"{title}: {problem}", step, total, kept, rows.row_ids(chosen)))
            named = {name: value / len(chosen) for name, value in zip(sums.terms, terms, strict=True)} | penalty
            tokens = int(rows.lengths[chosen].sum())
            on_step(StepLog(step, loss, named, settings.learning_rate * factor, norm, tokens, time.monotonic() - begin))
            progress.update(step, tokens, {"loss": loss, **named, "lr": settings.learning_rate * factor})
            if asked:
                save(step)
                world.barrier()
                raise StoppedOnRequest(f"{title}: stopped at step {step} of {total}; the same command continues")
            if step % settings.save_every == 0 or step == total:
                save(step)
                kept = step
    return TrainResult(total, consumed, continuations)


@dataclass
class BatchSums:
    """Sums over one rank's share of a global batch."""

    totals: tuple[float, float]  # negative log-likelihood, answer tokens
    terms: dict[str, float]


def run_global_batch(
    learner: Learner,
    method: Method,
    config: StreamConfig,
    rows: RowView | JoinedRows,
    chosen: np.ndarray,
    step: int,
    seed: int,
    ready: Iterator[MicroBatch] | None = None,
) -> BatchSums:
    """Forward and backward over one global batch; the caller steps the engine.

    `ready` gives the batch's `read_batches` and is asked for no more than these; without it they are read here.

    The loss of every micro-batch is divided by the global batch's answer tokens and multiplied by the world size, which
    DeepSpeed's gradient average divides by again: world size and accumulation change nothing.
    """
    world, settings = learner.world, config.training
    ready = ready or read_batches(world, settings, rows, chosen, step)
    answer_tokens = int(rows.answer_lengths[chosen].sum())
    # dropout masks come from (seed, step, rank): a continued run draws what an unbroken one draws
    torch.manual_seed(seed_of(f"dropout/{seed}/{step}/{world.rank}"))
    nll_sum, own_tokens = 0.0, 0.0
    terms: dict[str, float] = {}
    for read in each("data", ready):
        report()
        batch = read.to(world.device)
        learner.engine.set_gradient_accumulation_boundary(batch.last)
        with span("forward"):
            nll, added = forward(learner, method, batch)
        with span("backward"):
            learner.engine.backward(nll * (world.size / answer_tokens))
            nll_sum += nll.item()  # a device that works beside the host is through with both passes here
        own_tokens += batch.target_weight.sum().item()
        for name, value in added.items():
            terms[name] = terms.get(name, 0.0) + value
        if batch.last:
            break
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


def routed_rate(learner: Learner, settings: TrainingConfig, batch_tokens: float) -> float:
    """What the learning rate of LoRA experts on routed experts is multiplied by; 1 where the stream asks for none."""
    scaling = settings.routed_learning_rate
    block = next((ffn for ffn in [*learner.experts.ffns, *learner.experts.bare] if ffn.routed), None)
    if scaling is None or block is None:
        return 1.0
    return routed_ratio(block.top_k / block.num_experts, batch_tokens, scaling.noise_batch_tokens)

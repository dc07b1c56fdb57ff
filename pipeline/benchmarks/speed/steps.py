"""Case `step`: a step of `moe_cl` against plain LoRA and the naive formula, and its share of the machine's GEMM rate.

All contenders take the same batch in a round, one after another.
"""

import gc
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.benchmarks.speed.contenders import Batches, build_job, held_bytes, loop_step
from pipeline.benchmarks.speed.flops import gemm_flops, gemm_sweep, step_flops
from pipeline.benchmarks.speed.naive_dual import naive_step
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.samples import compare, interleave, rates
from pipeline.data.tokens import PreparedTask
from pipeline.placement.architecture import load_architecture
from pipeline.placement.distributed import World
from pipeline.placement.trainable import MethodChoice, trainable_of

OURS = ("moe_cl", "sequential")
NAIVE, GEMM = "naive_dual", "gemm"


def measure_steps(
    options: SpeedOptions, prepared: PreparedTask, world: World, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> dict[str, Any]:
    """Seconds of an optimizer step by contender, with ratios, tokens/s, rows/s, bytes held, GEMM rate and share."""
    batches = Batches(prepared.rows("train", None, options.seed), options.batch_size, options.seed)
    jobs = {name: build_job(options, name, folder / name, world, tokenizer, train=True) for name in OURS}
    contenders = {name: loop_step(job, batches) for name, job in jobs.items()}
    contenders[NAIVE] = naive_step(jobs[OURS[0]].config, batches, world)
    architecture = load_architecture(options.backbone)
    counted = [batches(number) for number in range(options.warmup, options.warmup + options.repeats)]
    tokens = [int(batches.rows.lengths[chosen].sum()) for chosen in counted]
    width = min(round(statistics.mean(tokens)), jobs[OURS[0]].config.training.micro_batch_tokens)
    dtype = getattr(torch, options.dtype)
    contenders[GEMM] = gemm_sweep(architecture, width, dtype, world.device)
    seconds = interleave(contenders, options.repeats, options.warmup)
    report = compare(seconds, [("moe_cl", "sequential"), (NAIVE, "moe_cl"), (NAIVE, "sequential")])
    gemm = rates([gemm_flops(architecture, width)] * options.repeats, seconds[GEMM])
    figures: dict[str, Any] = {GEMM: {"flop_per_second": gemm, "tokens": width}}
    for name in (*OURS, NAIVE):
        figures[name] = {
            "tokens_per_second": rates(tokens, seconds[name]),
            "rows_per_second": rates([len(chosen) for chosen in counted], seconds[name]),
        }
    for name, job in jobs.items():
        work = []
        trainable = trainable_of(architecture, MethodChoice(name, options.rank))
        for chosen in counted:  # the last token of a row predicts nothing and is not read
            lengths = (batches.rows.lengths[chosen] - 1).tolist()
            work.append(step_flops(architecture, trainable, lengths, int(batches.rows.answer_lengths[chosen].sum())))
        rate = rates([flops.total for flops in work], seconds[name])
        pairs = zip(rate["samples"], gemm["samples"], strict=True)
        figures[name] |= {
            "flop_per_second": rate,
            "share_of_gemm_rate": statistics.median(own / machine for own, machine in pairs),
            "bytes_per_rank": held_bytes(job.learner),
        }
        job.learner.engine.destroy()
    report["figures"] = figures
    report["batch_tokens"] = tokens
    contenders.clear()
    jobs.clear()
    gc.collect()
    return report

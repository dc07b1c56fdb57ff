"""One training run of one contender, started by `trainer.py`: `python -m ... SPEC`; writes note.json beside SPEC.

The clock starts when the last warm-up step ends and stops when the last step ends, in both kinds of trainer.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.backbones.load import load_tokenizer
from pipeline.benchmarks.machine import peak_bytes
from pipeline.benchmarks.speed.contenders import Spec, train_by_loop
from pipeline.config import BackboneConfig
from pipeline.data.batching import row_order
from pipeline.data.tokens import RowView
from pipeline.placement.distributed import start_world
from pipeline.training.loop import StepLog

PEER = "peft_trainer"


class Clock:
    """When each step ended, and what is read beside it."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.mean_loss = float("nan")  # over all steps, warm-up included
        self.bytes_before_training = 0

    def start(self) -> None:
        """Training begins."""
        self.bytes_before_training = peak_bytes()

    def tick(self) -> None:
        """A step ended."""
        self.marks.append(time.perf_counter())


def main(spec_file: str) -> None:
    """Train as the spec says and leave a note."""
    spec = Spec.read(spec_file)
    options = spec.options
    wanted = (options.warmup + options.steps) * options.batch_size
    rows = spec.prepared.rows("train", wanted, options.seed)
    order = row_order(len(rows), 1, options.seed)
    clock = Clock()
    if spec.given["contender"] == PEER:
        train_peer(spec, rows, clock)
    else:
        train_ours(spec, rows, clock)
    counted = order[options.warmup * options.batch_size :]
    note = {
        "seconds": clock.marks[-1] - clock.marks[options.warmup - 1],
        "steps": len(clock.marks) - options.warmup,
        "rows": len(counted),
        "tokens": int(rows.lengths[counted].sum()),
        "peak_bytes": peak_bytes(),
        "bytes_before_training": clock.bytes_before_training,
        "mean_loss": clock.mean_loss,
    }
    Path(spec_file).with_name("note.json").write_text(json.dumps(note), encoding="utf-8")


def train_ours(spec: Spec, rows: RowView, clock: Clock) -> None:
    """The product's own loop on one rank."""
    losses: list[float] = []

    def on_step(log: StepLog) -> None:
        clock.tick()
        losses.append(log.loss)

    train_by_loop(spec, spec.given["contender"], rows, start_world(), on_start=clock.start, on_step=on_step)
    clock.mean_loss = statistics.fmean(losses)


def train_peer(spec: Spec, rows: RowView, clock: Clock) -> None:
    """PEFT and Hugging Face's Trainer with its usual settings; what differs from them is named here.

    The rows come in our order (`sequential`), nothing is saved or logged, and the adapter has the backbone's dtype.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from pipeline.backbones.families import PROJECTIONS

    options = spec.options
    tokenizer = load_tokenizer(BackboneConfig(path=options.backbone, dtype=options.dtype))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = getattr(torch, options.dtype)
    backbone = AutoModelForCausalLM.from_pretrained(options.backbone, dtype=dtype, trust_remote_code=False)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0.0,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(backbone, lora, autocast_adapter_dtype=False)

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    arguments = TrainingArguments(
        output_dir=str(spec.work_dir / "trainer"),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        learning_rate=2e-4,
        seed=options.seed,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(peer_rows(rows, row_order(len(rows), 1, options.seed))),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=[Ticks()],
    )
    clock.mean_loss = trainer.train().training_loss


def peer_rows(rows: RowView, order) -> list[dict[str, list[int]]]:
    """Prompt, answer and end of answer of each row; labels at the answer and its end alone."""
    prompts, answers = rows.tokens(order)
    return [
        {
            "input_ids": [*prompt, *answer, rows.end_of_answer],
            "attention_mask": [1] * (len(prompt) + len(answer) + 1),
            "labels": [-100] * len(prompt) + [*answer, rows.end_of_answer],
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


if __name__ == "__main__":
    main(sys.argv[1])

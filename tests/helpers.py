"""Small real things for tests: a tokenizer, tiny backbones, learnable tasks, a stream, a learner without an engine.

Nothing here needs the network, the demo's assets or a launcher.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.backbones.answer_model import AnswerModel
from pipeline.backbones.families import family_of
from pipeline.data.collate import MicroBatch, collate
from pipeline.experts.attach import ExpertPlan, attach_experts, components_of
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner

END, PAD = "<|end|>", "<|pad|>"
LABELS = {"negative": " bad", "neutral": " so and so", "positive": " so good"}
_CUES = ("broken", "plain", "lovely", "late", "odd", "cheap")  # the word of each label, in the labels' order
_FILLERS = ("parcel", "hotel", "engine", "garden", "ticket", "camera", "printer", "jacket", "teapot", "window")
# without the labels' words, which are therefore several tokens each, of different numbers
_SENTENCES = [
    f"Note {n}: the {filler} and the {filler} we got was {cue} again.\nAnswer:"
    for n, filler in enumerate(_FILLERS * 10)
    for cue in _CUES
]
ROWS = {"train": 48, "validation": 20, "test": 20}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 330 tokens, with an end and a pad token; equal on every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def tiny_llama(vocab_size: int, *, num_layers: int = 3, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of awkward sizes, fp32, eval mode; weights large enough that predictions differ."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 92,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "bos_token_id": None,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def save_backbone(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny Llama (safetensors, fp32) and its tokenizer as a backbone folder."""
    tokenizer = build_tokenizer()
    tiny_llama(len(tokenizer), seed=seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_task(
    folder: Path,
    name: str,
    *,
    rows: Mapping[str, int] | None = None,
    labels: Mapping[str, str] | None = None,
    kind: str = "classification",
    seed: int = 0,
    version: str = "1.0.0",
    turn: int = 0,
    **changes: Any,
) -> Path:
    """Write <folder>/<name>/{train,validation,test}.parquet and the contract <folder>/<name>.yaml; returns the latter.

    The data root is `folder`. A classification row's label shows in one cue word (`turn` shifts which word means which
    label, so that tasks can contradict each other); a generation row is answered by the first thing it names.
    `changes` replace contract fields. The tiny Llama with rank-8 experts gets 9 of 10 test rows right after 8 epochs of
    96 rows in batches of 8 at learning rate 1e-2 (a third is chance).
    """
    labels = dict(labels or LABELS)
    draw = random.Random(f"{name}/{seed}")
    number = 0
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in (rows or ROWS).items():
        records = []
        for index in range(count):
            number += 1
            cue = index % len(labels)
            things = draw.sample(_FILLERS, draw.randint(1, 4))  # rows of uneven length
            text = f"Note {number}: the {' and '.join(things)} we got was {_CUES[cue]} again."
            answer = list(labels)[(cue + turn) % len(labels)] if kind == "classification" else things[0]
            records.append({"id": f"{split}-{number}", "text": text, "label": answer})
        draw.shuffle(records)
        pq.write_table(pa.Table.from_pylist(records), folder / name / f"{split}.parquet")
    contract = {
        "task": name,
        "version": version,
        "owner": "tests@example.com",
        "description": "Made by the test suite",
        "kind": kind,
        "language": "en",
        "source": {"format": "parquet", **{split: [f"{name}/{split}.parquet"] for split in rows or ROWS}},
        "columns": {"id": "id", "text": "text", "answer": "label"},
        "prompt": "{text}\nAnswer:",
        "labels": labels if kind == "classification" else None,
        "metric": "accuracy" if kind == "classification" else "exact_match",
        "limits": {"max_tokens": 128, "max_answer_tokens": 8, "min_rows": dict.fromkeys(ROWS, 1)},
        "licence": "own",
        "sensitivity": "public",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(contract | changes, sort_keys=False), encoding="utf-8")
    return path


def stream_dict(work_dir: Path, backbone: Path, root: Path, tasks: Sequence[Path], **sections: Any) -> dict[str, Any]:
    """A stream for tiny runs in fp32; `sections` are merged into it, section by section."""
    stream: dict[str, Any] = {
        "stream": "tiny",
        "work_dir": str(work_dir),
        "data_roots": [str(root)],
        "backbone": {"path": str(backbone), "dtype": "float32"},
        "tasks": [str(task) for task in tasks],
        "method": {"name": "moe_cl", "lora": {"rank": 3, "alpha": 6, "dropout": 0.0}},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
        "gate": {"max_regression": None},
        "deepspeed": str(Path(__file__).resolve().parents[1] / "deepspeed_configs" / "zero3.json"),
    }
    for name, value in sections.items():
        old = stream.get(name)
        stream[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return stream


def make_stream(path: Path, work_dir: Path, backbone: Path, root: Path, tasks: Sequence[Path], **sections: Any) -> Path:
    """Write `stream_dict` as a YAML file; returns its path."""
    path.write_text(yaml.safe_dump(stream_dict(work_dir, backbone, root, tasks, **sections)), encoding="utf-8")
    return path


def light_learner(model: PreTrainedModel, plan: ExpertPlan | None = None) -> Learner:
    """A learner of one process without DeepSpeed's engine, on the CPU; experts are attached to `model` itself."""
    experts = attach_experts(model, family_of(model.config), plan)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return Learner(world, AnswerModel(model), experts, components_of(experts), None)


@torch.no_grad()
def randomise(learner: Learner, seed: int = 0, scale: float = 0.1) -> None:
    """Draw every expert, gate and discriminator value, so that none of them is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


def micro_batch(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end: int = 0,
    **changes: Any,
) -> MicroBatch:
    """`collate` with the places of a whole global batch of one rank, unless changed."""
    settings = {
        "places": tuple(range(len(prompts))),
        "weight": 1.0,
        "step": 0,
        "global_rows": len(prompts),
        "world_size": 1,
        "device": torch.device("cpu"),
    }
    return collate(prompts, answers, end, **(settings | changes))


def ragged(lengths: Sequence[int], vocab_size: int, seed: int = 0, lowest: int = 2) -> list[list[int]]:
    """Token id sequences of the given lengths; ids below `lowest` (end and pad) do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(lowest, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def recorded_inputs(learner: Learner) -> Iterator[list[torch.Tensor]]:
    """The input of every expert FFN, first layer first, as forward passes reach them inside the context."""
    inputs: list[torch.Tensor] = []
    hooks = [ffn.register_forward_hook(lambda _, args, out: inputs.append(args[0].detach())) for ffn in learner.ffns]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of the gradients of all that asks for one; zero where none came."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters.items()
        if parameter.requires_grad
    }


def largest_difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """max |a - b| over all tensors of two mappings with the same names."""
    assert first.keys() == second.keys() and first, (sorted(first), sorted(second))
    return max(float((first[name] - second[name]).abs().max()) for name in first)

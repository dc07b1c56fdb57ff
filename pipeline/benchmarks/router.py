"""`jobs/benchmark.py router`: how often the task router finds a text's task, as one task after another arrives.

Depth and regularisation are chosen on validation texts, after the last task; test texts are then routed once. Beside
it stands TF-IDF with logistic regression, which sees the training texts of all tasks at once.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from data_contracts.errors import UserError
from pipeline.backbones.load import load_config, load_tokenizer
from pipeline.benchmarks.speed.machine import describe_machine, describe_software
from pipeline.benchmarks.tfidf import tfidf_predictions
from pipeline.config import BackboneConfig, RouterConfig, StreamConfig
from pipeline.data.batching import select_rows
from pipeline.data.tokens import SPLITS
from pipeline.evaluation.task_router import TaskRouter
from pipeline.evaluation.text_states import check_router, pooled_texts, text_tokens
from pipeline.files import write_atomic
from pipeline.placement.distributed import start_world
from pipeline.placement.learner import Learner, build_learner

_ZERO2 = Path(__file__).resolve().parents[2] / "deepspeed_configs" / "zero2.json"
Texts = Mapping[str, list[str]]  # by split
Pooled = Mapping[str, Mapping[str, torch.Tensor]]  # task -> split -> (rows, D)


@dataclass(frozen=True)
class Choice:
    """A setting and its accuracy on validation texts, all tasks counting alike."""

    layers: int
    regularisation: float
    validation: float


def run_router(given: argparse.Namespace) -> dict[str, Any]:
    """Measure; writes and returns the report. Raises UserError for data or settings that cannot be used."""
    if len(set(given.tasks)) < 2:
        raise UserError("--tasks: name at least two tasks; a router has nothing to choose between otherwise")
    backbone = BackboneConfig(path=given.backbone, dtype=given.dtype)
    settings = [
        RouterConfig(layers=layers, regularisation=x, features=given.features, max_tokens=given.max_tokens)
        for layers in given.layers
        for x in given.regularisation
    ]
    for config in settings:
        check_router(config, load_config(backbone))
    texts = {task: read_texts(given, task) for task in given.tasks}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    learner, budget = build(backbone)
    tokens = tokenise(given, backbone, texts)
    pooled = pool(learner, given.layers, tokens, budget)
    choices, routers = [], []
    for config in settings:
        router = learn(config, pooled[config.layers])[-1]
        right = routed(router, pooled[config.layers], "validation")
        choices.append(Choice(config.layers, config.regularisation, float(np.mean([right[t][t] for t in right]))))
        routers.append(config)
    best = max(range(len(choices)), key=lambda index: choices[index].validation)
    stages = learn(routers[best], pooled[routers[best].layers])
    report = {
        "format": 1,
        "started": started,
        "machine": describe_machine(),
        "software": describe_software(),
        "backbone": Path(given.backbone).resolve().name,
        "settings": {**routers[best].model_dump(mode="json", exclude={"rows"}), "dtype": given.dtype},
        "rows": {split: {task: len(texts[task][split]) for task in texts} for split in SPLITS},
        "row_seed": given.seed,
        "chosen_on_validation_from": [vars(choice) for choice in choices],
        "after_each_task": [after_task(router, pooled[routers[best].layers]) for router in stages],
        "recursive_against_batch": against_batch(stages[-1], pooled[routers[best].layers]),
        "kept_bytes": sum(8 * tensor.numel() for tensor in stages[-1].tensors().values()),
        "tfidf_all_tasks_at_once": tfidf(texts),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_atomic(given.out, (json.dumps(report, indent=1) + "\n").encode())
    return report


def read_texts(given: argparse.Namespace, task: str) -> Texts:
    """At most so many texts of each split, drawn by seed."""
    texts = {}
    for split in SPLITS:
        file = Path(given.data) / task / f"{split}.parquet"
        try:
            column = pq.read_table(file, columns=["text"])["text"].to_pylist()
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{file} has no readable column 'text' ({str(error).splitlines()[0]})") from error
        column = [text for text in column if text and text.strip()]
        rows = select_rows(len(column), getattr(given, f"{split}_rows"), given.seed, f"{task}/{split}")
        texts[split] = [column[row] for row in rows]
        if not texts[split]:
            raise UserError(f"{file} holds no text")
    return texts


def build(backbone: BackboneConfig) -> tuple[Learner, int]:
    """The bare backbone, and the token budget of a forward pass."""
    config = StreamConfig(
        stream="router",
        work_dir="unused",
        data_roots=("unused",),
        backbone=backbone,
        tasks=("unused",),
        method={"name": "zero_shot"},
        deepspeed=str(_ZERO2),
    )
    return build_learner(config, None, start_world(), train=False), config.evaluation.batch_tokens


def tokenise(given: argparse.Namespace, backbone: BackboneConfig, texts: Mapping[str, Texts]) -> dict:
    """Tokens in place of texts."""
    tokenizer = load_tokenizer(backbone)
    return {
        task: {split: text_tokens(tokenizer, rows, given.max_tokens) for split, rows in splits.items()}
        for task, splits in texts.items()
    }


def pool(learner: Learner, depths: Sequence[int], tokens: dict, budget: int) -> dict[int, Pooled]:
    """Pooled states of all texts, by depth."""
    pooled: dict[int, dict] = {depth: {task: {} for task in tokens} for depth in depths}
    for task, splits in tokens.items():
        for split, rows in splits.items():
            for depth, states in zip(depths, pooled_texts(learner, depths, rows, budget), strict=True):
                pooled[depth][task][split] = states
    return pooled


def learn(config: RouterConfig, pooled: Pooled) -> list[TaskRouter]:
    """The router after each task, each seeing the rows of its own task alone."""
    router, stages = TaskRouter.empty(config), []
    for task, splits in pooled.items():
        features = router.features(splits["train"])
        router = router.learn(task, features.T @ features, features.sum(dim=0))
        stages.append(router)
    return stages


def routed(router: TaskRouter, pooled: Pooled, split: str) -> dict[str, dict[str, float]]:
    """Share of each learned task's texts that goes to each task."""
    shares = {}
    for task in router.tasks:
        chosen = router.scores(pooled[task][split]).argmax(dim=1)
        counts = torch.bincount(chosen, minlength=len(router.tasks)).double() / len(chosen)
        shares[task] = dict(zip(router.tasks, counts.tolist(), strict=True))
    return shares


def after_task(router: TaskRouter, pooled: Pooled) -> dict[str, Any]:
    """Test texts of the tasks so far."""
    shares = routed(router, pooled, "test")
    return {
        "task": router.tasks[-1],
        "tasks": len(router.tasks),
        "accuracy": float(np.mean([shares[task][task] for task in shares])),
        "routed": shares,
    }


def against_batch(router: TaskRouter, pooled: Pooled) -> float:
    """Largest difference of the recursive weights from those solved on all rows at once, relative to the largest."""
    features = torch.cat([router.features(pooled[task]["train"]) for task in router.tasks]).numpy()
    targets = np.repeat(np.eye(len(router.tasks)), [len(pooled[task]["train"]) for task in router.tasks], axis=0)
    normal = features.T @ features + router.config.regularisation * np.eye(features.shape[1])
    weights = np.linalg.solve(normal, features.T @ targets)
    return float(np.abs(router.weights.numpy() - weights).max() / np.abs(weights).max())


def tfidf(texts: Mapping[str, Texts]) -> float:
    """Accuracy of the classical peer on the same test texts, all tasks counting alike."""
    flat: dict[str, tuple[list[str], list[str]]] = {}
    for split in SPLITS:
        pairs = [(text, task) for task, splits in texts.items() for text in splits[split]]
        flat[split] = [text for text, _ in pairs], [task for _, task in pairs]
    predicted = np.array(tfidf_predictions(*flat["train"], *flat["validation"], flat["test"][0]))
    true = np.array(flat["test"][1])
    return float(np.mean([(predicted[true == task] == task).mean() for task in texts]))


def as_table(report: Mapping[str, Any]) -> str:
    """What was found, as text."""
    chosen = report["settings"]
    best = f"layers {chosen['layers']}, regularisation {chosen['regularisation']:g}"
    lines = [f"chosen by accuracy (%) on validation: {best}"]
    lines += [
        f"  layers {choice['layers']:3d} regularisation {choice['regularisation']:8g} {100 * choice['validation']:6.2f}"
        for choice in report["chosen_on_validation_from"]
    ]
    lines.append("test texts routed to their own task, after each task")
    lines += [
        f"  {stage['tasks']:3d} tasks, last {stage['task']:24s} {100 * stage['accuracy']:.2f} %"
        for stage in report["after_each_task"]
    ]
    last = report["after_each_task"][-1]["routed"]
    lines += _confusion(last, list(last))
    lines.append(f"TF-IDF, all tasks at once: {100 * report['tfidf_all_tasks_at_once']:.2f} %")
    lines.append(f"recursive against batch weights: {report['recursive_against_batch']:.1e} relative")
    lines.append(f"kept: {report['kept_bytes'] / 1e6:.1f} MB; {report['seconds']} s")
    return "\n".join(lines)


def _confusion(shares: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    width = max(12, *map(len, tasks))
    head = " " * (width + 2) + "  ".join(f"{task:>{width}s}" for task in tasks)
    rows = [f"  {task:{width}s}" + "  ".join(f"{100 * shares[task][t]:{width}.1f}" for t in tasks) for task in tasks]
    return ["rows of the table: the true task; columns: where its texts went, in %", head, *rows]

"""`jobs/benchmark.py router`: how often the task router finds a text's task, as one task after another arrives.

Depth and regularisation are chosen on validation texts, after the last task; test texts are then routed once. Beside
it stands TF-IDF with logistic regression, which sees the training texts of all tasks at once.
"""

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
from pipeline.benchmarks.machine import describe_machine, describe_software
from pipeline.benchmarks.router.options import RouterOptions
from pipeline.benchmarks.tfidf import tfidf_predictions
from pipeline.config import BackboneConfig, RouterConfig, StreamConfig
from pipeline.data.batching import select_rows
from pipeline.data.tokens import SPLITS
from pipeline.evaluation.task_router import TaskRouter
from pipeline.evaluation.text_states import check_router, pooled_texts, text_tokens, with_layers
from pipeline.files import write_atomic
from pipeline.placement.distributed import start_world
from pipeline.placement.learner import Learner, build_learner

_ZERO2 = Path(__file__).resolve().parents[3] / "deepspeed_configs" / "zero2.json"
Texts = Mapping[str, list[str]]  # by split
Pooled = Mapping[str, Mapping[str, torch.Tensor]]  # task -> split -> (rows, D)


@dataclass(frozen=True)
class Choice:
    """A setting and its accuracy on validation texts, all tasks counting alike."""

    layers: int
    regularisation: float
    validation: float


def run_router(options: RouterOptions, out: Path) -> dict[str, Any]:
    """Measure; writes and returns the report. Raises UserError for data or settings that cannot be used."""
    backbone = BackboneConfig(path=options.backbone, dtype=options.dtype)
    architecture = load_config(backbone)
    depths = options.layers or (with_layers(RouterConfig(), architecture).layers,)
    settings = [
        RouterConfig(layers=layers, regularisation=x, features=options.features, max_tokens=options.max_tokens)
        for layers in depths
        for x in options.regularisation
    ]
    for config in settings:
        check_router(config, architecture)
    texts = {task: read_texts(options, task) for task in options.tasks}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begin = time.perf_counter()
    learner, budget = build(backbone)
    tokens = tokenise(options, backbone, texts)
    pooled = pool(learner, depths, tokens, budget)
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
        "backbone": Path(options.backbone).resolve().name,
        "settings": {**routers[best].model_dump(mode="json", exclude={"rows"}), "dtype": options.dtype},
        "rows": {split: {task: len(texts[task][split]) for task in texts} for split in SPLITS},
        "row_seed": options.seed,
        "chosen_on_validation_from": [vars(choice) for choice in choices],
        "after_each_task": [after_task(router, pooled[routers[best].layers]) for router in stages],
        "recursive_against_batch": against_batch(stages[-1], pooled[routers[best].layers]),
        "kept_bytes": sum(8 * tensor.numel() for tensor in stages[-1].tensors().values()),
        "tfidf_all_tasks_at_once": tfidf(texts),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
    return report


def read_texts(options: RouterOptions, task: str) -> Texts:
    """At most so many texts of each split, drawn by seed."""
    texts = {}
    for split in SPLITS:
        file = Path(options.data) / task / f"{split}.parquet"
        try:
            column = pq.read_table(file, columns=["text"])["text"].to_pylist()
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{file} has no readable column 'text' ({str(error).splitlines()[0]})") from error
        column = [text for text in column if text and text.strip()]
        rows = select_rows(len(column), getattr(options, f"{split}_rows"), options.seed, f"{task}/{split}")
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


def tokenise(options: RouterOptions, backbone: BackboneConfig, texts: Mapping[str, Texts]) -> dict:
    """Tokens in place of texts."""
    tokenizer = load_tokenizer(backbone)
    return {
        task: {split: text_tokens(tokenizer, rows, options.max_tokens) for split, rows in splits.items()}
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

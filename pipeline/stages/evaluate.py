"""Stage 4: retention decides what earlier tasks are served with, then one row of R is measured on test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from data_contracts import TaskContract
from pipeline.benchmarks.baselines import tfidf_score, zero_shot_score
from pipeline.data.tokens import SPLITS, PreparedTask, RowView
from pipeline.evaluation.answers import Answers, answer_rows, row_scores, task_score
from pipeline.evaluation.review_cost import ScoredRows, review_record
from pipeline.evaluation.task_router import TaskRouter
from pipeline.methods.protocol import Bundle, Increment, Method, bundle_digest
from pipeline.spans.record import span
from pipeline.stages.gate import ROUNDING
from pipeline.stages.infer import Inferred, infer
from pipeline.stages.job import Job
from pipeline.stages.train import Trained


@dataclass(frozen=True)
class Evaluated:
    """One row of R with all that led to it. `bundles` holds the bundles this increment changes, the new task's
    included.
    """

    row: dict[str, float]  # test
    validation_row: dict[str, float]
    bundles: dict[str, Bundle]
    predictions: dict[str, pa.Table]  # test, by task
    retention: dict[str, dict[str, Any]] = field(default_factory=dict)  # how each earlier task was decided
    baselines: dict[str, float] = field(default_factory=dict)  # of the new task, test
    inferred: Inferred = field(default_factory=Inferred)  # the row without task ids
    review: dict[str, dict[str, Any]] = field(default_factory=dict)  # thresholds and review cost, by task


def evaluate(
    job: Job,
    increment: Increment,
    tasks: Mapping[str, PreparedTask],
    trained: Trained,
    router: TaskRouter | None = None,
    unscored: Mapping[str, PreparedTask] | None = None,
) -> Evaluated:
    """Measure the new task and every earlier one in `tasks`; the router may also send rows to those in `unscored`.
    Collective; the same on every rank.

    Earlier tasks are pinned, moved, or moved if better on validation, as the method's retention says; test data only
    ever measures.
    """
    new = increment.task
    measured: dict[tuple, Measured] = {}

    def score(task: str, bundle: Bundle, split: str) -> Measured:
        key = (task, split, *sorted(bundle.items()))
        if key not in measured:
            measured[key] = measure(job, tasks[task], bundle, split)
        return measured[key]

    serving: dict[str, Bundle] = {}
    retention: dict[str, dict[str, Any]] = {}
    for task in increment.order:
        if task != new and task in tasks:
            serving[task], retention[task] = retain(
                job.method,
                increment.bundles[task],
                trained.bundle,
                lambda bundle, task=task: score(task, bundle, "validation"),
            )
    serving[new] = trained.bundle
    row, validation_row, predictions, review = {}, {}, {}, {}
    for task, bundle in serving.items():
        validation_row[task] = score(task, bundle, "validation").score
        test = score(task, bundle, "test")
        row[task] = test.score
        predictions[task] = test.answers.table(test.rows.column("row_id"), test.rows.column("reference"))
        if job.config.evaluation.review is not None and test.answers.label_scores is not None:
            review[task] = review_record(
                score(task, bundle, "validation").scored(),
                test.scored(),
                list(test.contract.labels),
                job.config.evaluation.review.target_precision,
                bundle_digest(bundle),
            )
        if job.world.is_main:
            print(f"  {task}: validation {100 * validation_row[task]:.1f}, test {100 * row[task]:.1f}", flush=True)
    known = {task: score(task, bundle, "test").answers for task, bundle in serving.items()}
    inferred = infer(job, router, {**(unscored or {}), **tasks}, {**increment.bundles, **serving}, known)
    changed = {task: bundle for task, bundle in serving.items() if increment.bundles.get(task) != bundle}
    return Evaluated(row, validation_row, changed, predictions, retention, baselines(job, tasks[new]), inferred, review)


def retain(
    method: Method, old: Bundle, new: Bundle, on_validation: Callable[[Bundle], "Measured"]
) -> tuple[Bundle, dict[str, Any]]:
    """The bundle an earlier task is served with from now on, and the numbers behind the choice (METHODS section 2)."""
    policy = method.retention.policy
    moved = method.moved(old, new)
    if policy == "pin" or moved is None or moved == old:
        return old, {"policy": policy, "moved": False}
    if policy == "follow":
        return moved, {"policy": policy, "moved": True}
    before, after = on_validation(old), on_validation(moved)
    better, gain, margin = moves(before, after, method.retention.margin)
    return (moved if better else old), {"policy": policy, "moved": better, "gain": gain, "margin": margin}


def moves(before: "Measured", after: "Measured", margin: float | None) -> tuple[bool, float, float]:
    """Whether a task moves to the bundle measured as `after`: (it does, gain in the metric, margin the gain must
    exceed).

    Without a margin it is one standard error of the mean paired difference over the rows.
    """
    gain = after.score - before.score
    if margin is None:
        difference = after.row_scores() - before.row_scores()
        margin = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return gain > margin + ROUNDING, gain, margin


@dataclass(frozen=True)
class Measured:
    """A task's answers under one bundle on one split, with the contract's metric of them."""

    contract: TaskContract
    answers: Answers
    rows: RowView
    score: float

    def row_scores(self) -> np.ndarray:
        """The metric row by row, (rows,)."""
        return row_scores(self.contract, self.answers, self.rows.column("reference"), self.rows.column("text"))

    def scored(self) -> ScoredRows:
        """Answers, their scores and the references, for review cost."""
        return ScoredRows.of(self.answers.answers, self.answers.scores, self.rows.column("reference"))


def measure(job: Job, prepared: PreparedTask, bundle: Bundle, split: str) -> Measured:
    """Answer a split of a task under a bundle and score it. Collective."""
    with span("score", part=True, task=prepared.task, split=split):
        return _measure(job, prepared, bundle, split)


def _measure(job: Job, prepared: PreparedTask, bundle: Bundle, split: str) -> Measured:
    rows = prepared.rows(split, getattr(job.config.rows, split), job.config.seed)
    job.serve(bundle)
    prompts, _ = rows.tokens(range(len(rows)))
    answers = answer_rows(
        job.learner,
        prepared.contract,
        prompts,
        prepared.label_ids,
        prepared.end_of_answer,
        job.tokenizer,
        job.config.evaluation.batch_tokens,
    )
    score = task_score(prepared.contract, answers, rows.column("reference"), rows.column("text"))
    return Measured(prepared.contract, answers, rows, score)


def baselines(job: Job, prepared: PreparedTask) -> dict[str, float]:
    """Test scores of the peers that `evaluation.baselines` asks for, on the same rows. Collective."""
    config = job.config
    views = {split: prepared.rows(split, getattr(config.rows, split), config.seed) for split in SPLITS}
    scores: dict[str, float] = {}
    if "zero_shot" in config.evaluation.baselines:
        job.serve({})
        scores["zero_shot"] = zero_shot_score(
            job.learner, prepared, views["validation"], views["test"], job.tokenizer, config.evaluation.batch_tokens
        )
    if "tfidf" in config.evaluation.baselines and prepared.contract.kind == "classification":
        scores["tfidf"] = job.world.on_main(lambda: tfidf_score(prepared.contract, views))
    return scores

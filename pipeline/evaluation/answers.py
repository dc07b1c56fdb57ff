"""Answers and scores of rows under one bundle, as a table; the metric of a task on them.

Evaluation and `jobs/predict.py` both come through here, so that new rows get the scores that evaluation gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract
from pipeline.evaluation import metrics
from pipeline.evaluation.generation import generate_rows
from pipeline.evaluation.scoring import score_rows
from pipeline.placement.learner import Learner


@dataclass(frozen=True)
class Answers:
    """One answer a row. `score` is the answer's probability among the labels (classification), or the mean
    log-probability of its tokens (generation); `label_scores` (rows, labels) are log-probabilities, None for
    generation."""

    answers: list[str]
    scores: np.ndarray
    label_scores: np.ndarray | None

    def table(self, row_ids: Sequence[str], references: Sequence[str] | None = None) -> pa.Table:
        """Columns row_id, answer, score, label_scores and, where known, reference."""
        columns: dict[str, pa.Array] = {
            "row_id": pa.array(row_ids, pa.string()),
            "answer": pa.array(self.answers, pa.string()),
            "score": pa.array(self.scores, pa.float32()),
        }
        if self.label_scores is not None:
            columns["label_scores"] = pa.array(self.label_scores.tolist(), pa.list_(pa.float32()))
        if references is not None:
            columns["reference"] = pa.array(references, pa.string())
        return pa.table(columns)


def answer_rows(
    learner: Learner,
    contract: TaskContract,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    end_of_answer: int,
    tokenizer: PreTrainedTokenizerFast,
    batch_tokens: int,
) -> Answers:
    """Answer every prompt with the experts that are in the slots now. Collective; the same on every rank."""
    if contract.kind == "generation":
        texts, scores = generate_rows(
            learner, prompts, tokenizer, end_of_answer, contract.limits.max_answer_tokens, batch_tokens
        )
        return Answers(texts, np.asarray(scores, dtype=np.float32), None)
    label_scores = score_rows(learner, prompts, label_ids, end_of_answer, batch_tokens)
    names = list(contract.labels)
    best = label_scores.argmax(axis=1)
    shifted = np.exp(label_scores - label_scores.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    return Answers([names[i] for i in best], probabilities[np.arange(len(best)), best], label_scores)


def task_score(contract: TaskContract, answers: Answers, references: Sequence[str], sources: Sequence[str]) -> float:
    """The contract's metric, in [0, 1]; `sources` are the texts the answers were made from (SARI compares with
    them).
    """
    return metrics.score(
        contract.metric, answers.answers, list(references), answer_match=contract.answer_match, sources=list(sources)
    )


def row_scores(
    contract: TaskContract, answers: Answers, references: Sequence[str], sources: Sequence[str]
) -> np.ndarray:
    """The metric of each row by itself, (rows,), for paired comparisons; macro F1 is compared by correctness."""
    metric = "accuracy" if contract.kind == "classification" else contract.metric
    return np.array(
        [
            metrics.score(metric, [answer], [reference], answer_match=contract.answer_match, sources=[source])
            for answer, reference, source in zip(answers.answers, references, sources, strict=True)
        ]
    )

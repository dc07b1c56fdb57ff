"""A row of R without task ids: every test row goes to the task the router chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data_contracts import TaskContract
from pipeline.data.token_limits import TokenCounter, fit
from pipeline.data.tokens import PreparedTask, prompt_tokens
from pipeline.evaluation.answers import Answers, answer_rows, task_score
from pipeline.evaluation.task_router import TaskRouter
from pipeline.evaluation.text_states import score_texts, text_tokens
from pipeline.methods.protocol import Bundle
from pipeline.stages.job import Job


@dataclass(frozen=True)
class Inferred:
    """What was measured with the router choosing the task of every test row."""

    row: dict[str, float] = field(default_factory=dict)  # the contract's metric, by the row's true task
    routing: dict[str, dict[str, int]] = field(default_factory=dict)  # true task -> chosen task -> rows
    predictions: dict[str, pa.Table] = field(default_factory=dict)  # by true task


def infer(
    job: Job,
    router: TaskRouter | None,
    tasks: Mapping[str, PreparedTask],
    serving: Mapping[str, Bundle],
    known: Mapping[str, Answers],
) -> Inferred:
    """Route and answer the test rows of every task in `known`, which holds their answers under the known task.
    Collective; the same on every rank.

    A row that the router sends to another task is answered as that task's rows are, where its prompt needs the text
    alone and fits; else it has no answer, and counts as wrong. An answer counts by the true task's contract.
    """
    if router is None:
        return Inferred()
    inferred = Inferred()
    for task, answers in known.items():
        rows = tasks[task].rows("test", job.config.rows.test, job.config.seed)
        texts, references = rows.column("text"), rows.column("reference")
        job.serve({})
        tokens = text_tokens(job.tokenizer, texts, router.config.max_tokens)
        scores = score_texts(job.learner, router, tokens, job.config.evaluation.batch_tokens).numpy()
        chosen = scores.argmax(axis=1)
        given, values = list(answers.answers), answers.scores.copy()
        for index in np.unique(chosen):
            other = router.tasks[index]
            here = np.flatnonzero(chosen == index)
            inferred.routing.setdefault(task, {})[other] = len(here)
            if other == task:
                continue
            moved = {}
            if other in tasks and other in serving:
                moved = answer_texts(job, tasks[other], serving[other], [texts[row] for row in here])
            for place, row in enumerate(here):
                given[row], values[row] = moved.get(place, ("", np.nan))
        inferred.row[task] = task_score(tasks[task].contract, Answers(given, values, None), references, texts)
        table = Answers(given, values, None).table(rows.column("row_id"), references)
        table = table.append_column("task", pa.array([router.tasks[index] for index in chosen], pa.string()))
        if job.world.is_main:
            right = 100 * float((chosen == router.tasks.index(task)).mean())
            print(f"  {task}: task inferred {100 * inferred.row[task]:.1f}, {right:.1f} % routed right", flush=True)
        inferred.predictions[task] = table.append_column("task_score", pa.array(scores.max(axis=1), pa.float64()))
    return inferred


def answer_texts(job: Job, prepared: PreparedTask, bundle: Bundle, texts: list[str]) -> dict[int, tuple[str, float]]:
    """{place: (answer, score)} of texts under a task's prompt and bundle; a text that cannot be asked is left out.
    Collective.
    """
    places, prompts = ask(prepared.contract, texts, TokenCounter(job.tokenizer))
    if not prompts:
        return {}
    job.serve(bundle)
    answers = answer_rows(
        job.learner,
        prepared.contract,
        prompt_tokens(job.tokenizer, prompts),
        prepared.label_ids,
        prepared.end_of_answer,
        job.tokenizer,
        job.config.evaluation.batch_tokens,
    )
    return dict(zip(places, zip(answers.answers, answers.scores, strict=True), strict=True))


def ask(contract: TaskContract, texts: list[str], counter: TokenCounter) -> tuple[list[int], list[str]]:
    """Places and prompts of the texts that fit the contract's prompt and token limits; none where the prompt needs
    another column.
    """
    text = contract.columns.text
    if set(contract.prompt_columns) != {text}:
        return [], []
    longest = max((contract.labels or {"": ""}).values(), key=len)
    fitted = fit(contract, pa.table({text: pa.array(texts, pa.string())}), [longest] * len(texts), counter)
    places = np.flatnonzero(fitted.fits).tolist()
    return places, [fitted.prompts[place] for place in places]

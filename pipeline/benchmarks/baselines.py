"""Peers measured beside a new task on the same rows: the frozen backbone with its best prompt, and a linear model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract
from pipeline.data.tokens import PreparedTask, RowView, answer_tokens
from pipeline.evaluation import metrics
from pipeline.evaluation.answers import answer_rows, task_score
from pipeline.placement.learner import Learner

_HOLE = "\u0001prompt\u0001"  # stands for the prompt while a template is rendered around it


@dataclass(frozen=True)
class PromptVariant:
    """A way to ask: token ids around the contract's prompt, and the label texts' tokens that answer it."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    label_ids: tuple[tuple[int, ...], ...]

    def wrap(self, prompt: Sequence[int], bos: int | None) -> list[int]:
        """The whole prompt; a beginning-of-sequence token stays first, once."""
        first = [bos] if bos is not None and prompt and prompt[0] == bos else []
        before = list(self.before[1:]) if first and self.before[:1] == (bos,) else list(self.before)
        return [*first, *before, *prompt[len(first) :], *self.after]


def prompt_variants(prepared: PreparedTask, tokenizer: PreTrainedTokenizerFast) -> list[PromptVariant]:
    """The contract's prompt; the same after an instruction that lists the labels; that as a chat, where there is a
    template.
    """
    labels = list((prepared.contract.labels or {}).values())
    if labels:
        instruction = f"Answer with one of: {', '.join(label.strip() for label in labels)}.\n\n"
    else:
        instruction = "Answer briefly.\n\n"
    lead = tuple(answer_tokens(tokenizer, [instruction])[0])
    variants = [
        PromptVariant("contract", (), (), prepared.label_ids),
        PromptVariant("instruction", lead, (), prepared.label_ids),
    ]
    if tokenizer.chat_template:
        message = [{"role": "user", "content": instruction + _HOLE}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in text.split(_HOLE))
        bare = tuple(map(tuple, answer_tokens(tokenizer, [label.strip() for label in labels]))) if labels else ()
        variants.append(PromptVariant("chat", before, after, bare))
    return variants


def zero_shot_score(
    learner: Learner,
    prepared: PreparedTask,
    validation: RowView,
    test: RowView,
    tokenizer: PreTrainedTokenizerFast,
    batch_tokens: int,
) -> float:
    """Test score of the bare backbone under the prompt variant that is best on validation. Collective.

    The caller has emptied the slots.
    """

    def score(variant: PromptVariant, rows: RowView) -> float:
        prompts = [variant.wrap(prompt, tokenizer.bos_token_id) for prompt in rows.tokens(range(len(rows)))[0]]
        answers = answer_rows(
            learner, prepared.contract, prompts, variant.label_ids, prepared.end_of_answer, tokenizer, batch_tokens
        )
        return task_score(prepared.contract, answers, rows.column("reference"), rows.column("text"))

    best = max(prompt_variants(prepared, tokenizer), key=lambda variant: score(variant, validation))
    return score(best, test)


def tfidf_score(contract: TaskContract, views: Mapping[str, RowView]) -> float:
    """Test score of TF-IDF with logistic regression on the same rows; its C is chosen on validation."""
    from pipeline.benchmarks.tfidf import tfidf_predictions  # scikit-learn: half a second that training never needs

    columns = {split: (view.column("text"), view.column("reference")) for split, view in views.items()}
    predictions = tfidf_predictions(*columns["train"], *columns["validation"], columns["test"][0])
    return metrics.score(contract.metric, predictions, columns["test"][1])

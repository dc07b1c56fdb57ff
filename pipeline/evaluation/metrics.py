"""Scores of predictions against references: pure functions, each in [0, 1], higher is better.

`score` picks the one a contract names. All take two lists of strings of equal length, one entry a row, and average over
the rows.
"""

import re
from collections import Counter

from rapidfuzz import fuzz

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han: written without blanks, so a character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_WORD_OR_MARK = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
SARI_MAX_N = 4  # Xu et al. 2016, equation 2: n-grams of 1 to 4 words


def normalise_answer(text: str, answer_match: str = "full") -> str:
    """The part of a generated answer that counts: `full` (without outer white space), `first_line` (the first with
    anything on it) or `first_token` (up to the first white space). Raises ValueError for another `answer_match`.
    """
    text = text.strip()
    if answer_match == "full":
        return text
    if answer_match == "first_line":
        return text.split("\n", 1)[0].rstrip()
    if answer_match == "first_token":
        return text.split(maxsplit=1)[0] if text else ""
    raise ValueError(f"answer_match {answer_match!r} is unknown; use full, first_line or first_token")


def accuracy(predictions: list[str], references: list[str]) -> float:
    """Share of rows whose prediction is the reference."""
    _check_rows(predictions, references)
    hits = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
    return hits / len(references)


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Accuracy of generated texts, once white space around them is taken off."""
    return accuracy([text.strip() for text in predictions], [text.strip() for text in references])


def macro_f1(predictions: list[str], references: list[str]) -> float:
    """Mean F1 = 2 TP / (2 TP + FP + FN) over every class that occurs in references or predictions."""
    _check_rows(predictions, references)
    predicted, actual = Counter(predictions), Counter(references)
    hits = Counter(
        reference for prediction, reference in zip(predictions, references, strict=True) if prediction == reference
    )
    classes = predicted.keys() | actual.keys()
    return sum(2 * hits[name] / (predicted[name] + actual[name]) for name in sorted(classes)) / len(classes)


class _Words:
    """Lower-cased words of any script. On ASCII text these are the tokens of rouge-score, which drops every other
    character.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def rouge_l(predictions: list[str], references: list[str]) -> float:
    """Mean F-measure of the longest common subsequence of words (Lin 2004), without stemming."""
    _check_rows(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK, which most tasks never need

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, predictions, strict=True)
    return sum(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs) / len(references)


def edit_similarity(predictions: list[str], references: list[str]) -> float:
    """Mean of 1 - (insertions + deletions) / (sum of both lengths) in characters: `fuzz.ratio` / 100, as TRACE (arXiv
    2310.06762) scores code.
    """
    _check_rows(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(fuzz.ratio(prediction, reference) / 100 for prediction, reference in pairs) / len(references)


def sari(predictions: list[str], references: list[str], sources: list[str]) -> float:
    """Quality of simplifications against their sources: SARI (Xu et al., TACL 2016, section 4), one reference a row,
    mean over rows.

    Per row the mean over n = 1..4 of F1 of kept n-grams, precision of deleted ones and F1 of added ones, averaged over
    the three operations. An operation neither asked for nor done scores 1 (0/0 = 1), and recall of kept n-grams counts
    occurrences, as in Hugging Face `evaluate`. Words are lower-cased; punctuation marks are words.
    """
    _check_rows(predictions, references)
    _check_rows(sources, references)
    rows = zip(sources, predictions, references, strict=True)
    return sum(_sari_row(*(_WORD_OR_MARK.findall(text.lower()) for text in row)) for row in rows) / len(references)


def _sari_row(source: list[str], output: list[str], reference: list[str]) -> float:
    """SARI of one row of words."""
    total = 0.0
    for n in range(1, SARI_MAX_N + 1):
        source_n, output_n, reference_n = _ngrams(source, n), _ngrams(output, n), _ngrams(reference, n)

        kept = source_n & output_n
        should_keep = source_n & reference_n
        good = kept & reference_n
        keep_precision = _ratio(sum(good[gram] / kept[gram] for gram in kept), len(kept))
        keep_recall = _ratio(good.total(), should_keep.total())

        deleted = source_n - output_n
        good = deleted - reference_n
        delete_precision = _ratio(sum(good[gram] / deleted[gram] for gram in deleted), len(deleted))

        added = output_n.keys() - source_n.keys()
        should_add = reference_n.keys() - source_n.keys()
        add_precision = _ratio(len(added & should_add), len(added))
        add_recall = _ratio(len(added & should_add), len(should_add))

        total += _f1(keep_precision, keep_recall) + delete_precision + _f1(add_precision, add_recall)
    return total / (3 * SARI_MAX_N)


def _ngrams(words: list[str], n: int) -> Counter:
    """How often each run of n words occurs."""
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


METRICS = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
}


def score(
    metric: str,
    predictions: list[str],
    references: list[str],
    *,
    answer_match: str = "full",
    sources: list[str] | None = None,
) -> float:
    """The contract's `metric` in [0, 1]; the contract's `answer_match` is applied to both sides first.

    `sources` (the texts given to the model, one a row) are needed by `sari` alone. Raises ValueError for an unknown
    metric, no rows, lists of unequal length, or `sari` without sources.
    """
    predictions = [normalise_answer(text, answer_match) for text in predictions]
    references = [normalise_answer(text, answer_match) for text in references]
    if metric == "sari":
        if sources is None:
            raise ValueError("metric sari compares with the source texts; pass sources")
        return sari(predictions, references, sources)
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; use one of {', '.join([*METRICS, 'sari'])}")
    return METRICS[metric](predictions, references)


def _check_rows(rows: list[str], references: list[str]) -> None:
    if not references:
        raise ValueError("there are no rows to score")
    if len(rows) != len(references):
        raise ValueError(f"{len(rows)} rows stand against {len(references)} references; one of each a row is needed")

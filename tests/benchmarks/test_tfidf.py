"""The TF-IDF peer learns what can be learned from words, and chooses C without the test rows."""

import random

from pipeline.benchmarks import tfidf


def rows(number, seed, noise=0.0):
    """Texts whose class is told by one word among fillers; a share of the labels is wrong."""
    draw = random.Random(seed)
    signs = {"negative": ["awful", "broken"], "neutral": ["plain", "usual"], "positive": ["great", "lovely"]}
    texts, labels = [], []
    for n in range(number):
        label = list(signs)[n % 3]
        words = [draw.choice(signs[label]), *draw.choices(["the", "thing", "was", "here", "today"], k=5)]
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(draw.choice(list(signs)) if draw.random() < noise else label)
    return texts, labels


def test_words_that_tell_the_class_are_learned():
    train, validation, test = rows(90, 1), rows(30, 2), rows(60, 3)
    predictions = tfidf.tfidf_predictions(*train, *validation, test[0])
    assert predictions == test[1]


def test_word_order_within_pairs_is_seen():
    texts = ["not good but bad", "not bad but good"] * 20
    labels = ["negative", "positive"] * 20
    assert tfidf.tfidf_predictions(texts, labels, texts, labels, texts[:2]) == labels[:2]


def test_c_is_chosen_by_validation_accuracy(monkeypatch):
    """A C so small that one class swallows all loses to one that fits, wherever it stands in the list."""
    train, validation, test = rows(91, 1), rows(30, 2), rows(60, 3)
    monkeypatch.setattr(tfidf, "CANDIDATE_C", (1e-9,))
    collapsed = tfidf.tfidf_predictions(*train, *validation, test[0])
    assert set(collapsed) == {"negative"}
    for candidates in [(1e-9, 10.0), (10.0, 1e-9)]:
        monkeypatch.setattr(tfidf, "CANDIDATE_C", candidates)
        assert tfidf.tfidf_predictions(*train, *validation, test[0]) == test[1]


def test_other_test_rows_do_not_change_a_prediction():
    train, validation, test = rows(90, 1, noise=0.3), rows(30, 2, noise=0.3), rows(60, 3)
    together = tfidf.tfidf_predictions(*train, *validation, test[0])
    alone = [tfidf.tfidf_predictions(*train, *validation, [text])[0] for text in test[0][:5]]
    assert together[:5] == alone

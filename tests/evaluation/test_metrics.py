"""Metrics against values worked out by hand."""

import pytest

from pipeline.evaluation.metrics import (
    accuracy,
    edit_similarity,
    exact_match,
    macro_f1,
    normalise_answer,
    rouge_l,
    sari,
    score,
)


def test_accuracy_is_the_share_of_equal_answers():
    assert accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"]) == 0.75


def test_macro_f1_weighs_classes_alike_and_counts_a_class_that_is_only_predicted():
    # a: TP 2, FP 1, FN 0 -> 4/5; b: TP 0, FP 0, FN 1 -> 0; c is never right: 0
    assert macro_f1(["a", "a", "a", "c"], ["a", "a", "b", "b"]) == pytest.approx((4 / 5 + 0 + 0) / 3)


def test_exact_match_ignores_white_space_around_the_text_and_nothing_else():
    assert exact_match([" yes\n", "Yes", "no way"], ["yes", "yes", "no  way"]) == pytest.approx(1 / 3)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "the cat sat" against "the black cat sat down": common 3 words, precision 3/3, recall 3/5
    assert rouge_l(["The cat sat."], ["the black cat sat down"]) == pytest.approx(2 * 1 * 0.6 / 1.6)
    assert rouge_l(["sat cat", "x"], ["cat sat", "x"]) == pytest.approx((0.5 + 1.0) / 2)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Über Größe", "über Größe", 1.0),  # two words; a Latin-only tokenizer sees fragments
        ("我喜欢它", "我不喜欢它", 2 * 1 * 0.8 / 1.8),  # 4 of 5 characters in order
        ("привет мир", "привет", 2 * 0.5 * 1 / 1.5),
    ],
)
def test_rouge_l_sees_words_of_every_script(prediction, reference, expected):
    assert rouge_l([prediction], [reference]) == pytest.approx(expected)


def test_rouge_l_equals_the_library_on_ascii_text():
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = "It's a snake_case name: 3.14, isn't it?", "a snake case name is 3 and 14"
    stock = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert 0 < stock < 1
    assert rouge_l([prediction], [reference]) == stock


def test_edit_similarity_counts_insertions_and_deletions():
    # "abcd" -> "abxd": one deletion and one insertion of 8 characters; "" and "" are alike
    assert edit_similarity(["abcd", ""], ["abxd", ""]) == pytest.approx((0.75 + 1.0) / 2)
    assert edit_similarity(["abc"], ["xyz"]) == 0.0


def test_sari_of_a_row_worked_out_by_hand():
    # source "a b c d", output "a b e", reference "a b e f", 0/0 = 1:
    #   n  keep (P, R -> F1)              delete P                            add (P, R -> F1)
    #   1  {a,b}/{a,b}: 1, 1 -> 1         {c,d}, none in the reference: 1     {e} of {e,f}: 1, 1/2 -> 2/3
    #   2  {ab}: 1, 1 -> 1                {bc,cd}: 1                          {be} of {be,ef}: 1, 1/2 -> 2/3
    #   3  none kept, none to keep: 1     {abc,bcd}: 1                        {abe} of {abe,bef}: 1, 1/2 -> 2/3
    #   4  1                              {abcd}: 1                           none added -> P 1; {abef} missed: R 0 -> 0
    expected = ((1 + 1 + 1 + 1) / 4 + (1 + 1 + 1 + 1) / 4 + (2 / 3 + 2 / 3 + 2 / 3 + 0) / 4) / 3
    assert sari(["a b e"], ["a b e f"], ["a b c d"]) == pytest.approx(expected)


def test_sari_counts_repeated_words():
    # source "a a a", output "a", reference "a a". n=1: kept a x1, good 1 -> P 1; to keep a x2 -> R 1/2, F1 2/3.
    # Deleted a x2, none beyond the reference's own count 2 -> P 0. Nothing added or asked for: 1.
    # n=2: kept none -> P 1; to keep aa x1 -> R 0, F1 0; deleted aa x2, beyond the reference's x1: 1/2; add 1.
    # n=3: keep 1; deleted aaa x1, not in the reference: 1; add 1.  n=4: 1, 1, 1.
    expected = ((2 / 3 + 0 + 1 + 1) / 4 + (0 + 1 / 2 + 1 + 1) / 4 + 1) / 3
    assert sari(["a"], ["a a"], ["a a a"]) == pytest.approx(expected)


def test_sari_is_one_for_the_reference_itself_and_separates_punctuation():
    assert sari(["Short, now."], ["short , now ."], ["A long sentence , now ."]) == 1.0


@pytest.mark.parametrize(
    ("answer_match", "expected"),
    [("full", "B) yes\n\nbecause"), ("first_line", "B) yes"), ("first_token", "B)")],
)
def test_answer_match_takes_the_part_that_counts(answer_match, expected):
    assert normalise_answer("\n B) yes \n\nbecause ".replace(" \n\n", "\n\n"), answer_match) == expected


def test_answer_match_of_an_empty_answer_is_empty():
    assert [normalise_answer("  \n", how) for how in ("full", "first_line", "first_token")] == ["", "", ""]


def test_score_applies_answer_match_to_both_sides():
    predictions, references = ["yes\nsure", "no"], ["yes\nof course", "yes"]
    assert score("exact_match", predictions, references) == 0.0
    assert score("exact_match", predictions, references, answer_match="first_line") == 0.5


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "exact_match", "rouge_l", "edit_similarity", "sari"])
def test_every_metric_of_a_contract_is_one_for_perfect_and_lower_for_wrong_answers(metric):
    references, sources = ["alpha beta", "gamma"], ["alpha beta gamma", "gamma delta"]
    assert score(metric, references, references, sources=sources) == 1.0
    assert 0.0 <= score(metric, ["omega", "psi"], references, sources=sources) < 0.75


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        score("accuracy", [], [])
    with pytest.raises(ValueError, match="1 rows stand against 2"):
        score("rouge_l", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="'bleu' is unknown"):
        score("bleu", ["a"], ["a"])
    with pytest.raises(ValueError, match="pass sources"):
        score("sari", ["a"], ["a"])
    with pytest.raises(ValueError, match="'last_line' is unknown"):
        score("accuracy", ["a"], ["a"], answer_match="last_line")

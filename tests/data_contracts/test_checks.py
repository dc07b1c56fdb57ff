"""The vectorised checks against values worked out by hand and against a row-by-row oracle."""

import random

import pyarrow as pa
import pytest

from data_contracts.checks import broken, check_values, column_of, counts, mark, no_reasons
from data_contracts.contract import Rule, TaskContract


def contract(**changes) -> TaskContract:
    content = {
        "task": "t",
        "version": "1.0.0",
        "owner": "o",
        "description": "d",
        "kind": "classification",
        "language": "en",
        "source": {"format": "csv", "train": ["a"], "validation": ["b"], "test": ["c"]},
        "columns": {"id": "id", "text": "text", "answer": "label"},
        "prompt": "{title} {text}",
        "labels": {"bad": " bad", "good": " good"},
        "metric": "accuracy",
        "licence": "l",
        "sensitivity": "public",
    }
    return TaskContract.model_validate(content | changes)


def test_each_defect_has_its_reason():
    rows = [
        {"id": "1", "title": "t", "text": "fine", "label": "good"},
        {"id": None, "title": "t", "text": "no id", "label": "good"},
        {"id": " ", "title": "t", "text": "blank id", "label": "good"},
        {"id": "4", "title": None, "text": "no title", "label": "good"},
        {"id": "5", "title": "", "text": "an empty title is fine", "label": "bad"},
        {"id": "6", "title": "t", "text": None, "label": "good"},
        {"id": "7", "title": "t", "text": " \t\u00a0\n", "label": "good"},
        {"id": "8", "title": "t", "text": "no label", "label": None},
        {"id": "9", "title": "t", "text": "other label", "label": "Good"},
        {"id": "10", "title": "t", "text": "already marked", "label": None},
    ]
    found = no_reasons(len(rows))
    found = mark(found, column_of([row["id"] == "10" for row in rows], pa.bool_()), "wrong_type")
    reasons, warned = check_values(contract(), pa.Table.from_pylist(rows), found)
    assert reasons.to_pylist() == [
        *(None, "null", "null", "null", None, "null", "empty_text", "null", "unknown_label", "wrong_type"),
    ]
    assert warned == {}
    assert counts(reasons) == {"empty_text": 1, "null": 5, "unknown_label": 1, "wrong_type": 1}


@pytest.mark.parametrize(
    ("check", "value", "values", "expected"),
    [
        ("min_length", 3, ["ab", "abc", "éé", "ééé", None], [True, False, True, False, True]),
        ("max_length", 3, ["abcd", "abc", "日本語", "", None], [True, False, False, False, True]),
        ("regex", "^[a-c]+$", ["abc", "abd", "", None], [False, True, True, True]),
        ("regex", "b", ["abc", "acd"], [False, True]),
        ("regex", r"^\p{L}+$", ["été", "e1"], [False, True]),
        ("allowed_values", ["a", 3, 2.5, True], ["a", "3", "2.5", "true", "b", None], [False] * 4 + [True, True]),
        ("min_value", 2, ["2", "1.99", "-3", " 4 ", "1e1", ".5", "x", "", None], [0, 1, 1, 0, 0, 1, 1, 1, 1]),
        ("max_value", 2.5, ["2.5", "2.51", "-1e9", "+2", "nan", "inf", "0x1"], [0, 1, 0, 0, 1, 1, 1]),
    ],
)
def test_rules_by_hand(check, value, values, expected):
    rule = Rule(column="c", check=check, value=value)
    assert broken(rule, column_of(values)).to_pylist() == [bool(flag) for flag in expected]


def test_lengths_are_characters_however_many_bytes_each_of_them_takes():
    draw = random.Random(5)
    texts = ["".join(draw.choices("aé日\U0001f600", k=draw.randint(0, 12))) for _ in range(500)] + ["", None]
    for number in range(13):
        for check, broken_at in (("min_length", int.__lt__), ("max_length", int.__gt__)):
            rule = Rule(column="c", check=check, value=number)
            expected = [text is None or broken_at(len(text), number) for text in texts]
            assert broken(rule, column_of(texts)).to_pylist() == expected
            chunked = pa.chunked_array([texts[:200], [], texts[200:]], pa.string())
            assert broken(rule, chunked).to_pylist() == expected
    for number in (2**29, 2**31, 2**40):
        assert broken(Rule(column="c", check="max_length", value=number), column_of(["a"])).to_pylist() == [False]
        assert broken(Rule(column="c", check="min_length", value=number), column_of(["a"])).to_pylist() == [True]


def test_a_row_keeps_the_first_of_its_reasons():
    reasons = column_of(["wrong_type", None, None, None])
    reasons = mark(reasons, column_of([True, True, None, False], pa.bool_()), "null")
    assert reasons.to_pylist() == ["wrong_type", "null", None, None]
    reasons = mark(reasons, column_of([True, True, True, False], pa.bool_()), "leak")
    assert reasons.to_pylist() == ["wrong_type", "null", "leak", None]
    assert mark(reasons, column_of([True, False, True, False], pa.bool_()), "x").equals(reasons)


def test_a_regular_expression_that_hangs_other_engines_is_answered_at_once():
    rule = Rule(column="c", check="regex", value="^(a+)+$")
    assert broken(rule, column_of(["a" * 50_000 + "b"])).to_pylist() == [True]


def test_a_rule_rejects_or_warns_as_its_severity_says():
    rules = [
        {"column": "text", "check": "min_length", "value": 3},
        {"column": "text", "check": "max_length", "value": 5, "severity": "warn"},
    ]
    table = pa.table({"id": ["1", "2", "3"], "title": ["t"] * 3, "text": ["ab", "abc", "abcdef"], "label": ["bad"] * 3})
    reasons, warned = check_values(contract(rules=rules), table, no_reasons(3))
    assert reasons.to_pylist() == ["rule:min_length:text", None, None]
    assert {code: hit.to_pylist() for code, hit in warned.items()} == {"rule:max_length:text": [False, False, True]}


def test_a_text_is_empty_exactly_where_python_strips_all_of_it():
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["", *characters]
    table = pa.table(
        {"id": ["1"] * len(texts), "title": ["t"] * len(texts), "text": texts, "label": ["bad"] * len(texts)}
    )
    reasons, _ = check_values(contract(), table, no_reasons(len(texts)))
    empty = [text for text, reason in zip(texts, reasons.to_pylist(), strict=True) if reason == "empty_text"]
    assert empty == [text for text in texts if not text.strip()]


def test_random_rows_get_the_reasons_of_a_row_by_row_reading():
    rules = [
        {"column": "text", "check": "min_length", "value": 2},
        {"column": "stars", "check": "max_value", "value": 4},
    ]
    checked = contract(rules=rules)

    def oracle(row: dict) -> str | None:
        if row["id"] is None or not row["id"].strip() or row["label"] is None or not row["label"].strip():
            return "null"
        if row["title"] is None or row["text"] is None:
            return "null"
        if not row["text"].strip():
            return "empty_text"
        if row["label"] not in ("good", "bad"):
            return "unknown_label"
        if len(row["text"]) < 2:
            return "rule:min_length:text"
        if row["stars"] is None or float(row["stars"]) > 4:
            return "rule:max_value:stars"
        return None

    draw = random.Random(7)
    rows = [
        {
            "id": draw.choice(["1", "2", "", None]),
            "title": draw.choice(["t", "", None]),
            "text": draw.choice(["some text", "x", " ", "", None]),
            "label": draw.choice(["good", "bad", "ugly", "", None]),
            "stars": draw.choice(["1", "4.0", "5", None]),
        }
        for _ in range(2000)
    ]
    reasons, _ = check_values(checked, pa.Table.from_pylist(rows), no_reasons(len(rows)))
    assert reasons.to_pylist() == [oracle(row) for row in rows]
    assert None in reasons.to_pylist()

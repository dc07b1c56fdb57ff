"""Prompts and answers: column names are filled in, and nothing else is ever evaluated."""

import pyarrow as pa
import pytest

from data_contracts import TaskContract, UserError
from pipeline.data.prompts import CLEAN_COLUMNS, answers, prompt_columns, render_prompts


def contract(**changes) -> TaskContract:
    content = {
        "task": "t",
        "version": "1.0.0",
        "owner": "o",
        "description": "d",
        "kind": "classification",
        "language": "en",
        "source": {"format": "csv", "train": ["a"], "validation": ["b"], "test": ["c"]},
        "columns": {"text": "text", "answer": "label"},
        "prompt": "Review: {text}\nSentiment:",
        "labels": {"bad": " bad", "good": " good"},
        "metric": "accuracy",
        "licence": "l",
        "sensitivity": "public",
    }
    return TaskContract.model_validate(content | changes)


def test_columns_are_listed_once_in_order():
    assert prompt_columns("{b} and {a}, {b} again, {{c}}") == ["b", "a"]
    assert prompt_columns("{Review Text}") == ["Review Text"]
    assert prompt_columns("no column") == []


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:}{", "{}", "{0}", "}", "{a", "{{a}", "{a:{b}}"]
)
def test_anything_but_a_column_name_is_refused(template):
    with pytest.raises(UserError):
        prompt_columns(template)


def test_prompts_are_filled_in_row_by_row():
    table = pa.table({"text": ["nice", "100% {text} {0} \\n", ""], "stars": [5, 1, 3], "label": ["good"] * 3})
    found = render_prompts(contract(prompt="{{stars}} {stars}: {text}{text}"), table)
    assert found == ["{stars} 5: nicenice", "{stars} 1: 100% {text} {0} \\n100% {text} {0} \\n", "{stars} 3: "]


def test_chunks_and_types_of_a_column_do_not_matter():
    chunked = pa.table({"text": pa.chunked_array([["a"], [], ["b", "c"]])})
    assert render_prompts(contract(prompt="<{text}>"), chunked) == ["<a>", "<b>", "<c>"]
    encoded = pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})
    assert render_prompts(contract(prompt="<{text}>"), encoded) == ["<a>", "<b>"]


def test_a_missing_column_and_a_missing_value_are_named():
    with pytest.raises(UserError, match=r"'text', which the data does not have \(it has body, label\)"):
        render_prompts(contract(), pa.table({"body": ["a"], "label": ["good"]}))
    with pytest.raises(UserError, match=r"1 rows \(the first is row 2\)"):
        render_prompts(contract(), pa.table({"text": ["a", None]}))


def test_the_answer_of_a_classification_is_its_labels_text():
    assert answers(contract(), pa.table({"label": ["good", "bad", "good"]})) == [" good", " bad", " good"]
    clean = pa.table({name: ["good", "bad"] for name in CLEAN_COLUMNS})
    assert answers(contract(), clean) == [" good", " bad"]
    with pytest.raises(UserError, match="row 2 has the answer 'ugly'"):
        answers(contract(), pa.table({"label": ["good", "ugly"]}))


def test_the_answer_of_a_generation_is_its_column():
    writes = contract(kind="generation", labels=None, metric="sari")
    assert answers(writes, pa.table({"label": ["one", "two"]})) == ["one", "two"]
    with pytest.raises(UserError, match="no answer column 'label'"):
        answers(writes, pa.table({"text": ["one"]}))

"""A drafted contract: inferred where the data says it, marked where only the owner knows."""

import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_contracts import UserError, load_contract
from data_contracts.draft import draft_contract

OWNED = {
    "owner": "me@example.com",
    "description": "Judge reviews",
    "language": "en",
    "licence": "own",
    "sensitivity": "internal",
}


def filled(text: str) -> str:
    """What an owner does: every marked line gets its value."""
    for name, value in OWNED.items():
        text, number = re.subn(rf'^{name}: ""  # OWNER:.*$', f"{name}: {value}", text, flags=re.MULTILINE)
        assert number == 1, name
    assert "OWNER:" not in text
    return text


def review_rows(number: int) -> list[dict]:
    return [
        {
            "review_id": i,
            "Review": f"review {i} " + "word " * (i % 30),
            "stars": i % 5,
            "Sentiment": ["bad", "very_good"][i % 2],
        }
        for i in range(number)
    ]


def write(folder, rows, kind):
    file = folder / f"reviews.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(file, "w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_and_labels_are_inferred_and_the_filled_draft_loads(tmp_path, kind):
    (tmp_path / "data").mkdir()
    file = write(tmp_path / "data", review_rows(100), kind)
    text = draft_contract(file, "reviews", [tmp_path])
    contract_file = tmp_path / "reviews.yaml"

    contract_file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="owner: must not be empty"):
        load_contract(contract_file)

    contract_file.write_text(filled(text), encoding="utf-8")
    contract = load_contract(contract_file)
    assert contract.columns.model_dump() == {"id": "review_id", "text": "Review", "answer": "Sentiment"}
    assert contract.labels == {"bad": " bad", "very_good": " very good"}
    assert (contract.kind, contract.metric) == ("classification", "accuracy")
    assert contract.source.format == kind
    assert contract.source.train == (f"data/reviews.{kind}",)
    assert contract.prompt == "Review: {Review}\nSentiment:"
    assert '# not used: "stars"' in text


def test_free_text_answers_make_a_generation_task(tmp_path):
    rows = [{"question": f"what is {i} plus {i}?", "answer": f"it is {i + i}"} for i in range(60)]
    contract_file = tmp_path / "sums.yaml"
    contract_file.write_text(filled(draft_contract(write(tmp_path, rows, "jsonl"), "sums", [tmp_path])))
    contract = load_contract(contract_file)
    assert (contract.kind, contract.metric, contract.labels) == ("generation", "rouge_l", None)
    assert contract.columns.id is None
    assert contract.limits.max_answer_tokens == 16


def test_without_an_answer_column_the_owner_is_asked_for_it(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(30)]
    text = draft_contract(write(tmp_path, rows, "csv"), "open_task", [tmp_path])
    assert re.search(r'answer: ""  # OWNER:', text)
    assert re.search(r"labels: \{\}  # OWNER:", text)


def test_values_that_yaml_would_read_as_something_else_stay_text(tmp_path):
    rows = [{"text": f"text: {i} # {{}}", "label": ["no", "yes", "1", "null"][i % 4]} for i in range(60)]
    text = draft_contract(write(tmp_path, rows, "csv"), "no", [tmp_path])
    content = yaml.safe_load(text)
    assert content["labels"] == {"1": " 1", "no": " no", "null": " null", "yes": " yes"}
    assert content["task"] == "no"


@pytest.mark.parametrize("task", ["../x", "X", "", "a b", "a\n"])
def test_a_bad_task_name_is_refused(tmp_path, task):
    with pytest.raises(UserError, match="task name"):
        draft_contract(tmp_path / "a.csv", task, [tmp_path])


def test_data_that_cannot_be_drafted_from_is_refused_with_the_reason(tmp_path):
    def refused(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            draft_contract(tmp_path / name, "t", [tmp_path])
        return str(caught.value)

    assert "no known kind" in refused("a.xlsx", b"")
    assert "no rows" in refused("a.csv", b"text,label\n")
    assert "can be the text" in refused("b.csv", b"label\na\nb\n")
    assert "rename a column" in refused("c.csv", b"my.text,label\nhello there,a\nhow are you,b\n")
    assert "not a readable parquet" in refused("a.parquet", b"x")
    outside = tmp_path / "inner"
    outside.mkdir()
    with pytest.raises(UserError, match="outside the data roots"):
        draft_contract(tmp_path / "a.csv", "t", [outside])

"""The contract file: what is accepted, and one sentence naming file and field for what is not."""

import copy
from pathlib import Path

import pytest
import yaml

from data_contracts import TaskContract, UserError, load_contract
from data_contracts.contract import refuse_silent_change

GOOD = {
    "task": "product_reviews",
    "version": "1.0.0",
    "owner": "reviews@example.com",
    "description": "Sentiment of product-review sentences",
    "kind": "classification",
    "language": "en",
    "source": {
        "format": "parquet",
        "train": ["train.parquet"],
        "validation": {"from": "train", "fraction": 0.1},
        "test": ["test.parquet"],
    },
    "columns": {"id": "id", "text": "text", "answer": "label"},
    "prompt": "Review: {text}\nSentiment:",
    "labels": {"negative": " negative", "positive": " positive"},
    "metric": "accuracy",
    "licence": "MIT",
    "sensitivity": "public",
}
GENERATION = {"kind": "generation", "metric": "rouge_l", "labels": None}
MISSING = object()


def changed(changes: dict) -> dict:
    """GOOD with dotted keys set, or removed where the value is MISSING."""
    content = copy.deepcopy(GOOD)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = content
        for key in path:
            place = place.setdefault(key, {})
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    return content


def load(tmp_path: Path, changes: dict) -> TaskContract:
    file = tmp_path / "reviews.yaml"
    file.write_text(yaml.safe_dump(changed(changes)), encoding="utf-8")
    return load_contract(file)


def test_the_contract_of_the_design_loads(tmp_path):
    file = tmp_path / "reviews.yaml"
    file.write_text(
        """
task: product_reviews
version: 1.0.0
owner: reviews@example.com
description: Sentiment of product-review sentences
kind: classification
language: en
source: {format: parquet, train: [a.parquet], validation: {from: train, fraction: 0.1}, test: [b.parquet]}
columns: {id: id, text: text, answer: label}
prompt: "Review: {text}\\nSentiment:"
labels: {negative: " negative", neutral: " neutral", positive: " positive"}
metric: accuracy
answer_match: full
limits: {max_tokens: 256, max_answer_tokens: 16, too_long: reject, max_rejected_fraction: 0.01,
         min_rows: {train: 50, validation: 20, test: 20}}
rules: [{column: text, check: min_length, value: 3, severity: reject}]
licence: MIT
sensitivity: public
""",
        encoding="utf-8",
    )
    contract = load_contract(file)
    assert contract.prompt == "Review: {text}\nSentiment:"
    assert contract.source.validation.fraction == 0.1
    assert contract.limits.min_rows.test == 20
    assert contract.rules[0].code == "rule:min_length:text"
    assert contract.data_columns == ["id", "text", "label"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": "../escape"}, "task"),
        ({"task": "a" * 64}, "task"),
        ({"task": "Reviews"}, "task"),
        ({"task": "a/b"}, "task"),
        ({"task": "reviews\n"}, "task"),
        ({"version": 1.0}, "version"),
        ({"version": "1.0"}, "version"),
        ({"version": "01.0.0"}, "version"),
        ({"owner": " "}, "owner"),
        ({"owner": MISSING}, "owner"),
        ({"typo": 1}, "typo"),
        ({"limits.max_token": 3}, "limits.max_token"),
        ({"limits.max_tokens": "256"}, "limits.max_tokens"),
        ({"limits.max_rejected_fraction": float("nan")}, "limits.max_rejected_fraction"),
        ({"limits.min_rows": {"train": 0}}, "limits.min_rows.train"),
        ({"source.format": "xml"}, "source.format"),
        ({"source.train": []}, "source.train"),
        ({"source.train": "train.parquet"}, "source.train"),
        ({"source.validation": {"from": "test", "fraction": 0.1}}, "source.validation.from"),
        ({"source.validation": {"from": "train", "fraction": 1.5}}, "source.validation.fraction"),
        ({"source.test": {"from": "train", "fraction": 0.9}}, "source"),
        ({"columns.answer": "text"}, "columns"),
        ({"metric": "rouge_l"}, "metric"),
        ({"metric": "speed"}, "metric"),
        ({**GENERATION, "metric": "accuracy"}, "metric"),
        ({**GENERATION, "labels": {"a": " a", "b": " b"}}, "labels"),
        ({"labels": MISSING}, "labels"),
        ({"labels": {"a": " a"}}, "labels"),
        ({"labels": {"a": " same", "b": "same "}}, "labels"),
        ({"labels": {True: " yes", False: " no"}}, "labels"),
        ({"answer_match": "first_line"}, "answer_match"),
        ({"prompt": "{text.__class__}"}, "prompt"),
        ({"prompt": "{text[0]}"}, "prompt"),
        ({"prompt": "{text!r}"}, "prompt"),
        ({"prompt": "{text:>10}"}, "prompt"),
        ({"prompt": "{} {text}"}, "prompt"),
        ({"prompt": "{0} {text}"}, "prompt"),
        ({"prompt": "{text"}, "prompt"),
        ({"prompt": "no column"}, "prompt"),
        ({"prompt": "{text} {label}"}, "prompt"),
        ({"rules": [{"column": "text", "check": "regex", "value": "("}]}, "rules.0"),
        ({"rules": [{"column": "text", "check": "regex", "value": "a" * 501}]}, "rules.0"),
        ({"rules": [{"column": "text", "check": "min_length", "value": "3"}]}, "rules.0"),
        ({"rules": [{"column": "text", "check": "min_value", "value": True}]}, "rules.0"),
        ({"rules": [{"column": "text", "check": "allowed_values", "value": []}]}, "rules.0"),
        ({"rules": [{"column": "text", "check": "magic", "value": 1}]}, "rules.0.check"),
        ({"sensitivity": "secret"}, "sensitivity"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_file_and_field(tmp_path, changes, field):
    with pytest.raises(UserError) as caught:
        load(tmp_path, changes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'reviews.yaml'}: {field}"), message
    assert "\n" not in message


@pytest.mark.parametrize("task", ["a", "a" * 63, "t2_x"])
def test_task_names_of_one_to_63_characters_are_allowed(tmp_path, task):
    assert load(tmp_path, {"task": task}).task == task


def test_further_mistakes_are_named_too(tmp_path):
    with pytest.raises(UserError, match=r"owner: must not be empty \(mend also language, licence\)"):
        load(tmp_path, {"owner": "", "language": "", "licence": MISSING})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: [unclosed", "line 1"),
        (b"- a list", "mapping"),
        (b"", "mapping"),
        (b"task: \xff", "UTF-8"),
        (b"!!python/object/apply:os.system ['true']", "YAML"),
        (b"#" * 1_000_001, "too large"),
    ],
)
def test_a_file_that_is_no_contract_is_said_to_be_none(tmp_path, content, said):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"broken.yaml: .*{said}"):
        load_contract(file)


def test_a_small_file_of_nested_aliases_is_refused_at_once(tmp_path):
    file = tmp_path / "bomb.yaml"
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)]
    file.write_text("\n".join([*levels, "task: *a11"]), encoding="utf-8")
    with pytest.raises(UserError, match=r"bomb\.yaml: task: ") as caught:
        load_contract(file)
    assert len(str(caught.value)) < 1000


def test_a_missing_contract_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_contract(tmp_path / "nowhere.yaml")


def test_the_digest_depends_on_content_and_not_on_layout(tmp_path):
    first = load(tmp_path, {})
    file = tmp_path / "other.yaml"
    file.write_text("# a comment\n" + yaml.safe_dump(dict(reversed(GOOD.items())), width=30), encoding="utf-8")
    assert load_contract(file).digest == first.digest
    assert load(tmp_path, {"limits.max_tokens": 256}).digest == first.digest, "a default written out changes nothing"
    assert load(tmp_path, {"limits.max_tokens": 255}).digest != first.digest
    assert len(first.digest) == 64


def test_a_contract_cannot_be_altered(tmp_path):
    contract = load(tmp_path, {})
    with pytest.raises(ValueError, match="frozen"):
        contract.task = "other"


def test_every_column_the_contract_reads_is_listed_once(tmp_path):
    contract = load(
        tmp_path,
        {
            "prompt": "{title}: {text} {{literal}} {title}",
            "rules": [
                {"column": "stars", "check": "min_value", "value": 1},
                {"column": "text", "check": "max_length", "value": 10},
            ],
        },
    )
    assert contract.prompt_columns == ["title", "text"]
    assert contract.data_columns == ["id", "text", "label", "title", "stars"]


def test_labels_and_prompt_change_only_with_the_version(tmp_path):
    old = {"labels": dict(GOOD["labels"]), "prompt": GOOD["prompt"], "learned_as": "increment 1"}
    contract = load(tmp_path, {})
    refuse_silent_change(contract, version="1.0.0", **old)
    refuse_silent_change(load(tmp_path, {"prompt": "{text}!"}), version="0.9.0", **old)
    with pytest.raises(
        UserError, match=r"prompt changed under version 1\.0\.0.*increment 1.*raise the contract's version"
    ):
        refuse_silent_change(load(tmp_path, {"prompt": "{text}!"}), version="1.0.0", **old)
    with pytest.raises(UserError, match="labels changed"):
        refuse_silent_change(load(tmp_path, {"labels": {"a": " a", "b": " b"}}), version="1.0.0", **old)

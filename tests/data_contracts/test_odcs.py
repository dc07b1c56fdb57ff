"""The export is valid by the standard's own JSON schema."""

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from data_contracts import TaskContract, load_contract
from data_contracts.odcs import to_odcs

TASKS = sorted((Path(__file__).resolve().parents[2] / "data_contracts" / "tasks").glob("*.yaml"))
GENERATION = TaskContract.model_validate(
    {
        "task": "summaries",
        "version": "1.0.0",
        "owner": "o@example.com",
        "description": "d",
        "kind": "generation",
        "language": "de",
        "source": {
            "format": "jsonl",
            "train": ["s3://bucket/train/*.jsonl", "extra.jsonl"],
            "validation": {"from": "train", "fraction": 0.1},
            "test": ["gs://bucket/test.jsonl"],
        },
        "columns": {"id": "key", "text": "body", "answer": "summary"},
        "prompt": "{title}\n{body}\nIn short:",
        "metric": "rouge_l",
        "answer_match": "first_line",
        "rules": [
            {"column": "stars", "check": "min_value", "value": 1},
            {"column": "body", "check": "regex", "value": "^.", "severity": "warn"},
            {"column": "title", "check": "allowed_values", "value": ["a", 1]},
        ],
        "licence": "CC-BY",
        "sensitivity": "personal",
    }
)


def validate(document: dict) -> None:
    schema = json.loads((resources.files("open_data_contract_standard") / "schema.json").read_text(encoding="utf-8"))
    checker = jsonschema.Draft201909Validator
    checker.check_schema(schema)
    checker(schema, format_checker=checker.FORMAT_CHECKER).validate(document)


def test_the_schema_refuses_a_broken_document():
    broken = to_odcs(GENERATION)
    broken["schema"][0]["properties"][0]["colour"] = "red"
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


@pytest.mark.parametrize("contract", [GENERATION, *map(load_contract, TASKS)], ids=lambda contract: contract.task)
def test_the_export_is_valid_odcs_3_1(contract):
    document = to_odcs(contract)
    validate(document)
    assert document["apiVersion"] == "v3.1.0"
    assert json.loads(json.dumps(document)) == document, "plain JSON values only"


def test_the_export_keeps_what_the_contract_says():
    document = to_odcs(GENERATION)
    properties = {entry["name"]: entry for entry in document["schema"][0]["properties"]}
    custom = {entry["property"]: entry["value"] for entry in document["customProperties"]}
    assert list(properties) == ["key", "body", "summary", "title", "stars"]
    assert properties["key"]["primaryKey"] is True
    assert properties["stars"]["logicalType"] == "number"
    assert properties["stars"]["required"] is False
    assert properties["body"]["quality"][1]["implementation"] == {"check": "regex", "value": "^."}
    assert properties["body"]["quality"][1]["severity"] == "warning"
    assert properties["body"]["classification"] == "personal"
    assert [server["type"] for server in document["servers"]] == ["s3", "local", "custom"]
    assert custom["prompt"] == "{title}\n{body}\nIn short:"
    assert custom["splits"]["validation"] == {"from": "train", "fraction": 0.1}
    assert custom["contractDigest"] == GENERATION.digest
    assert document["team"]["members"][0]["username"] == "o@example.com"

"""A contract in the words of the Open Data Contract Standard (ODCS), for catalogues and other tools."""

from typing import Any

from data_contracts.contract import SPLITS, Rule, TaskContract, TrainShare

API_VERSION = "v3.1.0"
_ENGINE = "perennial"


def to_odcs(contract: TaskContract) -> dict[str, Any]:
    """The contract as an ODCS v3.1.0 document of plain JSON values.

    What the standard has no words for (prompt, label texts, metric, limits, splits) stands in `customProperties`.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": "DataContract",
        "id": f"{_ENGINE}-{contract.task}",
        "name": contract.task,
        "version": contract.version,
        "status": "active",
        "description": {
            "purpose": contract.description,
            "usage": f"Teach and judge a language model on the {contract.kind} task {contract.task}.",
            "limitations": f"Licence: {contract.licence}. Sensitivity: {contract.sensitivity}.",
        },
        "tags": [contract.kind, contract.language],
        "team": {"members": [{"username": contract.owner, "role": "owner"}]},
        "servers": _servers(contract),
        "schema": [
            {
                "name": contract.task,
                "logicalType": "object",
                "physicalType": "file",
                "properties": [_property(contract, name) for name in contract.data_columns],
                "quality": [_row_count(contract)],
            }
        ],
        "customProperties": _custom(contract),
    }


def _servers(contract: TaskContract) -> list[dict[str, Any]]:
    servers = []
    for split in SPLITS:
        source = getattr(contract.source, split)
        for number, place in enumerate(() if isinstance(source, TrainShare) else source, start=1):
            server: dict[str, Any] = {"server": f"{split}-{number}", "format": contract.source.format}
            if place.startswith("s3://"):
                server |= {"type": "s3", "location": place}
            elif "://" in place:
                server |= {"type": "custom", "location": place}
            else:
                server |= {"type": "local", "path": place}
            servers.append(server)
    return servers


def _property(contract: TaskContract, name: str) -> dict[str, Any]:
    columns = contract.columns
    required = name in (columns.id, columns.answer, *contract.prompt_columns)
    rules = [rule for rule in contract.rules if rule.column == name]
    is_number = name not in (columns.id, columns.text, columns.answer) and any(
        rule.check in ("min_value", "max_value") for rule in rules
    )
    content: dict[str, Any] = {
        "name": name,
        "logicalType": "number" if is_number else "string",
        "required": required,
        "classification": contract.sensitivity,
    }
    quality: list[dict[str, Any]] = []
    if name == columns.id:
        content |= {"primaryKey": True, "primaryKeyPosition": 1, "unique": True}
        quality.append(_none_of("duplicateValues", "No id occurs twice in a split.", "uniqueness"))
    if name == columns.text:
        quality.append(_none_of("missingValues", "No text is empty.", "completeness", missingValues=[None, ""]))
    if name == columns.answer and contract.labels is not None:
        valid = list(contract.labels)
        quality.append(_none_of("invalidValues", "Every answer is a label.", "conformity", validValues=valid))
    quality += [_rule(rule) for rule in rules]
    return content | ({"quality": quality} if quality else {})


def _none_of(metric: str, description: str, dimension: str, **arguments: Any) -> dict[str, Any]:
    quality = {"type": "library", "metric": metric, "mustBe": 0, "description": description, "dimension": dimension}
    return quality | ({"arguments": arguments} if arguments else {}) | {"unit": "rows", "severity": "error"}


def _rule(rule: Rule) -> dict[str, Any]:
    """A rule as the engine runs it: its regular expressions are RE2 and its lengths count characters."""
    value = list(rule.value) if isinstance(rule.value, tuple) else rule.value
    return {
        "type": "custom",
        "engine": _ENGINE,
        "implementation": {"check": rule.check, "value": value},
        "description": f"{rule.check} of {rule.column}",
        "severity": "error" if rule.severity == "reject" else "warning",
    }


def _row_count(contract: TaskContract) -> dict[str, Any]:
    needed = contract.limits.min_rows
    return {
        "type": "library",
        "metric": "rowCount",
        "mustBeGreaterOrEqualTo": needed.train + needed.validation + needed.test,
        "description": "Usable rows of all splits.",
        "dimension": "completeness",
        "severity": "error",
    }


def _custom(contract: TaskContract) -> list[dict[str, Any]]:
    plain = contract.model_dump(mode="json", by_alias=True)
    properties = {
        "kind": plain["kind"],
        "language": plain["language"],
        "columns": plain["columns"],
        "splits": {split: plain["source"][split] for split in SPLITS},
        "prompt": plain["prompt"],
        "labels": plain["labels"],
        "metric": plain["metric"],
        "answerMatch": plain["answer_match"],
        "limits": plain["limits"],
        "licence": plain["licence"],
        "sensitivity": plain["sensitivity"],
        "contractDigest": contract.digest,
    }
    return [{"property": name, "value": value} for name, value in properties.items() if value is not None]

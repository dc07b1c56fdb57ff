"""What a finished stream says, as the record that a cell keeps.

Answers are kept row by row, so that intervals can be computed later without a new run: of a classification task a
string with a character a row, the label's place in `ALPHABET`; of a generation task a list of the rows' scores in
thousandths. Rows stand in the order of their ids.
"""

import json
import string
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

from pipeline.benchmarks.quality.cells import FORMAT, Cell
from pipeline.benchmarks.quality.launch import AGAIN, AHEAD, WORK, total_seconds
from pipeline.evaluation import metrics
from pipeline.evaluation.review_cost import decided
from pipeline.experts.bank import Bank
from pipeline.increments import without_router
from pipeline.review import read_review
from pipeline.tracking.chain import load_chain
from pipeline.tracking.history import take_over
from pipeline.tracking.manifest import ROUTER, Manifest

ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase
Answers = str | list[int]
_REVIEW = ("target_precision", "thresholds", "validation", "test")  # kept of a task's review record


def collect(cell: Cell, folder: Path) -> dict[str, Any]:
    """The record of a cell whose stream is learned."""
    work_dir = folder / WORK
    manifests = sorted(load_chain(work_dir), key=lambda manifest: manifest.increment)
    tasks = [manifest.task for manifest in manifests]
    last = read_predictions(work_dir, manifests[-1])
    texts = {sample.task.name: {r["id"]: r["text"] for r in sample.splits["test"]} for sample in cell.samples.values()}
    contracts = {contract["task"]: contract for contract in cell.contracts().values()}
    rows = {task: sorted(table) for task, table in last.items()}
    record = {
        "format": FORMAT,
        "digest": cell.digest,
        "suite": cell.suite,
        "setting": cell.setting.name,
        "order": cell.order,
        "tasks": tasks,
        "deciding": {key: value for key, value in cell.deciding.items() if key != "contracts"},
        "kinds": {task: [contracts[task]["kind"], contracts[task]["metric"]] for task in tasks},
        "labels": {task: list(contracts[task]["labels"] or ()) for task in tasks},
        "R": [[manifest.row.get(task) for task in tasks] for manifest in manifests],
        "R_validation": [[manifest.validation_row.get(task) for task in tasks] for manifest in manifests],
        "references": {
            task: encode_labels(contracts[task], [last[task][row]["reference"] for row in rows[task]])
            for task in tasks
            if contracts[task]["kind"] == "classification"
        },
        "kept_rows": {m.task: {split: record.kept for split, record in m.data.items()} for m in manifests},
        "retention": [m.gate["retention"] for m in manifests],
        "steps": [m.training["steps"] for m in manifests],
        "versions": manifests[-1].versions,
        "ranks": cell.options.ranks,
        "wall_seconds": round(total_seconds(folder), 1),
        **cost(work_dir, manifests),
    }
    ahead, again = read_answers(work_dir / AHEAD), read_answers(work_dir / AGAIN)
    answers, subset = [], {task: mask(rows[task], own) for task, own in again.items()}
    for manifest in manifests:
        table = last if manifest is manifests[-1] else read_predictions(work_dir, manifest)
        answers.append({task: encode(contracts[task], own, texts[task]) for task, own in table.items()})
        if manifest is not manifests[-1]:
            subset |= {task: mask(rows[task], own) for task, own in table.items()}
    beside = {
        name: {task: encode(contracts[task], own, texts[task]) for task, own in table.items()}
        for name, table in (("answers_ahead", ahead), ("answers_again", again))
    }
    if manifests[-1].row_inferred:
        record["R_inferred"] = [[manifest.row_inferred.get(task) for task in tasks] for manifest in manifests]
    if reviews := read_review(work_dir, manifests[-1]):
        record["review"] = {task: {key: own[key] for key in _REVIEW} for task, own in reviews.items()}
        record["decided"] = {task: decided_rows(last[task], own["thresholds"]) for task, own in reviews.items()}
    return {**record, **beside, "answers": answers, "stream_rows": subset}


def decided_rows(rows: dict[str, dict[str, Any]], thresholds: dict[str, float | None]) -> str:
    """Which rows the model may decide by itself, a 0 or 1 a row in the order of the row ids."""
    own = [rows[row] for row in sorted(rows)]
    alone = decided([row["answer"] for row in own], [row["score"] for row in own], thresholds)
    return "".join("01"[int(one)] for one in alone)


def mask(rows: list[str], measured: dict[str, Any]) -> str:
    """Which of the rows were measured, a 0 or 1 a row."""
    return "".join("01"[row in measured] for row in rows)


def read_predictions(work_dir: Path, manifest: Manifest) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and row id the answer the reference and the score on test after an increment."""
    return read_answers(work_dir / "increments" / manifest.folder / "predictions")


def read_answers(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The same from a folder with a file a task."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["row_id", "answer", "reference", "score"]).to_pylist()
        found[path.stem] = {row["row_id"]: row for row in table}
    return found


def encode(contract: dict[str, Any], rows: dict[str, dict[str, str]], texts: dict[str, str]) -> Answers:
    """The answers of a task in the order of the row ids: label characters, or scores in thousandths."""
    ids = sorted(rows)
    if contract["kind"] == "classification":
        return encode_labels(contract, [rows[row]["answer"] for row in ids])
    match = contract.get("answer_match", "full")
    scores = [
        metrics.score(
            contract["metric"],
            [rows[row]["answer"]],
            [rows[row]["reference"]],
            answer_match=match,
            sources=[texts[row]],
        )
        for row in ids
    ]
    return [round(1000 * score) for score in scores]


def encode_labels(contract: dict[str, Any], names: list[str]) -> str:
    """One character a label."""
    place = {name: ALPHABET[index] for index, name in enumerate(contract["labels"])}
    return "".join(place[name] for name in names)


def cost(work_dir: Path, manifests: list[Manifest]) -> dict[str, Any]:
    """Parameters and bytes by increment, and seconds by part over all of them.

    `trained_parameters` are those of the experts and gates an increment publishes; `published_bytes` what it adds to
    the bank; `served_bytes` all files that some task is served with, or that the method carries on, after it. The task
    router, which is no method's, is in none of them.
    """
    bank = Bank(work_dir / "bank")
    size = {sha: bank.path(sha).stat().st_size for manifest in manifests for sha in manifest.bank.values()}
    parameters, published, served, seconds = [], [], [], {}
    seen: set[str] = set()
    bundles: dict[str, dict[str, str]] = {}
    state: dict[str, dict[str, str]] = {}
    for manifest in manifests:
        take_over(bundles, state, manifest)
        own = {name: sha for name, sha in manifest.bank.items() if name != ROUTER}
        new = {sha for sha in own.values() if sha not in seen}
        seen |= new
        published.append(sum(size[sha] for sha in new))
        named = {
            sha for table in (bundles, without_router(state)) for of_task in table.values() for sha in of_task.values()
        }
        served.append(sum(size[sha] for sha in named))
        experts = {sha for name, sha in own.items() if name != "state"}
        parameters.append(sum(num_elements(bank.path(sha)) for sha in experts))
        run = json.loads((work_dir / "increments" / manifest.folder / "run.json").read_text(encoding="utf-8"))
        for part, value in run["seconds"].items():
            seconds[part] = round(seconds.get(part, 0.0) + value, 1)
    return {
        "trained_parameters": parameters,
        "published_bytes": published,
        "served_bytes": served,
        "seconds": seconds,
    }


def num_elements(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    total = 0
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            count = 1
            for length in file.get_slice(name).get_shape():
                count *= length
            total += count
    return total

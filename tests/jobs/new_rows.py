"""New rows for jobs/predict.py, good and bad, and the commands that answer them or compute rows of R again."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tests.jobs.launch import Case
from tests.jobs.streams import TASKS, Learned

# what is wrong with each bad row of the new data, and the reason code it must get; nothing is dropped
BAD = {
    "blank": ({"id": "blank", "text": " \t "}, "empty_text"),
    "null": ({"id": "null", "text": None}, "null"),
    "long": ({"id": "long", "text": "word " * 200}, "too_long"),
}
BAD_JSON = {
    "absent": ({"id": "absent"}, "null"),
    "number": ({"id": "number", "text": 7}, "wrong_type"),
}


def reading_commands(learned: Learned, data: dict[str, Path], out: Path) -> dict[str, Case]:
    """Commands that read the learned work_dir and write below `out`; the last ones are mistakes."""
    work_dir = ("--work-dir", learned.work_dir)

    def predict(task: str, source: Path | str, target: str, *more: str) -> Case:
        return Case("predict", [*work_dir, "--task", task, "--data", source, "--out", out / target, *more])

    return {
        "first": predict("first", data["first"], "first.parquet"),
        "second": predict("second", data["second"], "second.csv"),
        "third": predict("third", data["third"], "third.jsonl"),
        "bad.parquet": predict("first", data["bad.parquet"], "bad.parquet.parquet"),
        "bad.jsonl": predict("first", data["bad.jsonl"], "bad.jsonl.parquet"),
        "without_ids": predict("first", data["without_ids"], "without_ids.parquet"),
        "then": predict("first", data["first"], "then.parquet", "--increment", "1"),
        "row": Case("evaluate", work_dir),
        "row_1": Case("evaluate", [*work_dir, "--increment", "1"]),
        "cell": Case("evaluate", [*work_dir, "--task", "second"]),
        "too_early": predict("second", data["second"], "no.parquet", "--increment", "1"),
        "no_increment": predict("first", data["first"], "no.parquet", "--increment", "9"),
        "no_task": predict("fourth", data["first"], "no.parquet"),
        "no_file": predict("first", "nowhere.csv", "no.parquet"),
        "no_column": predict("first", data["without_text"], "no.parquet"),
        "no_format": predict("first", data["first"], "no.txt"),
        "no_work_dir": Case("evaluate", ["--work-dir", out / "empty"]),
        "no_cell": Case("evaluate", [*work_dir, "--task", "fourth"]),
    }


def write_new_rows(learned: Learned, folder: Path) -> dict[str, Path]:
    """New rows: the test splits without their answers in three formats, and bad rows among seven good ones."""
    folder.mkdir()
    files = {}
    for task, suffix in zip(TASKS, (".parquet", ".csv", ".jsonl"), strict=True):
        table = pq.read_table(learned.inputs.root / task / "test.parquet").drop_columns(["label"])
        files[task] = folder / f"{task}{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, files[task])
        elif suffix == ".csv":
            pyarrow.csv.write_csv(table, files[task])
        else:
            write_lines(files[task], table.to_pylist())
    good = pq.read_table(learned.inputs.root / "first" / "test.parquet").drop_columns(["label"]).to_pylist()[:7]
    bad = [row for row, _ in BAD.values()]
    files["bad.parquet"] = folder / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([*good[:3], *bad, *good[3:]]), files["bad.parquet"])
    files["bad.jsonl"] = folder / "bad.jsonl"
    write_lines(files["bad.jsonl"], [*bad, *good, *(row for row, _ in BAD_JSON.values())])
    with open(files["bad.jsonl"], "ab") as file:
        file.write(b'{"id": "cut", "text": "An open\n{"id": "latin", "text": "caf\xe9"}\n')
    files["without_ids"] = folder / "without_ids.csv"
    with open(files["without_ids"], "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in good)])
    files["without_text"] = folder / "without_text.csv"
    files["without_text"].write_text("id,body\n1,Hello there\n")
    return files


def write_lines(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

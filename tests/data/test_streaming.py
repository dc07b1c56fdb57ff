"""Data read in batches against a row-by-row oracle of plain ifs and sets: same rows, reasons, counts and digests."""

import csv
import hashlib
import io
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts import TaskContract, readers
from pipeline.data import check_split, raw_rows
from pipeline.data.ingest import examine
from tests.data.test_token_limits import tokenizer

NAMES = ("id", "text", "title", "label", "stars")
LABELS = {"bad": "no", "good": "yes!"}
PIECES = (
    "a",
    "B",
    "b",
    "Straße",
    "STRASSE",
    "\t",
    "\u00a0",
    "\x1c",
    'say "hi"',
    "back\\slash",
    "日本",
    "two\nlines",
    "\x01",
)
MAX_TOKENS, MAX_STARS, MIN_LENGTH = 24, 4, 2


def contract(file_format: str, shares: bool, with_id: bool) -> TaskContract:
    ends = {split: [f"{split}.{file_format}"] for split in ("validation", "test")}
    if shares:
        ends = {"validation": {"from": "train", "fraction": 0.25}, "test": {"from": "train", "fraction": 0.25}}
    rules = [
        {"column": "text", "check": "min_length", "value": MIN_LENGTH},
        {"column": "stars", "check": "max_value", "value": MAX_STARS, "severity": "warn"},
    ]
    limits = {"max_tokens": MAX_TOKENS, "max_answer_tokens": 4, "max_rejected_fraction": 1.0}
    content = {
        "task": "t",
        "version": "1.0.0",
        "owner": "o",
        "description": "d",
        "kind": "classification",
        "language": "en",
        "source": {"format": file_format, "train": [f"train.{file_format}", f"more.{file_format}"], **ends},
        "columns": {"text": "text", "answer": "label"} | ({"id": "id"} if with_id else {}),
        "prompt": "{title}: {text}\n",
        "labels": LABELS,
        "metric": "accuracy",
        "limits": limits | {"min_rows": {"train": 1, "validation": 1, "test": 1}},
        "rules": rules,
        "licence": "l",
        "sensitivity": "public",
    }
    return TaskContract.model_validate(content)


def random_row(draw: random.Random) -> dict[str, str | None]:
    return {
        "id": str(draw.randrange(300)) if draw.random() < 0.95 else None,
        "text": draw.choice([" ".join(draw.choices(PIECES, k=draw.randint(1, 4)))] * 12 + ["", " ", None]),
        "title": draw.choice(["t", "t", "T", "u", None if draw.random() < 0.2 else "v"]),
        "label": draw.choice(["bad", "good"] * 8 + ["ugly", None]),
        "stars": draw.choice(["1", "4.0", "5", "x"]),
    }


def write_file(path: Path, rows: list[dict], draw: random.Random) -> list[tuple[int, dict | None, bytes]]:
    """Write rows and some lines that are no rows; (line, row, bytes) of each row as the file has it."""
    if path.suffix == ".parquet":
        schema = pa.schema([(name, pa.string()) for name in NAMES])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=draw.choice([13, 1000]))
        return [(number, row, b"") for number, row in enumerate(rows, start=1)]
    found: list[tuple[int, dict | None, bytes]] = []
    content = b"" if path.suffix == ".jsonl" else ",".join(NAMES).encode() + b"\n"
    for row in rows:
        line = content.count(b"\n") + 1
        if path.suffix == ".jsonl":
            broken = draw.random() < 0.05
            written = b"{ broken\n" if broken else json.dumps(row, ensure_ascii=False).encode() + b"\n"
            found.append((line, None if broken else row, written))
        elif draw.random() < 0.05:
            written = b"too,few\n"
            found.append((line, None, b"too\x1ffew"))
        else:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow(row.values())
            written = text.getvalue().encode()
            found.append((line, {name: value or "" for name, value in row.items()}, b""))
        content += written + b"\n" * (draw.random() < 0.05)
    path.write_bytes(content)
    return found


def digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def same(text: str) -> str:
    return " ".join(text.split()).casefold()


def blank(value: str | None) -> bool:
    return value is None or not value.strip()


def oracle(checked: TaskContract, files: dict[str, list[tuple[str, int, dict | None, bytes]]]) -> dict:
    """What `examine` must find, row by row."""
    with_id = checked.columns.id is not None
    shares = "validation" not in files
    splits: dict[str, list] = {"train": [], "validation": [], "test": []}
    for split, rows in files.items():
        for row in rows:
            owner = split
            if shares and row[2] is not None and row[2]["text"] is not None:
                place = int(hashlib.sha256(same(row[2]["text"]).encode()).hexdigest()[:13], 16) / 16**13
                owner = "test" if place < 0.25 else "validation" if place < 0.5 else "train"
            splits[owner].append(row)
    names = [name for name in ("id", "text", "label", "title", "stars") if with_id or name != "id"]
    kept_texts: dict[str, set[str]] = {}
    leaks: Counter[str] = Counter()
    kept: dict[str, list] = {}
    rejected: dict[str, list] = {}
    warned: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {}
    for split in ("test", "validation", "train"):
        ids, texts, kept_texts[split] = set(), set(), set()
        kept[split], rejected[split], lengths[split] = [], [], []
        for number, (file, line, row, content) in enumerate(splits[split], start=1):
            reason = None
            if row is None:
                reason = "malformed"
            elif blank(row["label"]) or (with_id and blank(row["id"])) or None in (row["title"], row["text"]):
                reason = "null"
            elif not row["text"].strip():
                reason = "empty_text"
            elif row["label"] not in LABELS:
                reason = "unknown_label"
            elif len(row["text"]) < MIN_LENGTH:
                reason = "rule:min_length:text"
            else:
                prompt = f"{row['title']}: {row['text']}\n"
                length = len(prompt) + len(LABELS[row["label"]]) + 1
                if length > MAX_TOKENS:
                    reason = "too_long"
                elif with_id and row["id"] in ids:
                    reason = "duplicate_id"
                else:
                    ids.add(row["id"])
                    if same(prompt) in texts:
                        reason = "duplicate_text"
                    else:
                        texts.add(same(prompt))
                        for winner in ("test", "validation"):
                            if winner != split and reason is None and same(prompt) in kept_texts.get(winner, ()):
                                reason = "leak"
                                leaks[f"{split} in {winner}"] += 1
            if reason is not None:
                values = hashlib.sha256(content).hexdigest() if row is None else digest([row[name] for name in names])
                rejected[split].append((file, line, split, reason, values))
                continue
            kept_texts[split].add(same(prompt))
            lengths[split].append(length)
            warned[split] += row["stars"] in ("5", "x")
            row_id = row["id"] if with_id else f"{split}-{number}"
            kept[split].append((row_id, row["text"], prompt, row["label"], digest([row_id, prompt, row["label"]])))
    return {
        "kept": kept,
        "quarantine": rejected["train"] + rejected["validation"] + rejected["test"],
        "rows_in": {split: len(rows) for split, rows in splits.items()},
        "leaks": dict(leaks),
        "warned": {split: {"rule:max_value:stars": warned[split]} if warned[split] else {} for split in splits},
        "tokens": {
            split: tuple(sorted(found)[-(-(len(found) - 1) * percent // 100)] for percent in (0, 50, 95, 100))
            for split, found in lengths.items()
        },
    }


@pytest.mark.parametrize(("batch_rows", "piece_bytes"), [(7, 1 << 25), (100_000, 1 << 25), (100, 300)])
@pytest.mark.parametrize(
    ("file_format", "shares", "with_id"),
    [
        ("parquet", False, True),
        ("parquet", True, False),
        ("jsonl", False, False),
        ("csv", True, True),
        ("csv", False, True),
    ],
)
def test_random_files_get_the_verdict_of_a_row_by_row_reading(
    tmp_path, monkeypatch, file_format, shares, with_id, batch_rows, piece_bytes
):
    monkeypatch.setattr(readers, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(raw_rows, "PIECE_BYTES", piece_bytes)
    draw = random.Random(f"{file_format}{shares}{with_id}")
    files: dict[str, list] = {}
    for split, name, count in (
        ("train", "train", 260),
        ("train", "more", 70),
        ("validation",) * 2 + (90,),
        ("test",) * 2 + (80,),
    ):
        if not shares or split == "train":
            file = tmp_path / f"{name}.{file_format}"
            rows = write_file(file, [random_row(draw) for _ in range(count)], draw)
            files.setdefault(split, []).extend((file.name, *row) for row in rows)
    checked = contract(file_format, shares, with_id)
    expected = oracle(checked, files)
    task = examine(checked, [tmp_path], tokenizer=tokenizer(), quarantine_dir=tmp_path / "quarantine")

    for split, table in task.splits.items():
        assert [tuple(row.values()) for row in table.to_pylist()] == expected["kept"][split]
        counts = task.verdict.splits[split]
        reasons = Counter(row[3] for row in expected["quarantine"] if row[2] == split)
        assert counts.rows_in == expected["rows_in"][split]
        assert list(counts.rejected.items()) == sorted(reasons.items())
        assert counts.warned == expected["warned"][split]
        assert counts.labels == {name: sum(row[3] == name for row in expected["kept"][split]) for name in LABELS}
        assert (counts.tokens.min, counts.tokens.median, counts.tokens.p95, counts.tokens.max) == expected["tokens"][
            split
        ]
        every = b"".join(bytes.fromhex(row[4]) for row in expected["kept"][split])
        assert task.data_digests[split] == hashlib.sha256(every).hexdigest()
    assert [tuple(row.values()) for row in pq.read_table(task.quarantine).to_pylist()] == expected["quarantine"]
    assert task.verdict.leaks == expected["leaks"]
    by_right = sorted(expected["quarantine"], key=lambda row: ("test", "validation", "train").index(row[2]))
    for code, places in task.verdict.examples.items():
        assert places == [f"{row[0]} line {row[1]}" for row in by_right if row[3] == code][:3]
    wanted = {"null", "empty_text", "unknown_label", "rule:min_length:text", "too_long", "duplicate_text"}
    assert wanted <= set(task.verdict.examples) and expected["warned"]["train"]
    assert shares or expected["leaks"]


def test_memory_grows_by_at_most_64_bytes_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_ROWS", 2_000)
    held: list[int] = []

    class Watched(check_split._SplitChecks):
        def check(self, left) -> None:
            super().check(left)
            held.append(pa.total_allocated_bytes())

    monkeypatch.setattr(check_split, "_SplitChecks", Watched)

    def peak(count: int) -> int:
        for name, rows in (("train", count), ("more", 10), ("validation", count // 2), ("test", count // 2)):
            columns = {
                "id": [f"{name} {i}" for i in range(rows)],
                "text": [f"{name} number {i}, a text of some length" for i in range(rows)],
                "title": ["t"] * rows,
                "label": ["bad", "good"] * (rows // 2),
                "stars": ["1"] * rows,
            }
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=2_000)
        del columns
        held.clear()
        started = pa.total_allocated_bytes()
        tracemalloc.start()
        task = examine(contract("parquet", False, True), [tmp_path])
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert task.verdict.kept == 2 * count + 10
        return traced + max(held) - started

    rows = 12_000, 36_000
    slope = (peak(rows[1]) - peak(rows[0])) / (2 * (rows[1] - rows[0]))
    assert slope <= 64, f"{slope:.1f} bytes a row"

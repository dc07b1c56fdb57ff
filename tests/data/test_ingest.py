"""From files to clean rows: nothing is lost, nothing leaks, and what is rejected is accounted for."""

import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts import TaskContract, UserError
from data_contracts.verdict import DataRejected
from pipeline.data.ingest import examine, ingest, source_digests

SOURCE = {"format": "parquet", "train": ["train.parquet"], "validation": ["val.parquet"], "test": ["test.parquet"]}
SHARED = {"format": "parquet", "train": ["train.parquet"]} | {
    "validation": {"from": "train", "fraction": 0.2},
    "test": {"from": "train", "fraction": 0.3},
}
LENIENT = {"max_rejected_fraction": 1.0, "min_rows": {"train": 1, "validation": 1, "test": 1}}


def contract(**changes) -> TaskContract:
    content = {
        "task": "reviews",
        "version": "1.0.0",
        "owner": "o",
        "description": "d",
        "kind": "classification",
        "language": "en",
        "source": SOURCE,
        "columns": {"id": "id", "text": "text", "answer": "label"},
        "prompt": "Review: {text}\nSentiment:",
        "labels": {"bad": " bad", "good": " good"},
        "metric": "accuracy",
        "limits": LENIENT,
        "licence": "l",
        "sensitivity": "personal",
    }
    return TaskContract.model_validate(content | changes)


def rows(*texts: str | None, split: str) -> list[dict]:
    return [{"id": f"{split}{i}", "text": text, "label": ["bad", "good"][i % 2]} for i, text in enumerate(texts)]


def write(folder, **splits) -> None:
    for name, content in splits.items():
        schema = pa.schema({"id": pa.string(), "text": pa.string(), "label": pa.string()})
        pq.write_table(pa.Table.from_pylist(content, schema=schema), folder / f"{name}.parquet")


def test_clean_rows_have_prompt_answer_and_digest(tmp_path):
    write(tmp_path, train=rows("a b", "c", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    task = ingest(contract(), [tmp_path])
    digest = hashlib.sha256(b'["t0","Review: a b\\nSentiment:","bad"]').hexdigest()
    assert task.splits["train"].slice(0, 1).to_pylist() == [
        {"row_id": "t0", "text": "a b", "prompt": "Review: a b\nSentiment:", "answer": "bad", "row_sha256": digest}
    ]
    assert list(task.splits) == ["train", "validation", "test"]
    both = [bytes.fromhex(value) for value in task.splits["train"].column("row_sha256").to_pylist()]
    assert task.data_digests["train"] == hashlib.sha256(b"".join(both)).hexdigest()
    assert task.file_digests["val.parquet"] == hashlib.sha256((tmp_path / "val.parquet").read_bytes()).hexdigest()
    assert source_digests(contract(), [tmp_path]) == task.file_digests
    assert task.quarantine is None
    assert task.verdict.passed


def test_rows_without_an_id_column_are_named_by_split_and_place(tmp_path):
    write(tmp_path, train=rows("a", None, "b", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    task = ingest(contract(columns={"text": "text", "answer": "label"}), [tmp_path])
    assert task.splits["train"].column("row_id").to_pylist() == ["train-1", "train-3"]
    assert task.splits["test"].column("row_id").to_pylist() == ["test-1"]


def test_test_wins_over_validation_and_validation_over_train(tmp_path):
    write(
        tmp_path,
        train=rows("only train", "In  Test", "in validation", "in all", split="t"),
        val=rows("in\tvalidation ", "IN ALL", "only validation", "straße", split="v"),
        test=rows("in test", "in all", "STRASSE", split="e"),
    )
    task = ingest(contract(), [tmp_path])
    kept = {name: table.column("row_id").to_pylist() for name, table in task.splits.items()}
    assert kept == {"train": ["t0"], "validation": ["v0", "v2"], "test": ["e0", "e1", "e2"]}
    assert task.verdict.leaks == {"validation in test": 2, "train in test": 2, "train in validation": 1}
    assert task.verdict.splits["train"].rejected == {"leak": 3}


def test_a_rejected_test_row_does_not_cost_the_train_row_with_its_text(tmp_path):
    bad = [{"id": "e9", "text": "shared", "label": "unheard of"}]
    write(tmp_path, train=rows("shared", split="t"), val=rows("d", split="v"), test=rows("e", split="e") + bad)
    task = ingest(contract(), [tmp_path])
    assert task.splits["train"].column("row_id").to_pylist() == ["t0"]
    assert task.verdict.splits["test"].rejected == {"unknown_label": 1}


def test_the_first_of_equal_ids_and_texts_wins_across_files(tmp_path):
    source = SOURCE | {"train": ["train.parquet", "more.parquet"]}
    more = [{"id": "t0", "text": "other", "label": "bad"}, {"id": "m1", "text": " A ", "label": "bad"}]
    write(tmp_path, train=rows("a", split="t"), more=more, val=rows("d", split="v"), test=rows("e", split="e"))
    task = ingest(contract(source=source), [tmp_path], quarantine_dir=tmp_path / "quarantine")
    assert task.splits["train"].column("row_id").to_pylist() == ["t0"]
    found = pq.read_table(task.quarantine).select(["file", "line", "split", "reason"]).to_pylist()
    assert found == [
        {"file": "more.parquet", "line": 1, "split": "train", "reason": "duplicate_id"},
        {"file": "more.parquet", "line": 2, "split": "train", "reason": "duplicate_text"},
    ]


def test_the_quarantine_names_places_and_reasons_and_holds_no_text(tmp_path):
    write(tmp_path, train=rows("a", "very secret", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    rule = {"column": "text", "check": "max_length", "value": 5}
    strict = contract(rules=[rule], limits=LENIENT | {"max_rejected_fraction": 0.1})
    with pytest.raises(DataRejected, match=r"1 of 4 rows were rejected \(25\.0%; 1 rule:max_length:text\)"):
        ingest(strict, [tmp_path], quarantine_dir=tmp_path / "quarantine")
    (file,) = (tmp_path / "quarantine" / "reviews").iterdir()
    table = pq.read_table(file)
    assert table.column_names == ["file", "line", "split", "reason", "row_sha256"]
    digest = hashlib.sha256(b'["t1","very secret","good"]').hexdigest()
    place = {"file": "train.parquet", "line": 2, "split": "train", "reason": "rule:max_length:text"}
    assert table.to_pylist() == [place | {"row_sha256": digest}]
    assert b"secret" not in file.read_bytes()


def test_rows_in_are_kept_plus_quarantined_for_random_dirt(tmp_path):
    draw = random.Random(3)
    for number in range(5):
        lines = []
        for i in range(120):
            row = {"id": draw.choice([i, None, 0, [1]]), "text": draw.choice([f"text {i}", "Same", "", None, 3])}
            line = json.dumps(row | {"label": draw.choice(["bad", "good", "ugly", None])}).encode()
            lines.append(draw.choice([line, line, line, b"{", b'{"text": "\xff"}', b""]))
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        dirty = contract(source=SHARED | {"format": "jsonl", "train": ["a.jsonl"]})
        task = examine(dirty, [tmp_path], quarantine_dir=tmp_path / str(number))
        rows_in = sum(1 for line in lines if line)
        kept = sum(table.num_rows for table in task.splits.values())
        quarantine = pq.read_table(task.quarantine)
        assert kept + quarantine.num_rows == rows_in == task.verdict.rows_in
        places = quarantine.column("line").to_pylist()
        assert len(set(places)) == len(places), "no row is counted twice"
        assert {lines[place - 1] for place in places} <= set(lines) - {b""}
        for name, split in task.verdict.splits.items():
            assert split.kept == task.splits[name].num_rows
            assert split.rows_in == split.kept + sum(split.rejected.values())


def test_shares_of_train_are_disjoint_and_do_not_depend_on_the_order_of_rows(tmp_path):
    content = rows(*(f"text number {i}" for i in range(1000)), split="t")
    write(tmp_path, train=content)
    first = ingest(contract(source=SHARED), [tmp_path])
    ids = {name: set(table.column("row_id").to_pylist()) for name, table in first.splits.items()}
    assert sum(map(len, ids.values())) == 1000 == len(set().union(*ids.values()))
    assert abs(len(ids["validation"]) - 200) < 50 and abs(len(ids["test"]) - 300) < 60

    random.Random(0).shuffle(content)
    more = rows(*(f"new {i}" for i in range(100)), split="n")
    write(tmp_path, train=more + content)
    second = ingest(contract(source=SHARED, prompt="{text}?"), [tmp_path])
    again = {name: set(table.column("row_id").to_pylist()) for name, table in second.splits.items()}
    assert all(ids[name] <= again[name] for name in ids), "new rows, a new order and a new prompt move no old row"

    smaller = SHARED | {"validation": {"from": "train", "fraction": 0.1}}
    third = ingest(contract(source=smaller), [tmp_path])
    assert set(third.splits["test"].column("row_id").to_pylist()) == again["test"], "test does not depend on validation"


def test_equal_texts_never_stand_on_both_sides_of_a_share(tmp_path):
    texts = [f"{'Text' if i % 2 else 'text'}  number {i // 2}" for i in range(400)]
    write(tmp_path, train=rows(*texts, split="t"))
    verdict = ingest(contract(source=SHARED), [tmp_path]).verdict
    assert verdict.leaks == {}
    assert verdict.rejected == {"duplicate_text": 200}


def test_the_same_files_give_the_same_digests_and_other_files_others(tmp_path):
    write(tmp_path, train=rows("a", "b", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    first, again = ingest(contract(), [tmp_path]), ingest(contract(), [tmp_path])
    assert first.data_digests == again.data_digests
    write(tmp_path, train=rows("a", "B", split="t"))
    other = ingest(contract(), [tmp_path])
    assert other.data_digests["train"] != first.data_digests["train"]
    assert other.data_digests["test"] == first.data_digests["test"]


def test_files_of_the_same_name_below_two_roots_keep_two_digests(tmp_path):
    for name, text in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, train=rows(text, split=name))
    write(tmp_path / "one", val=rows("d", split="v"), test=rows("e", split="e"))
    both = SOURCE | {"train": ["train.parquet", str(tmp_path / "two" / "train.parquet")]}
    task = ingest(contract(source=both), [tmp_path / "one", tmp_path / "two"])
    assert len(task.file_digests) == 4
    assert task.verdict.splits["train"].kept == 2


def test_an_empty_split_fails_by_its_count(tmp_path):
    write(tmp_path, train=rows("a", split="t"), val=[], test=rows("e", split="e"))
    with pytest.raises(DataRejected, match=r"validation has 0 usable rows and needs 1"):
        ingest(contract(), [tmp_path])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "{text} {title}"}, "train.parquet has no column 'title'"),
        ({"source": SOURCE | {"test": ["none.parquet"]}}, "'none.parquet' matches no file"),
        ({"source": SOURCE | {"test": ["../secret.parquet"]}}, "contains '..'"),
        ({"source": SOURCE | {"test": ["/etc/passwd"]}}, "outside the data roots"),
        ({"source": SOURCE | {"test": ["broken.parquet"]}}, "broken.parquet is not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_that_names_it(tmp_path, changes, said):
    write(tmp_path, train=rows("a", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError) as caught:
        ingest(contract(**changes), [tmp_path])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_rule_of_severity_warn_counts_kept_rows_only(tmp_path):
    rule = {"column": "text", "check": "max_length", "value": 3, "severity": "warn"}
    write(tmp_path, train=rows("abcd", "ABCD", "ab", split="t"), val=rows("d", split="v"), test=rows("e", split="e"))
    verdict = ingest(contract(rules=[rule]), [tmp_path]).verdict
    assert verdict.splits["train"].warned == {"rule:max_length:text": 1}
    assert verdict.splits["train"].rejected == {"duplicate_text": 1}

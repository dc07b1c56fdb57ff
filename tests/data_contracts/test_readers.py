"""Rows out of files: quirks that must work, broken rows that must be counted, broken files that must be named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts import UserError
from data_contracts.readers import as_text, read_batches, read_records

ROLES = {"id": "key", "text": "text", "label": "key"}


def read(path, file_format, roles=ROLES):
    records = read_records(str(path), file_format, roles)
    return records.table.to_pylist(), records.lines.tolist(), records.reasons.to_pylist()


def test_csv_with_mark_quoted_newlines_and_blank_lines_is_read_with_its_lines(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbfid,text,label\r\n1,"two\nlines, with a comma",x\r\n\r\n2,"say ""hi""",y\r\n3,\xc3\xa9t\xc3\xa9,z'
    )
    rows, lines, reasons = read(file, "csv")
    assert rows == [
        {"id": "1", "text": "two\nlines, with a comma", "label": "x"},
        {"id": "2", "text": 'say "hi"', "label": "y"},
        {"id": "3", "text": "été", "label": "z"},
    ]
    assert lines == [2, 5, 6]
    assert reasons == [None, None, None]


def test_csv_rows_that_are_not_utf8_or_have_other_cells_are_marked_and_the_rest_is_read(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'id,text,label\n1,caf\xe9,x\n2,good,y\n3,one,too,many\n4,short\n5,"bad \xff\nquoted",z\n6,fine,z\n'
    )
    rows, lines, reasons = read(file, "csv")
    assert reasons == ["invalid_utf8", None, "malformed", "malformed", "invalid_utf8", None]
    assert lines == [2, 3, 4, 5, 6, 8]
    assert [row["text"] for row in rows] == [None, "good", None, None, None, "fine"]


def test_jsonl_rows_that_are_no_records_are_marked_and_the_rest_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"id": 1, "text": "a", "label": "x"}',
        b"",
        b'{"id": 2, "text": "caf\xe9", "label": "x"}',
        b'{"id": 3, "text": ',
        b'["a", "list"]',
        b'{"id": 4, "text": "lone \\ud800", "label": "x"}',
        b'{"id": 5, "label": "x"}',
        b'{"id": 6, "text": 7, "label": "x"}',
        b'{"id": [1], "text": "t", "label": "x"}',
    ]
    file.write_bytes(b"\n".join(lines))
    rows, numbers, reasons = read(file, "jsonl")
    assert numbers == [1, 3, 4, 5, 6, 7, 8, 9]
    malformed = ["invalid_utf8", "malformed", "malformed"]
    assert reasons == [None, *malformed, "invalid_utf8", None, "wrong_type", "wrong_type"]
    assert rows[0] == {"id": "1", "text": "a", "label": "x"}
    assert rows[5]["text"] is None


def test_unreadable_rows_have_the_digest_of_their_bytes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"id": 1, "text": "a", "label": "x"}\nbroken\n')
    records = read_records(str(file), "jsonl", ROLES)
    # printf 'broken\n' | sha256sum
    assert records.unreadable == {1: "cdd6c109503d4e19cad782eef4d9ba162af0d84727445edbb9d300df1adc6048"}


def test_parquet_types_become_text_and_wrong_ones_are_marked(tmp_path):
    file = tmp_path / "a.parquet"
    table = pa.table(
        {
            "id": pa.array([1, 2, None], pa.int64()),
            "text": pa.array(["a", "b", None]).dictionary_encode(),
            "label": pa.array([True, False, None]),
            "stars": pa.array([4.5, 4.0, None]),
            "price": pa.array([1.0, 2.0, None]),
        }
    )
    pq.write_table(table, file)
    rows, lines, reasons = read(file, "parquet", ROLES | {"stars": "value"})
    assert rows[0] == {"id": "1", "text": "a", "label": "true", "stars": "4.5"}
    assert rows[1]["stars"] == "4"
    assert (lines, reasons) == ([1, 2, 3], [None, None, None])
    assert read(file, "parquet", {"price": "key"})[2] == ["wrong_type", "wrong_type", None], "a fraction is no name"
    assert read(file, "parquet", {"id": "text"})[2] == ["wrong_type", "wrong_type", None], "a number is no text"


def test_parquet_text_that_is_not_utf8_is_marked(tmp_path):
    file = tmp_path / "a.parquet"
    broken = pa.array([b"good", b"caf\xe9", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), file)
    rows, _, reasons = read(file, "parquet", {"text": "text"})
    assert [row["text"] for row in rows] == ["good", None, None]
    assert reasons == [None, "invalid_utf8", None]


def test_bytes_beyond_ascii_are_found_wherever_a_batch_begins(tmp_path):
    file = tmp_path / "a.parquet"
    values = [b"plain", b"\xc3\xa9", b"", b"\xff", b"plain", None, b"\xe9", b"plain"]
    pq.write_table(pa.table({"text": pa.array(values, pa.binary()).view(pa.string())}), file)
    expected = ["plain", "é", "", None, "plain", None, None, "plain"]
    for num_rows in range(1, 9):
        (rows, _, reasons, _), _ = in_batches(file, "parquet", num_rows, {"text": "text"})
        assert [row["text"] for row in rows] == expected
        assert reasons == [None, None, None, "invalid_utf8", None, None, "invalid_utf8", None]
    column = pa.chunked_array([pa.array(values, pa.binary()).view(pa.string()).slice(4, 2)])
    assert as_text(column, "text")[0].to_pylist() == ["plain", None]


def test_mixed_json_values_are_written_as_a_table_would_write_them(tmp_path):
    file = tmp_path / "a.jsonl"
    values = [1, "1", True, 2.0, 2.5, None, {"a": 1}]
    file.write_text("\n".join(json.dumps({"v": value}) for value in values))
    rows, _, reasons = read(file, "jsonl", {"v": "value"})
    assert [row["v"] for row in rows[:6]] == ["1", "1", "true", "2", "2.5", None]
    assert reasons == [None] * 6 + ["wrong_type"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"not parquet", "not a readable parquet"),
        ("a.parquet", b"", "not a readable parquet"),
        ("a.jsonl", b"id,text\n1,a\n", "not a readable jsonl"),
        ("a.csv", b"", "not a readable csv"),
        ("a.csv", b"\xff\xfei\x00d\x00", "not a readable csv"),
        ("a.csv", b'id,text,label\n1,"never closed,x\n', "not a readable csv"),
        ("a.csv", b"id;text;label\n1;a;x\n", "separates its columns by ';'"),
        ("a.csv", b"id,words,label\n1,a,x\n", "no column 'text'"),
        ("a.csv", b"id,text,text,label\n1,a,b,x\n", "'text' 2 times"),
        ("a.jsonl", b'{"id": 1, "label": "x"}\n', "no column 'text'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_records(str(file), file.suffix[1:], ROLES)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv cannot be opened"):
        read_records(str(tmp_path / "gone.csv"), "csv", ROLES)


def test_a_csv_cell_longer_than_the_libraries_default_is_read(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 200_000 + "\n")
    rows, _, _ = read(file, "csv", {"text": "text"})
    assert len(rows[0]["text"]) == 200_000


def in_batches(path, file_format, num_rows, roles=ROLES):
    """All batches joined, and their sizes."""
    batches = list(read_batches(str(path), file_format, roles, num_rows))
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    lines = [line for batch in batches for line in batch.lines.tolist()]
    reasons = [reason for batch in batches for reason in batch.reasons.to_pylist()]
    sizes = [len(batch.lines) for batch in batches]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    unreadable = {
        start + row: digest
        for start, batch in zip(starts, batches, strict=True)
        for row, digest in batch.unreadable.items()
    }
    return (rows, lines, reasons, unreadable), sizes


MIXED = {
    "csv": [
        b"id,text,label",
        b"1,caf\xe9,x",
        b"2,good,y",
        b"",
        b"3,one,too,many",
        b"4,short",
        b'5,"bad \xff',
        b'quoted",z',
        b'6,"fine',
        b'",z',
        b"7,a,b",
    ],
    "jsonl": [
        b'\xef\xbb\xbf{"id": 1, "text": "a", "label": "x"}',
        b"",
        b'{"id": 2, "text": "caf\xe9", "label": "x"}',
        b'{"id": 3',
        b'{"id": "4", "text": "lone \\ud800", "label": true}',
        b'{"id": 5, "label": "x"}',
        b'{"id": [1], "text": 7, "label": "x"}',
    ],
}


@pytest.mark.parametrize("num_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("file_format", ["csv", "jsonl", "parquet"])
def test_a_file_read_in_batches_is_the_file_read_at_once(tmp_path, file_format, num_rows):
    file = tmp_path / f"a.{file_format}"
    if file_format == "parquet":
        broken = pa.array([b"good", b"caf\xe9", None, b"a", b"b", b"c", b"d"], pa.binary()).view(pa.string())
        labels = pa.array(list("xyxyxyz")).dictionary_encode()
        pq.write_table(pa.table({"id": range(7), "text": broken, "label": labels}), file, row_group_size=4)
    else:
        file.write_bytes(b"\n".join(MIXED[file_format]))
    whole = read_records(str(file), file_format, ROLES)
    expected = (*read(file, file_format), whole.unreadable)
    found, sizes = in_batches(file, file_format, num_rows)
    assert found == expected
    assert max(sizes) <= num_rows and sum(sizes) == len(whole.lines) and (num_rows < 100 or len(sizes) <= 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"id,text,label\n"), ("a.jsonl", b""), ("a.jsonl", b"\n \n")],
)
def test_a_file_without_rows_is_one_empty_batch(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    assert in_batches(file, file.suffix[1:], 2) == (([], [], [], {}), [0])


def test_a_fault_late_in_the_file_is_named_after_the_rows_before_it(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text,label\n1,a,x\n2,b,x\n3,"never closed,x\n')
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "label": "x"}\n' * 3)
    (tmp_path / "b.jsonl").write_bytes(b"broken\n" * 3)
    for name, said in (("a.csv", "line 4"), ("a.jsonl", "no column 'text'"), ("b.jsonl", "not a readable jsonl")):
        batches = read_batches(str(tmp_path / name), name[2:], ROLES, 1)
        assert len(next(batches).lines) == 1
        with pytest.raises(UserError, match=said):
            list(batches)

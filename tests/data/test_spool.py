"""Rows on disk come back in order, and nothing is left behind."""

import gc
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.spool import Spool

SCHEMA = pa.schema([("a", pa.string()), ("n", pa.list_(pa.int32()))])


def rows(*numbers: int) -> pa.Table:
    return pa.table({"a": [str(n) for n in numbers], "n": [[n] * n for n in numbers]}, schema=SCHEMA)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def spooled(*parts: pa.Table, folder: Path | None = None) -> Spool:
    spool = Spool(SCHEMA, folder)
    for part in parts:
        spool.write(part)
    return spool


def test_rows_come_back_in_the_pieces_they_were_written_in(folder):
    parts = pa.concat_tables([rows(1), rows(2)]), rows(), rows(3), rows(4, 5, 6).slice(1, 1)
    pieces = [batch.to_pylist() for batch in spooled(*parts).batches()]
    assert pieces == [rows(1, 2).to_pylist(), rows(3).to_pylist(), rows(5).to_pylist()]
    assert spooled(*parts).table().equals(rows(1, 2, 3, 5))


@pytest.mark.parametrize("given", [False, True])
def test_a_table_outlives_its_spool_and_no_file_is_ever_seen(folder, given):
    spool = spooled(rows(1, 2, 3), folder=folder if given else None)
    held = pa.total_allocated_bytes()
    table = spool.table()
    assert pa.total_allocated_bytes() - held < 1000, "the rows stay on disk"
    assert list(folder.iterdir()) == []
    del spool
    gc.collect()
    assert table.to_pylist() == rows(1, 2, 3).to_pylist()


def test_an_empty_spool_is_a_table_without_rows(folder):
    assert list(spooled().batches()) == []
    assert spooled(rows()).table().equals(SCHEMA.empty_table())


def test_the_files_lie_in_the_folder_that_is_named(folder, tmp_path):
    (tmp_path / "temporary").rmdir()
    assert spooled(rows(1), folder=tmp_path).table().num_rows == 1
    with pytest.raises(FileNotFoundError):
        spooled(rows(1))

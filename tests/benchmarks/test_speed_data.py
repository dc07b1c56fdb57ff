"""What the case `data` runs in processes of its own."""

import json

import pyarrow.parquet as pq
import pytest

from pipeline.benchmarks.speed import data, data_child
from pipeline.benchmarks.speed.options import SpeedOptions


def test_a_verdict_is_measured_on_as_many_rows_as_asked_for(tmp_path):
    note = tmp_path / "note.json"
    (tmp_path / "rows").mkdir()
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"what": "verdict", "folder": str(tmp_path / "rows"), "rows": 1000, "note": str(note)}))
    data_child.main(str(spec))
    found = json.loads(note.read_text())
    written = {file.stem: pq.read_table(file) for file in (tmp_path / "rows").glob("*.parquet")}
    assert {name: table.num_rows for name, table in written.items()} == {"train": 800, "validation": 100, "test": 100}
    keys = [key for table in written.values() for key in table["id"].to_pylist()]
    assert len(set(keys)) == 1000
    assert found["rows"] == 1000 and found["kept"] == 950  # five in a hundred are broken, none twice
    assert found["seconds"] > 0 and found["peak_bytes"] >= found["before_bytes"] > 0


def test_texts_are_tokenised_with_the_backbones_own_tokenizer(tmp_path, backbone_dir):
    found = data_child.measure_tokens(str(backbone_dir), 2000)
    assert found["rows"] == 2000 and found["seconds"] > 0


def test_bytes_a_row_are_the_slope_between_the_smallest_and_the_largest(tmp_path, monkeypatch):
    def measured(spec, folder, **variables):
        if spec["what"] == "tokens":
            return {"rows": spec["rows"], "seconds": 4.0 / int(variables["RAYON_NUM_THREADS"])}
        rows = spec["rows"]
        return {"rows": rows, "seconds": 1.0, "before_bytes": 7, "peak_bytes": 100 + 32 * rows, "kept": rows}

    monkeypatch.setattr(data, "in_child", measured)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    options = SpeedOptions(backbone="b", data="d", validation_rows=1000, repeats=2)
    report = data.measure_data(options, tmp_path)
    assert list(report["verdict at size"]["seconds"]) == ["100 rows", "1,000 rows", "5,000 rows"]
    assert report["verdict at size"]["bytes_per_row"] == pytest.approx(32)
    assert report["tokenising"]["ratios"][f"{data.ONE} / {data.ALL}"]["median"] == 2.0

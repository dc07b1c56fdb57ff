"""The case `startup`: what a launch's own record and an import log are made into."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.benchmarks.children import run_child
from pipeline.benchmarks.speed import startup
from pipeline.benchmarks.speed.options import SpeedOptions
from pipeline.benchmarks.speed.report import as_table
from pipeline.config import load_stream

IMPORT_LOG = """\
import time: self [us] | cumulative | imported package
import time:      1500 |       1500 |     numpy.core
import time:       500 |       2000 |   numpy
a warning in between
import time:    250000 |     252000 | torch
"""


def test_import_times_are_summed_by_package_without_what_a_package_imports():
    assert startup.parse_import_times(IMPORT_LOG) == pytest.approx({"numpy": 0.002, "torch": 0.25})


def test_the_report_has_a_column_a_contender_and_a_line_a_phase_in_their_order():
    first = {"launcher": 7.0, "imports": 5.0, "first step": 2.0}
    second = {"launcher": 9.0, "imports": 5.0, "first step": 3.0}
    case = startup.startup_report({"prepared": [first, second], "prepared_2_ranks": [second, second]})
    assert case["seconds"]["prepared"]["samples"] == [14.0, 17.0]
    assert case["ratios"]["prepared_2_ranks / prepared"]["samples"] == [17 / 14, 1.0]
    machine = {"processor": "P", "cores": 2, "torch_threads": 2}
    table = as_table({"machine": machine, "cases": {"startup": {**case, "imports": {"torch": 2.5}}}})
    lines = [line.split() for line in table.splitlines()]
    at = lines.index(["phase", "prepared", "prepared_2_ranks"])
    shown = [["launcher", "8.00", "9.00"], ["imports", "5.00", "5.00"], ["first", "step", "2.50", "3.00"]]
    assert lines[at + 1 : at + 4] == shown
    assert ["torch", "2.50"] in lines


def test_a_launch_is_the_real_command_on_a_stream_of_one_step(tmp_path, backbone_dir, data_root, monkeypatch):
    options = SpeedOptions(str(backbone_dir), str(data_root), batch_size=4, max_tokens=64, dtype="float32")
    stream = startup.write_stream(options, "first", tmp_path / "work")
    config = load_stream(str(stream), [])
    assert (config.rows.train, config.training.batch_size, config.training.epochs) == (4, 4, 1)
    assert yaml.safe_load(Path(config.tasks[0]).read_text())["source"]["train"] == ["first/train.parquet"]
    commands = []

    def run(command, environment):
        commands.append(([str(part) for part in command], environment["OMP_NUM_THREADS"]))
        folder = tmp_path / "work" / "increments" / "0001-measured"
        folder.mkdir(parents=True)
        record = {"began": startup.time.time() + 3, "phases": [["imports", 5.0], ["first step", 2.0]]}
        (folder / "run.json").write_text(json.dumps({"startup": record}))

    monkeypatch.setattr(startup, "run_child", run)
    monkeypatch.setattr(startup.os, "cpu_count", lambda: 8)
    phases = startup.launch(stream, tmp_path / "work", ranks=2)
    assert list(phases) == ["launcher", "imports", "first step"]
    assert phases["launcher"] == pytest.approx(3, abs=0.5) and phases["imports"] == 5
    [(command, threads)] = commands
    assert Path(command[0]).name == "deepspeed" and command[1:3] == ["--num_accelerators", "2"] and threads == "4"
    assert command[-3:] == [str(startup.ROOT / "jobs/continual.py"), "--stream", str(stream)]


def test_a_command_that_fails_shows_the_end_of_its_output():
    with pytest.raises(RuntimeError, match="ended with 3:\n\nno such stream"):
        run_child([sys.executable, "-c", "import sys; print('no such stream', file=sys.stderr); sys.exit(3)"], {})

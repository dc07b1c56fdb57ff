"""`jobs/benchmark.py scale` on a few increments: that they cost the same bytes, and that the report says what was
measured.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.errors import UserError
from pipeline.benchmarks.scale import run as scale_run
from pipeline.benchmarks.scale.fresh import FreshStream
from pipeline.benchmarks.scale.options import ScaleOptions
from pipeline.benchmarks.scale.report import summarise
from pipeline.tracking.audit import audit

ROOT = Path(__file__).resolve().parents[2]
COUNT, EARLIER = 8, 2


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "jobs/benchmark.py", "scale", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250)


@pytest.fixture(scope="module")
def scale(tmp_path_factory) -> tuple[dict, str, Path]:
    """The report of eight increments without MLflow, what was printed, and the work_dir they are in."""
    folder = tmp_path_factory.mktemp("scale")
    out, kept = folder / "scale.json", folder / "kept"
    sizes = ("--increments", str(COUNT), "--earlier-tasks", str(EARLIER), "--no-mlflow")
    done = run("--out", str(out), "--work-dir", str(kept), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(out.read_text()), done.stdout, kept / "work"


def manifests(work_dir: Path) -> list[dict]:
    """Oldest first, as JSON."""
    return [json.loads(path.read_text()) for path in sorted(work_dir.glob("increments/*/manifest.json"))]


def test_an_increment_writes_as_many_bytes_as_the_one_before(scale):
    work_dir = scale[2]
    told, banked = [], []
    for manifest in manifests(work_dir)[EARLIER + 1 :]:  # from here on the sample is full
        banked.append(
            sum((work_dir / "bank" / f"{sha}.safetensors").stat().st_size for sha in manifest["bank"].values())
        )
        moved = len(manifest["bundles"]) - 1
        assert 0 <= moved <= EARLIER
        manifest["bundles"] = {manifest["task"]: manifest["bundles"][manifest["task"]]}
        text = json.dumps(manifest, sort_keys=True).replace("true", "false")
        told.append(len(re.sub(r"(?<=[:, ])-?\d+(\.\d+)?(e-?\d+)?", "0", text)))  # scores differ in length
    assert len(set(told)) == 1 and len(set(banked)) == 1, (told, banked)
    figures = scale[0]["figures"]
    assert figures["bank_bytes"]["ratio"] == 1 and figures["manifest_bytes"]["last"]["most"] < 2 * told[0]


def test_each_increment_scores_its_sample_and_the_rest_stay_what_they_were(scale):
    served: dict[str, dict] = {}
    for number, manifest in enumerate(manifests(scale[2]), start=1):
        assert len(manifest["row"]) == min(number - 1, EARLIER) + 1
        assert manifest["bundles"].keys() <= manifest["row"].keys() == manifest["validation_row"].keys()
        served |= manifest["bundles"]
    assert json.loads((scale[2] / "champion.json").read_text())["bundles"] == served
    assert len(served) == COUNT


def test_what_the_benchmark_leaves_passes_the_audit(scale):
    findings = audit(scale[2])
    assert findings and [finding for finding in findings if not finding.ok] == []


def test_medians_and_ratios_follow_from_the_increments(scale):
    report = scale[0]
    assert report["windows"] == {"first": [2, 4], "last": [6, 8]} and len(report["increments"]) == COUNT
    assert {"step_seconds", "publish_seconds", "resident_bytes", "total_seconds"} <= report["figures"].keys()
    assert "tracking_seconds" not in report["figures"]
    for name, values in report["figures"].items():
        samples = [increment[name] for increment in report["increments"]]
        second = [increment[name] for increment in report["second_stream"]]
        assert values["first"]["median"] == statistics.median(second[1:]) > 0 and len(second) == 4
        assert values["last"]["median"] == statistics.median(samples[5:8])
        assert values["ratio"] == values["last"]["median"] / values["first"]["median"]
    for increment in report["increments"] + report["second_stream"]:
        parts = ("prepare_seconds", "train_seconds", "evaluate_seconds", "register_seconds")
        assert sum(increment[part] for part in parts) <= increment["total_seconds"]
        assert 0 < increment["publish_seconds"] < increment["register_seconds"]


def test_the_second_stream_is_a_stream_like_the_first(scale):
    report, _, work_dir = scale
    for name in ("manifest_bytes", "bank_bytes", "champion_bytes", "scored_tasks"):
        same = [[increment[name] for increment in report[stream][:4]] for stream in ("increments", "second_stream")]
        assert max(abs(a - b) for a, b in zip(*same, strict=True)) <= 0.01 * max(same[0]), name
    findings = audit(work_dir.parent / "second" / "work")
    assert findings and all(finding.ok for finding in findings)


def test_a_second_stream_that_fails_says_why(tmp_path):
    with FreshStream(ScaleOptions(increments=3, mlflow=False), tmp_path / "second") as second:
        (tmp_path / "second" / "work").write_text("in the way")
        with pytest.raises(RuntimeError, match=r"the second stream ended with 1:\n(.|\n)*FileExistsError"):
            second.next()


def test_until_the_second_stream_has_its_window_the_streams_own_is_compared():
    options = ScaleOptions(increments=9)
    report = summarise(options, [{"step_seconds": float(n)} for n in range(1, 10)], [{"step_seconds": 7.0}])
    assert report["figures"]["step_seconds"]["first"]["median"] == 3.5
    full = summarise(options, [{"step_seconds": float(n)} for n in range(1, 10)], [{"step_seconds": 7.0}] * 5)
    assert full["figures"]["step_seconds"]["first"]["median"] == 7.0


def test_progress_and_table_are_printed_and_no_path_or_host_is_told(scale):
    report, printed, work_dir = scale
    assert f"increment {COUNT}/{COUNT}" in printed
    assert re.search(r"^resident memory +[\d,.]+ MB +[\d,.]+ MB +\d\.\d{3}$", printed, re.MULTILINE)
    text = json.dumps(report)
    assert all(private not in text for private in (os.uname().nodename, str(work_dir.parent), str(ROOT)))


def test_the_windows_are_those_of_the_whole_run():
    assert ScaleOptions().windows == {"first": (2, 101), "last": (901, 1000)}
    assert ScaleOptions(increments=3).windows == {"first": (2, 2), "last": (3, 3)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"increments": 2}, "needs? at least 3"), ({"rank": 0}, "--rank is 0"), ({"width": 20}, "multiple of 8")],
)
def test_numbers_that_leave_nothing_to_measure_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        ScaleOptions(**changes)


def test_a_work_dir_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        ScaleOptions(work_dir=str(tmp_path))


def test_the_temporary_folder_is_removed_even_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_run.tempfile, "tempdir", str(tmp_path))

    def increments(options, folder):
        (folder / "work").mkdir()
        raise RuntimeError("half-way")
        yield

    monkeypatch.setattr(scale_run, "increments", increments)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match="half-way"):
        scale_run.run_scale(ScaleOptions(), out / "scale.json")
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())

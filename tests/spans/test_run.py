"""The spans of a real run: two ranks, ZeRO-3 with expert parallelism, rank 1 slowed by a sleep in its forward pass."""

import json
import subprocess
import sys

import pytest

from jobs import timeline
from tests import forked
from tests.distributed.worlds import free_port
from tests.helpers import make_stream, make_task
from tests.moe_helpers import save_moe_backbone

SLEEP = 0.15  # seconds, in every forward pass of rank 1
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work_dir, {rank: the loop's own steps}) of the run."""
    folder = tmp_path_factory.mktemp("spans")
    backbone = save_moe_backbone(folder / "backbone", "hunyuan_v1_moe")
    task = make_task(folder / "data", "reviews")
    sections = {"deepspeed": str(forked.ROOT / "deepspeed_configs" / "zero3_ep2.json"), "spans": {"every": 3}}
    sections["tracking"] = {"system_metrics": True}
    stream = make_stream(folder / "stream.yaml", folder / "work", backbone, folder / "data", [task], **sections)
    command = [sys.executable, "-m", "tests.spans.worker", str(free_port()), str(stream), str(SLEEP), str(folder)]
    done = subprocess.run(command, cwd=forked.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = {rank: (folder / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)}
    return folder / "work", {rank: [json.loads(line) for line in text] for rank, text in texts.items()}


def lines_of(work_dir, rank):
    path = work_dir / "spans" / f"rank{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_has_its_sums_and_they_make_up_the_loops_own_time(run):
    work_dir, steps = run
    for rank in (0, 1):
        recorded = [line for line in lines_of(work_dir, rank) if line["name"] == "step"]
        assert [line["step"] for line in recorded] == list(range(1, STEPS + 1)) == [s["step"] for s in steps[rank]]
        for line, seen in list(zip(recorded, steps[rank], strict=True))[1:]:  # the first also checks the gradients
            parts = sum(line["sums"][name] for name in ("data", "forward", "backward", "optimizer", "wait"))
            assert line["seconds"] == pytest.approx(seen["seconds"], abs=0.01)
            assert parts == pytest.approx(seen["seconds"], rel=0.1, abs=0.01)
            assert {"gather", "all_to_all", "reduce"} <= line["sums"].keys()


def test_the_first_and_every_third_step_are_written_span_by_span(run):
    work_dir, _ = run
    lines = lines_of(work_dir, 0)
    assert {line["step"] for line in lines if line["name"] == "forward"} == {1, 3, 6}
    step = next(line for line in lines if line["name"] == "step" and line["step"] == 3)
    inside = [line for line in lines if line["step"] == 3 and line["name"] != "step"]
    assert {line["host"] for line in inside} and all(line["rank"] == 0 and line["increment"] == 1 for line in inside)
    for line in inside:
        assert step["start"] - 1e-3 <= line["start"] <= step["start"] + step["seconds"] + 1e-3
    for name in ("forward", "gather", "all_to_all"):
        total = sum(line["seconds"] for line in inside if line["name"] == name)
        assert total == pytest.approx(step["sums"][name], abs=1e-4)


def test_parts_of_the_increment_and_scored_splits_are_there(run):
    work_dir, _ = run
    lines = lines_of(work_dir, 1)
    assert {"train", "save", "evaluate", "score", "publish"} <= {line["name"] for line in lines}
    assert {(line["task"], line["split"]) for line in lines if line["name"] == "score"} == {
        ("reviews", "validation"),
        ("reviews", "test"),
    }


def test_the_slowed_rank_is_named_and_all_is_drawn(run, capsys, tmp_path):
    work_dir, _ = run
    assert timeline.main([str(work_dir), "--out", str(tmp_path / "t.png"), "--trace", str(tmp_path / "t.json")]) == 0
    said = capsys.readouterr().out
    assert "slowest: rank 1 on " in said, said
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert {event["pid"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]} == {0, 1}


def test_the_hosts_system_metrics_are_on_the_increments_run(run):
    import socket

    from pipeline.tracking.registry import default_uri, open_client

    client = open_client(default_uri(run[0]))
    experiment = client.get_experiment_by_name("perennial")
    runs = client.search_runs([experiment.experiment_id], "tags.task = 'reviews'")
    names = {name for name in runs[0].data.metrics if name.startswith("system/")}
    assert f"system/{socket.gethostname()}/cpu_utilization_percentage" in names, names
    assert len(runs) == 1 and all(name.count("/") == 2 for name in names)


def test_a_missing_work_dir_is_a_sentence_and_exit_2(tmp_path, capsys):
    assert timeline.main([str(tmp_path / "nothing")]) == 2
    assert "no spans are there" in capsys.readouterr().err

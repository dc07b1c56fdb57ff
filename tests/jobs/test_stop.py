"""SIGTERM to one rank of two during training: exit 75, state saved; the relaunch ends as if nothing had happened."""

import json
import re

import pytest

from tests.jobs.many import digests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


def test_a_stop_exits_75_with_a_marker_and_the_state_and_publishes_nothing(stopped):
    assert stopped.stop.code == 75, stopped.stop.text
    assert stopped.marker is not None, stopped.stop.text
    message = stopped.marker["message"]
    step = re.fullmatch(r"increment 1 first: stopped at step (\d+) of 18; the same command continues", message)
    assert step and 1 <= int(step[1]) < 18, message
    assert "inflight/state.safetensors" in stopped.left and "finished.json" not in stopped.left
    assert not [name for name in stopped.left if name.startswith(("champion.json", "increments/", "bank/"))]
    assert message in stopped.stop.stderr and "Traceback" not in stopped.stop.text


def test_the_relaunch_goes_on_and_ends_with_the_very_same_experts_and_manifest(stopped, on_two_ranks, learned):
    assert learned.first.code == 0, learned.first.text
    relaunch = on_two_ranks.done["relaunch"]
    assert relaunch.code == 0, relaunch.text
    unbroken = {name: sha for name, sha in learned.after_first.items() if name.startswith("bank/")}
    assert len(unbroken) == 4  # shared, dedicated, gate, method state
    left = digests(stopped.work_dir)
    assert {name: sha for name, sha in left.items() if name.startswith("bank/")} == unbroken
    for name in ("increments/0001-first/manifest.json", "champion.json"):
        assert left[name] == learned.after_first[name]


def test_the_account_of_a_continued_increment_is_complete(stopped, on_two_ranks):
    folder = stopped.work_dir / "increments" / "0001-first"
    assert json.loads((folder / "run.json").read_text())["continuations"] == 1
    assert json.loads((folder / "manifest.json").read_text())["training"] == {"steps": 18, "rows_consumed": 144}
    assert not (stopped.work_dir / "stopped.json").exists() and not (stopped.work_dir / "inflight").exists()
    assert json.loads((stopped.work_dir / "finished.json").read_text())["exit_code"] == 0


def test_mlflow_has_one_run_for_the_continued_increment_with_each_step_once(stopped, on_two_ranks):
    from mlflow import MlflowClient

    uri = f"sqlite:///{stopped.work_dir / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("perennial").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 2 and len(children) == 1 and children[0].info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(children[0].info.run_id, "loss")] == [1, 5, 10, 15]

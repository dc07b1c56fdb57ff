"""A host's samples reach the increment's run, also those of an outage; nobody waits for a server that is away."""

import shutil
import socket
import time

import pytest

from pipeline.tracking.delivery import KEY_TAG
from pipeline.tracking.registry import default_uri, open_client
from pipeline.tracking.system_metrics import HostMetrics


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")


def test_samples_of_an_outage_are_delivered_when_it_is_over(copied, registered, tmp_path, capsys):
    key = registered.client.get_run(registered.run_ids[0]).data.tags[KEY_TAG]
    shutil.move(copied / "mlflow.db", tmp_path / "away.db")
    metrics = HostMetrics(default_uri(copied), "perennial", "node7")
    metrics.follow(key)
    time.sleep(1.5)
    waiting = len(metrics._waiting)
    assert waiting >= 2, "samples are kept while there is no database"
    assert not (copied / "mlflow.db").exists(), "no database is made where the run's is not"
    shutil.move(tmp_path / "away.db", copied / "mlflow.db")
    metrics.follow("", 10.0)
    assert len(metrics._waiting) == 0
    client = open_client(default_uri(copied))
    history = client.get_metric_history(registered.run_ids[0], "system/node7/cpu_utilization_percentage")
    assert len(history) >= waiting + 1
    assert all(0 <= point.value <= 100 for point in history)
    assert len({point.timestamp for point in history}) == len(history)
    assert capsys.readouterr().err.count("takes nothing at present") == 1


def test_a_server_that_is_away_keeps_nobody_waiting():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and not listening: refused
        metrics = HostMetrics(f"http://127.0.0.1:{closed.getsockname()[1]}", "perennial")
        begin = time.perf_counter()
        metrics.follow("a run")
        assert time.perf_counter() - begin < 0.05
        time.sleep(1.0)
        begin = time.perf_counter()
        metrics.follow("", 0.3)
        assert time.perf_counter() - begin < 0.5

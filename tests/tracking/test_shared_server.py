"""Several streams on the tracking server of docker/compose.yaml, started here without containers. `make proof-tracking`
has the long version, with real jobs (test_two_streams.py).
"""

import base64
import signal
import threading

import pytest
from mlflow import MlflowClient

from data_contracts.errors import UserError
from jobs import audit as command
from pipeline.config import TrackingConfig
from pipeline.tracking import courier, mlflow_log
from pipeline.tracking.chain import publish
from pipeline.tracking.mlflow_log import Tracker
from pipeline.tracking.outbox import read_outbox
from tests.tracking.accounts import aliases_of, find_bytes, runs_of, versions_of
from tests.tracking.stack import CANARIES, lacking, running_stack

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking() or "-")
STREAMS = ("one", "two", "three")
STEPS = (1, 5, 10)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with running_stack(tmp_path_factory.mktemp("stack"), workers=1) as stack:
        yield stack


@pytest.fixture(autouse=True)
def environment(stack, monkeypatch):
    """A job's login, and no pauses between two tries."""
    for name, value in stack.login.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(courier, "_FIRST_PAUSE", 0.2)
    monkeypatch.setattr(courier, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(mlflow_log, "_RUN_SECONDS", 0.0)


def learn(stack, work_dir, name, by_hand, moment=lambda: None, seed=0, opened=lambda tracker: None):
    """Three increments as a job logs them; `moment` is called between them."""
    tracker = Tracker(work_dir, name, TrackingConfig(uri=stack.uri))
    opened(tracker)
    for manifest, staged in by_hand.increments(work_dir):
        number = manifest.increment
        tracker.increment(number, manifest.task, f"inputs {number}")
        tracker.log_params({"stream": name})
        for step in STEPS:
            tracker.log_metrics(step, {"loss": seed + step / 16})
        publish(work_dir, staged, manifest)
        tracker.published(manifest, ["row.json"], f"inputs {number}")
        moment()
    tracker.close()
    return tracker


def test_streams_that_start_at_once_on_an_empty_server_and_lose_it_in_the_middle_end_whole_and_apart(
    stack, by_hand, tmp_path, capsys
):
    """Server killed after the first increment of all, PostgreSQL killed after the second; each back later."""
    together = threading.Barrier(len(STREAMS) + 1)
    trackers, failed = {}, []

    def moment():
        together.wait(120)  # everybody is here
        together.wait(120)  # what is to happen has happened

    def work(seed, name):
        try:
            keep = lambda tracker: trackers.update({name: tracker})  # noqa: E731
            learn(stack, tmp_path / name, name, by_hand, moment, seed, keep)
        except BaseException as error:
            failed.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=each) for each in enumerate(STREAMS)]
    for thread in threads:
        thread.start()
    together.wait(120)
    stack.end("server")
    together.wait(120)
    together.wait(120)  # all have logged a whole increment to nobody
    assert all(read_outbox(tmp_path / name)[0] for name in STREAMS)
    stack.start_server()
    assert all(tracker.flush(60) for tracker in trackers.values())  # what was waiting is told
    assert all("0002-tweets" in runs_of(client(stack), "perennial", tmp_path / name) for name in STREAMS)
    stack.end("database", signal.SIGQUIT)  # as at a power cut
    together.wait(120)
    together.wait(120)
    stack.start_database()
    together.wait(120)
    for thread in threads:
        thread.join(120)
    assert failed == [] and sorted(trackers) == sorted(STREAMS)
    assert all(tracker.flush(60) and tracker.waiting == 0 for tracker in trackers.values())

    for seed, name in enumerate(STREAMS):
        runs = runs_of(client(stack), "perennial", tmp_path / name)
        assert sorted(runs) == ["0001-product_reviews", "0002-tweets", "0003-tweets", name]
        curve = [(step, seed + step / 16) for step in STEPS]
        for run in runs.values():
            assert run.status == "FINISHED" and run.tags["stream"] == name
            if run.name != name:
                assert (run.parent, run.params, run.points["loss"]) == (name, {"stream": name}, curve)
                assert run.artifacts == ["increment", "row.json"]
        # by hand: increment 1 and 3 are promoted, 2 is not
        tags = versions_of(client(stack), name)
        assert [(each["increment"], each["verdict"]) for each in tags] == [
            *(("1", "promoted"), ("2", "rejected"), ("3", "promoted")),
        ]
        assert {each["work_dir"] for each in tags} == {str(tmp_path / name)}
        assert aliases_of(client(stack), name) == {"candidate": 3, "champion": 3}
        assert command.main(["--work-dir", str(tmp_path / name), "--tracking-uri", stack.uri]) == 0
    said = capsys.readouterr()
    assert "takes nothing at present" in said.err
    assert [part for part in CANARIES if part in said.err + said.out] == []


def test_a_registered_model_is_refused_to_a_second_stream_and_follows_a_moved_work_dir(stack, by_hand, tmp_path):
    first = learn(stack, tmp_path / "first", "mine", by_hand)
    assert first.flush(30)
    with pytest.raises(UserError, match=r"'mine' belongs to stream 'mine' in work_dir .*tracking\.registered_model"):
        Tracker(tmp_path / "second", "mine", TrackingConfig(uri=stack.uri))
    (tmp_path / "first").rename(tmp_path / "moved")
    Tracker(tmp_path / "moved", "mine", TrackingConfig(uri=stack.uri)).close()
    assert client(stack).get_registered_model("mine").tags["work_dir"] == str(tmp_path / "moved")


def test_only_who_logs_in_and_names_the_server_right_is_served(stack):
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    user, password = stack.login.values()
    login = {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    assert stack.status(path, {}) == 401 and stack.status(path, login) == 200
    assert stack.status(path, login | {"Host": "tracking:5000"}) == 200  # as jobs in containers call it
    assert stack.status(path, login | {"Host": "elsewhere.example"}) == 403


def test_a_wrong_password_is_a_mistake_that_is_told_without_it(stack, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-wrong-4714")
    with pytest.raises(UserError, match="MLflow cannot use it") as refused:
        Tracker(tmp_path, "stream", TrackingConfig(uri=stack.uri))
    assert "canary" not in str(refused.value)


def test_no_secret_is_in_a_log_in_what_jobs_left_or_in_a_command_line(stack, tmp_path, tmp_path_factory):
    logs = {path.name: path.read_text() for path in stack.folder.glob("*.log")}
    assert "Application startup complete" in logs["server.log"] and "Updating database" in logs["migrate.log"]
    base = tmp_path_factory.getbasetemp()
    left = [path for path in base.iterdir() if path.is_dir() and path != stack.folder]
    places = [*left, *(path for path in stack.folder.iterdir() if path.is_dir())]
    assert find_bytes(places, CANARIES) == []
    assert [name for name, text in logs.items() for part in CANARIES if part in text] == []


def client(stack):
    """A client with the job's login."""
    return MlflowClient(stack.uri, stack.uri)

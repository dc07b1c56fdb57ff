"""MLflow away, locked or hanging: nothing waits for it, nothing is lost, and in the end nobody can tell."""

import contextlib
import json
import shutil
import socket
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from data_contracts.credentials import shown
from data_contracts.errors import UserError
from jobs import audit as command
from pipeline.config import TrackingConfig
from pipeline.tracking import courier, mlflow_log
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import load_chain, publish
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.mlflow_log import Tracker
from pipeline.tracking.outbox import Outbox, read_outbox
from pipeline.tracking.registry import open_registry


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Every event is a try, and nobody waits long at the end."""
    monkeypatch.setattr(courier, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(courier, "_LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(mlflow_log, "_FAIL_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def empty_database(registered, tmp_path):
    """A path at which `make` puts a database with tables and nothing else of ours: making one costs seconds."""

    def make(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(registered.work_dir / "mlflow.db", folder / "mlflow.db")
        return f"sqlite:///{folder / 'mlflow.db'}"

    return make


SETTINGS = {"experiment": "outage", "registered_model": "outage"}


def learn(work_dir, uri, by_hand, between=lambda moment: None):
    """Three increments as the job logs them, in one launch; `between` is called at each moment with its name."""
    between("start")
    tracker = Tracker(work_dir, "outage", TrackingConfig(uri=uri, **SETTINGS))
    for manifest, staged in by_hand.increments(work_dir):
        number = manifest.increment
        between(f"before {number}")
        tracker.increment(number, manifest.task, f"inputs {number}")
        tracker.log_params({"seed": 17, "number": number})
        tracker.log_inputs("train", by_hand.sha(f"train {number}"), 10, ["/data/a.csv"], "training")
        for step in (1, 5, 10):
            tracker.log_metrics(step, {"loss": 1 / (step + number), "grad_norm": float(step)})
            between(f"step {step} of {number}")
        publish(work_dir, staged, manifest)
        tracker.published(manifest, ["row.json", "predictions"], f"inputs {number}")
    between("end")
    tracker.close()
    return tracker


def account(uri, work_dir):
    """Everything MLflow shows of the stream that is neither an id nor a time, by the names of runs."""
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("outage").experiment_id
    runs = client.search_runs([experiment])
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs), "no run twice"
    plain = lambda text: text.replace(str(work_dir), "W")  # noqa: E731
    found = {}
    for run in runs:
        tags = {key: plain(value) for key, value in run.data.tags.items() if key != "perennial.key"}
        if parent := tags.get("mlflow.parentRunId"):
            tags["mlflow.parentRunId"] = names[parent]
        found[run.info.run_name] = {
            "status": run.info.status,
            "tags": tags,
            "params": run.data.params,
            "metrics": {
                name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
            "latest": run.data.metrics,
            "inputs": sorted(
                (i.dataset.name, i.dataset.digest, i.dataset.source, i.dataset.profile, str(i.tags))
                for i in run.inputs.dataset_inputs
            ),
            "artifacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        }
    versions = {
        int(version.version): ({k: plain(v) for k, v in version.tags.items()}, names[version.run_id])
        for version in client.search_model_versions("name = 'outage'")
    }
    aliases = {alias: int(version) for alias, version in client.get_registered_model("outage").aliases.items()}
    return {"runs": found, "versions": versions, "aliases": aliases}


@pytest.fixture(scope="module")
def undisturbed(registered, by_hand, tmp_path_factory):
    """What MLflow shows when it was there all the time."""
    work_dir = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(registered.work_dir / "mlflow.db", work_dir / "mlflow.db")
    uri = f"sqlite:///{work_dir / 'mlflow.db'}"
    assert learn(work_dir, uri, by_hand).waiting == 0
    seen = account(uri, work_dir)
    assert sorted(seen["runs"]) == ["0001-product_reviews", "0002-tweets", "0003-tweets", "outage"]
    assert seen["aliases"] == {"candidate": 3, "champion": 3} and len(seen["versions"]) == 3
    assert [p for p, _ in seen["runs"]["0002-tweets"]["metrics"]["loss"]] == [1, 5, 10]
    return seen


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def locked(database):
    """The sqlite file held by another connection, as by a long transaction of somebody else."""
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.rollback()
        holder.close()


@pytest.fixture
def server(registered, tmp_path, monkeypatch):
    """MLflow's own REST server on sqlite, which can be stopped and started again; in a thread, since a process of its
    own takes ten seconds to start.
    """
    from werkzeug.serving import make_server

    home, port, running = tmp_path / "server", free_port(), []
    home.mkdir()
    shutil.copy(registered.work_dir / "mlflow.db", home / "mlflow.db")
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{home / 'mlflow.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(home / "files"))
    from mlflow.server import app

    def start():
        listening = make_server("127.0.0.1", port, app, threaded=True)
        running.append(listening)
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop():
        listening = running.pop()
        listening.shutdown()
        listening.server_close()

    yield SimpleNamespace(uri=f"http://127.0.0.1:{port}", start=start, stop=stop)
    if running:
        stop()


def test_a_server_killed_in_the_middle_and_back_later_ends_as_if_it_had_never_been_away(
    server, undisturbed, by_hand, tmp_path, capsys
):
    work_dir = tmp_path / "work"
    server.start()

    def fate(moment):
        if moment == "step 5 of 1":
            while read_outbox(work_dir)[0]:  # what comes before is told
                time.sleep(0.05)
            server.stop()
        if moment == "before 3":
            time.sleep(0.5)  # not over before anybody noticed
            (finding,) = [finding for finding in audit(work_dir) if not finding.ok]
            assert finding.pending and "not yet delivered to" in finding.detail and server.uri in finding.detail
            assert "0001-product_reviews, 0002-tweets" in finding.detail
        if moment == "step 1 of 3":
            server.start()

    tracker = learn(work_dir, server.uri, by_hand, fate)
    assert tracker.flush(60) and tracker.waiting == 0 and list((work_dir / "outbox").iterdir()) == []
    assert account(server.uri, work_dir) == undisturbed
    said = capsys.readouterr()
    assert said.err.count("warning: MLflow at") == 1 and "takes nothing at present" in said.err
    assert "has caught up" in said.out
    registry = open_registry(work_dir, load_chain(work_dir), server.uri)
    assert [finding for finding in audit(work_dir, registry) if not finding.ok] == []


def test_a_stream_that_opens_with_mlflow_down_is_learned_and_told_by_the_next_launch(
    empty_database, undisturbed, by_hand, tmp_path, capsys
):
    """Nothing listens at the first launch's address; the second is given one where MLflow is."""
    work_dir, away = tmp_path / "work", f"http://127.0.0.1:{free_port()}"
    tracker = learn(work_dir, away, by_hand)
    # by hand: the stream's run and its end; in each increment a run, parameters, data, three steps, a publication
    assert tracker.waiting == 2 + 3 * (3 + 3 + 1)
    said = capsys.readouterr()
    assert said.err.count("warning") == 1 and f"{tracker.waiting} events wait in" in said.out
    events, damaged = read_outbox(work_dir)
    assert [event.sequence for event in events] == list(range(1, tracker.waiting + 1)) and damaged == []

    uri = empty_database(work_dir)
    again = Tracker(work_dir, "outage", TrackingConfig(uri=uri, **SETTINGS))
    again.close()
    assert again.waiting == 0
    assert account(uri, work_dir) == undisturbed


def test_a_locked_database_holds_up_nobody(empty_database, undisturbed, by_hand, tmp_path, monkeypatch):
    work_dir = tmp_path / "work"
    uri, held = empty_database(work_dir), contextlib.ExitStack()
    slowest, last = [0.0], [time.monotonic()]

    def fate(moment):
        slowest[0] = max(slowest[0], time.monotonic() - last[0] if moment not in ("start", "before 1", "end") else 0.0)
        if moment == "before 2":
            held.enter_context(locked(work_dir / "mlflow.db"))
        if moment == "end":
            held.close()
        last[0] = time.monotonic()

    tracker = learn(work_dir, uri, by_hand, fate)
    assert tracker.flush(30) and account(uri, work_dir) == undisturbed
    assert slowest[0] < 2.0, "sqlite itself waits five seconds for a lock"


def test_a_server_that_takes_the_call_and_never_answers_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlflow_log, "_OPEN_SECONDS", 0.3)
    monkeypatch.setattr(mlflow_log, "_END_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        begin = time.monotonic()
        tracker = Tracker(tmp_path, "outage", TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        tracker.increment(1, "tweets")
        for step in range(200):
            tracker.log_metrics(step, {"loss": 1.0})
        tracker.close()
        assert time.monotonic() - begin < 5.0
    assert tracker.waiting == 1 + 1 + 200 + 2
    assert "has not answered" in capsys.readouterr().err


def test_a_kill_between_any_delivery_and_its_removal_repeats_nothing(empty_database, undisturbed, by_hand, tmp_path):
    """Each event is delivered by one launch that dies before removing it, and again by the next."""
    work_dir = tmp_path / "work"
    learn(work_dir, f"http://127.0.0.1:{free_port()}", by_hand)
    uri = empty_database(work_dir)
    delivery = Delivery(work_dir, "outage", TrackingConfig(uri=uri, **SETTINGS), uri, "outage", "its stream")
    outbox = Outbox(work_dir, uri)
    while (event := outbox.first()) is not None:
        for _ in range(2):
            delivery.open()
            delivery.apply(event)
            delivery.forget()
        outbox.remove(event)
    assert account(uri, work_dir) == undisturbed


def test_a_torn_file_in_the_outbox_is_put_aside_named_by_the_audit_and_holds_up_nothing(
    empty_database, by_hand, tmp_path
):
    work_dir = tmp_path / "work"
    uri = empty_database(work_dir)
    learn(work_dir, f"http://127.0.0.1:{free_port()}", by_hand)
    torn = sorted((work_dir / "outbox").iterdir())
    torn[4].write_bytes(torn[4].read_bytes()[:40])  # the first increment's first step
    torn[-1].write_bytes(b"")
    (work_dir / "outbox" / ".0000000099.json.abcd.tmp").write_bytes(b"{")
    names = {finding.name for finding in audit(work_dir) if not finding.ok}
    assert names == {"MLflow outbox", f"outbox/{torn[4].name}", f"outbox/{torn[-1].name}"}

    again = Tracker(work_dir, "outage", TrackingConfig(uri=uri, **SETTINGS))
    again.close()
    assert again.waiting == 0
    assert sorted(path.name for path in (work_dir / "outbox").iterdir()) == [
        f"{torn[4].name}.damaged",
        f"{torn[-1].name}.damaged",
    ]
    seen = account(uri, work_dir)
    assert [step for step, _ in seen["runs"]["0001-product_reviews"]["metrics"]["loss"]] == [5, 10]
    assert seen["runs"]["outage"]["status"] == "FINISHED" and len(seen["versions"]) == 3
    wrong = [finding for finding in audit(work_dir) if not finding.ok]
    assert [finding.name for finding in wrong] == [f"outbox/{torn[4].name}.damaged", f"outbox/{torn[-1].name}.damaged"]
    assert not any(finding.pending for finding in wrong)


def test_the_audit_tells_what_is_not_delivered_from_what_differs(
    empty_database, by_hand, tmp_path, capsys, monkeypatch
):
    """Two increments are told, the third waits: exit 1, with nothing called different."""
    work_dir = tmp_path / "work"
    uri, held = empty_database(work_dir), contextlib.ExitStack()

    def fate(moment):
        if moment == "before 3":
            while read_outbox(work_dir)[0]:
                time.sleep(0.05)
            held.enter_context(locked(work_dir / "mlflow.db"))

    monkeypatch.setattr(mlflow_log, "_END_SECONDS", 0.1)
    tracker = learn(work_dir, uri, by_hand, fate)
    assert not tracker.flush(60)  # it has given up before the database is free again
    held.close()
    assert command.main(["--work-dir", str(work_dir)]) == 1
    said = " ".join(capsys.readouterr().out.split())  # a long path breaks the lines elsewhere
    assert "DIFFERS" not in said and " differ" not in said
    assert "4 not yet delivered to MLflow" in said  # the outbox, the version and the two aliases
    assert "PENDING" in said and "among them 0003-tweets" in said
    assert tracker.flush(60)
    assert command.main(["--work-dir", str(work_dir)]) == 0


def test_an_address_or_a_name_that_can_never_work_is_a_mistake_and_leaves_no_event(tmp_path):
    with pytest.raises(UserError, match="carrier-pigeon://loft"):
        Tracker(tmp_path, "outage", TrackingConfig(uri="carrier-pigeon://loft"))
    assert read_outbox(tmp_path) == ([], [])


def test_a_full_disk_keeps_events_in_memory_and_says_so_once(empty_database, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.tracking.outbox.write_atomic", full)
    uri = empty_database(tmp_path)
    tracker = Tracker(tmp_path, "outage", TrackingConfig(uri=uri, **SETTINGS))
    tracker.increment(1, "tweets")
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close()
    assert tracker.waiting == 0
    assert capsys.readouterr().err.count("No space left on device") == 1
    client = MlflowClient(uri, uri)
    (run,) = client.search_runs(
        [client.get_experiment_by_name("outage").experiment_id], "attributes.run_name = '0001-tweets'"
    )
    assert run.data.metrics == {"loss": 1.0}


def test_steps_logged_again_while_mlflow_is_away_wait_once(tmp_path):
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    for _ in range(2):
        tracker = Tracker(tmp_path, "outage", away)
        tracker.increment(1, "tweets", "key")
        for step in (1, 5):
            tracker.log_metrics(step, {"loss": 1.0})
    metrics = [event for event in read_outbox(tmp_path)[0] if event.kind == "metrics"]
    assert [event.data["step"] for event in metrics] == [1, 5]


def test_a_number_that_is_none_survives_the_outbox(tmp_path):
    outbox = Outbox(tmp_path, "sqlite:///x")
    outbox.append("metrics", {"values": {"loss": float("nan"), "grad_norm": float("inf")}})
    (event,), _ = read_outbox(tmp_path)
    assert json.dumps(event.data["values"]) == '{"grad_norm": Infinity, "loss": NaN}'


def test_a_password_is_not_shown():
    assert shown("postgresql://me:se@cret@db:5432/mlflow") == "postgresql://me:***@db:5432/mlflow"
    assert shown("http://host:5000/a@b") == "http://host:5000/a@b"
    assert shown("sqlite:////w/mlflow.db") == "sqlite:////w/mlflow.db"

"""What the tracker writes, read with MLflow's own client on sqlite."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source

from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.mlflow_log import Tracker, how_to_open
from pipeline.tracking.registry import Registry, open_registry

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(registered, tmp_path):
    """Another experiment in the database of the session, which is created once, and a model of the test's own."""
    return TrackingConfig(uri=registered.uri, experiment="scratch", registered_model=tmp_path.name)


@pytest.fixture
def tracker(tmp_path, settings):
    return Tracker(tmp_path, "scratch", settings)


@pytest.fixture(scope="module")
def client(registered):
    return MlflowClient(registered.uri, registered.uri)


def opened(tracker, *attempt):
    """Open an increment; the id of its run, once MLflow knows all."""
    tracker.increment(*attempt)
    assert tracker.flush()
    return tracker.run_id()


def parent_of(client, run_id):
    return client.get_run(run_id).data.tags["mlflow.parentRunId"]


def published(tracker, work_dir, by_hand, manifest, key=""):
    """Tell MLflow of a manifest that stands in the work_dir's folder of it."""
    folder = work_dir / "increments" / manifest.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    tracker.published(manifest, (), key)
    assert tracker.flush()


def all_runs(client, experiment_id):
    return client.search_runs([experiment_id])


def test_the_default_is_a_database_and_artifacts_inside_the_work_dir(registered):
    assert registered.uri == f"sqlite:///{registered.work_dir}/mlflow.db"
    assert (registered.work_dir / "mlflow.db").is_file()
    experiment = MlflowClient(registered.uri).get_experiment_by_name("perennial")
    assert experiment.artifact_location == (registered.work_dir / "mlartifacts").as_uri()


def test_each_increment_is_a_child_run_of_one_parent_and_all_are_finished(registered):
    client = MlflowClient(registered.uri)
    runs = all_runs(client, registered.experiment_id)
    by_name = {run.info.run_name: run for run in runs}
    assert sorted(by_name) == ["0001-product_reviews", "0002-tweets", "0003-tweets", "reviews"]
    parent = by_name["reviews"].info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs if run.info.run_id != parent} == {parent}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_version_carries_the_digests_written_by_hand(registered, by_hand):
    first, second, third = registered.manifests
    versions = MlflowClient(registered.uri).search_model_versions("name = 'reviews'")
    tags = {version.tags["increment"]: version.tags for version in versions}
    assert len(versions) == 3
    common = {
        "contract_digest": by_hand.sha("contract"),
        "contract_version": "1.0.0",
        "data_digest_train": by_hand.sha("train"),
        "data_digest_test": by_hand.sha("test"),
        "stream": "reviews",
        "work_dir": str(registered.work_dir),
    }
    assert tags["1"] == common | {
        "task": "product_reviews",
        "increment": "1",
        "parent": "none",
        "manifest_sha256": first.sha256,
        "head": first.sha256,
        "verdict": "promoted",
        "bundle.dedicated": first.bank["dedicated"],
        "bundle.shared": first.bank["shared"],
        "bundle.gate": first.bank["gate"],
    }
    assert tags["2"] == common | {
        "task": "tweets",
        "increment": "2",
        "parent": first.sha256,
        "manifest_sha256": second.sha256,
        "head": second.sha256,
        "verdict": "rejected",
    }
    assert tags["3"] == common | {
        "task": "tweets",
        "increment": "3",
        "parent": second.sha256,
        "manifest_sha256": third.sha256,
        "head": third.sha256,
        "verdict": "promoted",
        "bundle.dedicated": third.bank["dedicated"],
        "bundle.shared": third.bank["shared"],
        "bundle.gate": third.bank["gate"],
    }


def test_the_source_of_a_version_is_the_artifact_folder_with_its_manifest(registered):
    client = MlflowClient(registered.uri)
    for manifest, run_id in zip(registered.manifests, registered.run_ids, strict=True):
        found = client.get_model_version("reviews", str(manifest.increment))
        assert found.run_id == run_id
        assert found.source == f"{client.get_run(run_id).info.artifact_uri}/increment"
        path = client.download_artifacts(run_id, "increment/manifest.json")
        assert Path(path).read_bytes() == manifest.to_bytes()


def test_the_run_of_a_manifest_is_found_by_its_sha256_and_shows_its_row(registered):
    client = MlflowClient(registered.uri)
    for manifest, run_id in zip(registered.manifests, registered.run_ids, strict=True):
        query = f"tags.manifest_sha256 = '{manifest.sha256}'"
        (found,) = client.search_runs([registered.experiment_id], query)
        assert found.info.run_id == run_id
        assert found.data.metrics == {f"row.{task}": score for task, score in manifest.row.items()}


def test_the_stream_run_shows_each_task_as_a_curve_over_increments(registered):
    client = MlflowClient(registered.uri)
    history = client.get_metric_history(parent_of(client, registered.run_ids[0]), "row.product_reviews")
    assert [(point.step, point.value) for point in history] == [(1, 0.75), (2, 0.25), (3, 0.75)]


def test_aliases_name_the_newest_and_the_newest_promoted_version(tmp_path, settings, by_hand):
    tracker = Tracker(tmp_path, "aliases", settings.model_copy(update={"registered_model": "aliases"}))
    client, seen = MlflowClient(settings.uri, settings.uri), []
    for manifest, _ in by_hand.increments(tmp_path):
        published(tracker, tmp_path, by_hand, manifest)
        seen.append({alias: int(v) for alias, v in client.get_registered_model("aliases").aliases.items()})
    assert seen == [
        {"candidate": 1, "champion": 1},
        {"candidate": 2, "champion": 1},
        {"candidate": 3, "champion": 3},
    ]


def test_a_manifest_registered_twice_makes_one_version_and_moves_no_alias_back(tmp_path, settings, by_hand):
    settings = settings.model_copy(update={"registered_model": "twice"})
    tracker = Tracker(tmp_path, "twice", settings)
    manifests = [manifest for manifest, _ in by_hand.increments(tmp_path)]
    for manifest in manifests:
        published(tracker, tmp_path, by_hand, manifest)
    continued = Tracker(tmp_path, "twice", settings)
    for manifest in reversed(manifests):
        published(continued, tmp_path, by_hand, manifest)

    client = MlflowClient(settings.uri, settings.uri)
    assert len(client.search_model_versions("name = 'twice'")) == 3
    assert {a: int(v) for a, v in client.get_registered_model("twice").aliases.items()} == {
        "candidate": 3,
        "champion": 3,
    }


def test_a_continued_launch_finds_its_runs_again_and_sets_them_running(tmp_path, settings):
    first = Tracker(tmp_path, "scratch", settings)
    run = opened(first, 1, "tweets", "key")
    first.close(ok=False)
    client = MlflowClient(settings.uri, settings.uri)
    parent = parent_of(client, run)
    assert client.get_run(run).info.status == "FAILED"
    assert client.get_run(parent).info.status == "FAILED"

    again = Tracker(tmp_path, "scratch", settings)
    assert opened(again, 1, "tweets", "key") == run
    assert client.get_run(run).info.status == "RUNNING"
    assert client.get_run(parent).info.status == "RUNNING"
    again.close()
    assert client.get_run(run).info.status == "FINISHED"
    assert client.get_run(parent).info.status == "FINISHED"


def test_another_attempt_stream_or_work_dir_is_another_run(tmp_path, settings, client):
    tracker = Tracker(tmp_path, "scratch", settings)
    other_model = lambda name: settings.model_copy(update={"registered_model": f"{tmp_path.name}-{name}"})  # noqa: E731
    runs = [
        opened(tracker, 1, "tweets", "key"),
        opened(tracker, 1, "tweets", "other data"),
        opened(tracker, 2, "tweets", "key"),
        opened(Tracker(tmp_path, "scratch_2", other_model("2")), 1, "tweets", "key"),
        opened(Tracker(tmp_path / "it's", "scratch", other_model("3")), 1, "tweets", "key"),
    ]
    assert len(set(runs)) == 5
    assert len({parent_of(client, run) for run in runs}) == 3


def test_the_configuration_is_flattened_into_parameters(tracker, client):
    run = opened(tracker, 1, "tweets")
    tracker.log_params({"method": {"name": "moe_cl", "targets": ["up", "down"], "empty": {}}, "seed": 17, "off": None})
    assert tracker.flush()
    assert client.get_run(run).data.params == {
        "method.name": "moe_cl",
        "method.targets": '["up", "down"]',
        "method.empty": "{}",
        "seed": "17",
        "off": "null",
    }


def test_a_value_over_the_limit_is_cut_and_ends_in_its_sha256(tracker, client):
    long = "x" * 6001
    run = opened(tracker, 1, "tweets")
    tracker.log_params({"fits": "y" * 6000, "long": long})
    assert tracker.flush()
    params = client.get_run(run).data.params
    assert params["fits"] == "y" * 6000
    assert len(params["long"]) == 6000
    assert params["long"].endswith(f"x... sha256={hashlib.sha256(long.encode()).hexdigest()}")


def test_more_parameters_and_metrics_than_one_call_takes_are_all_logged(tracker, client):
    run = opened(tracker, 1, "tweets")
    tracker.log_params({f"p{i}": i for i in range(250)})
    tracker.log_metrics(3, {f"m{i}": i / 8 for i in range(1500)})
    assert tracker.flush()
    data = client.get_run(run).data
    assert data.params == {f"p{i}": str(i) for i in range(250)}
    assert data.metrics == {f"m{i}": i / 8 for i in range(1500)}


def test_a_continued_increment_with_another_configuration_logs_on_and_draws_no_step_twice(tmp_path, settings, client):
    first = Tracker(tmp_path, "scratch", settings)
    first.increment(1, "tweets")
    first.log_params({"world_size": 2, "seed": 17})
    first.log_metrics(1, {"loss": 2.0})
    first.log_metrics(2, {"loss": 1.5})
    assert first.flush()
    again = Tracker(tmp_path, "scratch", settings)
    run_id = opened(again, 1, "tweets")
    again.log_params({"world_size": 1, "seed": 17, "new": "x"})
    again.log_metrics(2, {"loss": 1.25})
    again.log_metrics(3, {"loss": 1.0})
    assert again.flush()
    data = client.get_run(run_id).data
    assert data.params == {"world_size": "2", "seed": "17", "new": "x"}
    assert {key: value for key, value in data.tags.items() if key.startswith("continued.")} == {
        "continued.world_size": "1"
    }
    points = [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]
    assert points == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_inputs_carry_our_digest_rows_source_and_context_once(tracker, tmp_path, client):
    digest = "ab" * 32
    run = opened(tracker, 1, "tweets")
    for _ in range(2):
        tracker.log_inputs("train", digest, 300, [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], "training")
    tracker.log_inputs("test", "cd" * 32, 40, str(tmp_path / "c.parquet"), "evaluation")
    assert tracker.flush()
    inputs = {i.dataset.name: i for i in client.get_run(run).inputs.dataset_inputs}
    assert sorted(inputs) == ["tweets.test", "tweets.train"]
    train = inputs["tweets.train"]
    assert train.dataset.digest == digest[:36]
    assert train.dataset.profile == '{"num_rows":300}'
    assert {tag.key: tag.value for tag in train.tags} == {"mlflow.data.context": "training", "sha256": digest}
    assert get_source(train.dataset).to_dict()["uri"] == str(tmp_path / "a.parquet")
    assert '"num_files":2' in train.dataset.source
    assert str(tmp_path / "b.parquet") in train.dataset.source
    tags = client.get_run(run).data.tags
    assert (tags["data_digest_train"], tags["data_digest_test"]) == (digest, "cd" * 32)


def test_files_and_folders_become_artifacts(tracker, tmp_path, client, by_hand):
    manifest = Manifest(**by_hand.fields())
    folder = tmp_path / "increments" / manifest.folder
    (folder / "predictions").mkdir(parents=True)
    (folder / "report.png").write_bytes(b"png")
    (folder / "predictions" / "tweets.parquet").write_bytes(b"rows")
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    run = opened(tracker, manifest.increment, manifest.task)
    tracker.published(manifest, ["report.png", "predictions"])
    assert tracker.flush()
    assert sorted(item.path for item in client.list_artifacts(run)) == ["increment", "predictions", "report.png"]
    path = client.download_artifacts(run, "predictions/tweets.parquet")
    assert Path(path).read_bytes() == b"rows"


def test_a_row_is_logged_once_however_often_it_is_told(tmp_path, settings, by_hand, client):
    settings = settings.model_copy(update={"registered_model": "rows"})
    manifest = Manifest(**by_hand.fields(row={"product_reviews": 0.5, "tweets": 0.25}))
    for _ in range(2):
        tracker = Tracker(tmp_path, "rows", settings)
        published(tracker, tmp_path, by_hand, manifest)
        for alias in ("champion", "candidate"):
            client.delete_registered_model_alias("rows", alias)  # so that it is told again
    (version,) = client.search_model_versions("name = 'rows'")
    for run in (version.run_id, parent_of(client, version.run_id)):
        for name, score in (("row.product_reviews", 0.5), ("row.tweets", 0.25)):
            assert [(point.step, point.value) for point in client.get_metric_history(run, name)] == [(1, score)]


def test_logging_before_an_increment_is_opened_is_an_error(tracker):
    for log in (lambda: tracker.log_metrics(1, {"loss": 1.0}), lambda: tracker.log_params({"seed": 1})):
        with pytest.raises(RuntimeError, match="no increment is open"):
            log()


@pytest.mark.parametrize("name", ["a'b", "a/b", "a:b"])
def test_a_model_name_that_cannot_be_searched_for_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(UserError, match=r"tracking\.registered_model"):
        Tracker(tmp_path, "scratch", TrackingConfig(registered_model=name))
    assert list(tmp_path.iterdir()) == []


def test_the_registry_of_a_chain_is_found_by_its_manifests(registered, by_hand, tmp_path):
    registry = open_registry(registered.work_dir, registered.manifests)
    assert registry.registered_model == "reviews"
    assert [int(version.version) for version in registry.versions()] == [1, 2, 3]
    assert registry.find_version(registered.manifests[1].sha256).version == 2
    assert registry.find_version("0" * 64) is None
    with pytest.raises(UserError, match="no registered version carries the sha256"):
        open_registry(registered.work_dir, [Manifest(**by_hand.fields(task="unknown"))])
    with pytest.raises(UserError, match=r"mlflow\.db: not found; name the MLflow server with --tracking-uri"):
        open_registry(tmp_path, registered.manifests)
    assert list(tmp_path.iterdir()) == [], "looking makes no database"


def test_a_version_without_its_aliases_is_not_registered_and_registering_again_mends_it(
    tmp_path, settings, by_hand, client
):
    settings = settings.model_copy(update={"registered_model": "cut_short"})
    tracker, registry = Tracker(tmp_path, "cut_short", settings), Registry(client, "cut_short")
    first, second, _ = [manifest for manifest, _ in by_hand.increments(tmp_path)]
    assert not registry.is_registered(first)
    published(tracker, tmp_path, by_hand, first)
    published(tracker, tmp_path, by_hand, second)
    assert registry.is_registered(first)
    assert registry.is_registered(second), "a rejected increment is due the candidate alias alone"
    for alias, manifest in (("champion", first), ("candidate", second)):
        client.delete_registered_model_alias("cut_short", alias)
        assert not registry.is_registered(manifest)
        published(tracker, tmp_path, by_hand, manifest)
        assert registry.is_registered(manifest)


def test_how_to_open_is_a_command_or_an_address():
    assert how_to_open("sqlite:////w/my work/mlflow.db").startswith(
        "mlflow ui --backend-store-uri 'sqlite:////w/my work/mlflow.db' "
    )
    assert how_to_open("https://mlflow.example.com") == "open https://mlflow.example.com"


def test_the_tracking_modules_do_not_import_mlflow_and_turn_its_telemetry_off():
    code = (
        "import sys, os; import pipeline.tracking.mlflow_log, pipeline.tracking.audit;"
        "print('mlflow' in sys.modules, os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "False true", result.stderr

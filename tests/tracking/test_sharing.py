"""What two streams of one server could take from each other, moment by moment; test_shared_server.py has the server."""

import json

import pytest

from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.tracking.mlflow_log import Tracker
from pipeline.tracking.sharing import claim_model, find_experiment, find_run, identity, stream_key


class Slow:
    """A client that looks, finds nothing, and is overtaken by another job before it makes what it looked for."""

    def __init__(self, client, **overtaken):
        self._client, self._overtaken = client, overtaken

    def __getattr__(self, name):
        if name in self._overtaken:
            first = self._overtaken.pop(name)
            return lambda *args, **kwargs: first()
        return getattr(self._client, name)


def test_an_experiment_that_another_job_makes_in_between_is_taken(registered):
    made = []

    def nothing_yet():
        made.append(registered.client.create_experiment("in_between"))

    slow = Slow(registered.client, get_experiment_by_name=nothing_yet)
    assert [find_experiment(slow, "in_between", None)] == made


def test_of_two_streams_that_claim_a_model_at_once_the_second_is_refused(registered, tmp_path):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    def nothing_yet():
        claim_model(registered.client, "claimed", "key a", "a", tmp_path / "a", set)
        raise MlflowException("not there", error_code=RESOURCE_DOES_NOT_EXIST)

    slow = Slow(registered.client, get_registered_model=nothing_yet)
    with pytest.raises(UserError, match=f"'claimed' belongs to stream 'a' in work_dir '{tmp_path / 'a'}'"):
        claim_model(slow, "claimed", "key b", "b", tmp_path / "b", set)
    claim_model(registered.client, "claimed", "key a", "a", tmp_path / "a", set)  # its own stays its own


def test_a_run_that_was_made_twice_is_found_once_and_the_empty_one_goes(registered):
    client = registered.client
    experiment = client.create_experiment("twice")
    ids = [client.create_run(experiment, tags={"perennial.key": "k"}).info.run_id for _ in range(3)]
    client.log_metric(ids[1], "loss", 1.0, step=3)
    assert find_run(client, experiment, "k") == ids[1] == find_run(client, experiment, "k")
    assert [run.info.run_id for run in client.search_runs([experiment])] == [ids[1]]
    assert find_run(client, experiment, "another") is None


def test_work_dirs_of_one_path_on_two_machines_are_told_apart_and_an_old_one_keeps_its_runs(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    assert identity(one) == identity(one) != identity(other)
    assert stream_key("s", tmp_path, identity(one)) != stream_key("s", tmp_path, identity(other))
    old = tmp_path / "old"
    (old / "increments" / "0001-tweets").mkdir(parents=True)
    assert identity(old) == [] and not (old / "tracking.json").exists()
    (one / "tracking.json").write_text("{")
    with pytest.raises(UserError, match=r"tracking\.json: damaged"):
        identity(one)


def test_the_same_stream_under_the_same_path_on_another_machine_does_not_write_into_its_runs(registered, tmp_path):
    """The path is made anew, as in a second container."""
    settings = TrackingConfig(uri=registered.uri, experiment="containers", registered_model="containers")
    work_dir = tmp_path / "work"
    first = Tracker(work_dir, "stream", settings)
    first.increment(1, "tweets", "key")
    first.close()
    assert json.loads((work_dir / "tracking.json").read_text())["id"]
    work_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="name another in tracking"):
        Tracker(work_dir, "stream", settings)
    second = Tracker(work_dir, "stream", settings.model_copy(update={"registered_model": "containers-2"}))
    second.increment(1, "tweets", "key")
    second.close()
    experiment = registered.client.get_experiment_by_name("containers").experiment_id
    assert len(registered.client.search_runs([experiment])) == 4

"""New versions, new data and rejections of known tasks: one work_dir, launch after launch, in a plain process."""

import json
from hashlib import sha256

import pyarrow.parquet as pq
import pytest
import torch

from jobs import audit
from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


def test_every_launch_ends_with_its_exit_code(history):
    codes = {name: done.code for name, done in history.launches.items()}
    rejected = dict.fromkeys(("rejected", "rejected_again", "go_on"), 3)
    failed = [done.text for name, done in history.launches.items() if done.code != rejected.get(name, 0)]
    assert codes == dict.fromkeys(codes, 0) | rejected, failed


def test_the_chain_records_each_attempt_once(history, capsys):
    recorded = [(m["task"], m["contract"]["version"], m["verdict"]) for m in manifests(history.work_dir)]
    assert recorded == [
        ("first", "1.0.0", "promoted"),
        ("second", "1.0.0", "promoted"),
        ("first", "1.1.0", "promoted"),
        ("second", "1.0.0", "promoted"),
        ("first", "1.2.0", "rejected"),
        ("third", "1.0.0", "promoted"),
        ("first", "1.2.0", "promoted"),
    ]
    assert audit.main(["--work-dir", str(history.work_dir)]) == 0, capsys.readouterr().out


# ---- known tasks


@pytest.mark.parametrize("launch", ["again", "other_settings"])
def test_a_learned_stream_trains_nothing(history, launch):
    assert history.published(launch) == history.published("learn")
    said = history.launches[launch].stdout
    assert "first: learned already" in said and "second: learned already" in said and "== increment" not in said


def test_a_new_contract_version_goes_on_from_its_own_expert_and_gate_and_the_newest_shared_expert(history):
    assert same(history.expert(3, "dedicated"), history.expert(1, "dedicated"))
    assert same(history.expert(3, "gate"), history.expert(1, "gate"))
    assert same(history.expert(3, "shared"), history.expert(2, "shared"))
    # not the other task's, and no fresh start
    assert not same(history.expert(3, "dedicated"), history.expert(2, "dedicated"))
    assert not same(history.expert(2, "shared"), history.expert(1, "shared"))
    assert history.manifest(3)["contract"]["prompt"] == "{text}\nVerdict:"


def test_new_data_under_the_same_contract_is_a_new_increment_from_its_own_expert(history):
    old, new = history.manifest(2), history.manifest(4)
    assert old["contract"] == new["contract"]
    assert old["data"]["train"]["digest"] != new["data"]["train"]["digest"]
    assert same(history.expert(4, "dedicated"), history.expert(2, "dedicated"))
    assert same(history.expert(4, "shared"), history.expert(3, "shared"))


def test_the_old_bundle_is_still_there_and_serves_as_it_did(history):
    bundles: dict = {}
    for manifest in manifests(history.work_dir)[:2]:  # the fold of the shorter chain
        bundles |= manifest["bundles"]
    newest = json.loads((history.work_dir / "champion.json").read_text())["bundles"]
    assert bundles["first"]["dedicated"] != newest["first"]["dedicated"]
    for digest in {digest for bundle in bundles.values() for digest in bundle.values()}:
        assert sha256((history.work_dir / "bank" / f"{digest}.safetensors").read_bytes()).hexdigest() == digest
    then = pq.read_table(history.work_dir / "increments" / "0002-second" / "predictions" / "first.parquet")
    now = pq.read_table(history.answers)
    for column in ("row_id", "answer", "score", "label_scores"):
        assert now[column].to_pylist() == then[column].to_pylist()


# ---- rejections


def test_a_rejection_is_recorded_and_moves_no_bundle(history):
    rejected = history.manifest(5)
    assert (rejected["bundles"], rejected["state"]) == ({}, {})
    assert sorted(rejected["bank"]) == ["dedicated", "gate", "shared", "state"]
    assert rejected["gate"]["promoted"] is False and "gate.min_metric 1.01" in rejected["gate"]["reasons"][0]
    # champion.json after that launch, worked out from the promoted increments 1 to 4 and the rejected head
    earlier = manifests(history.work_dir)[:4]
    bundles: dict = {}
    state: dict = {}
    for manifest in earlier:
        bundles |= manifest["bundles"]
        state |= {manifest["task"]: manifest["state"]}
    head = history.published("rejected")["increments/0005-first/manifest.json"]
    champion = {"format": 1, "head": head, "increment": 4, "bundles": bundles, "state": state}
    content = json.dumps(champion, sort_keys=True, separators=(",", ":")).encode()
    assert history.published("rejected")["champion.json"] == sha256(content).hexdigest()
    assert "increment 5 rejected" in history.launches["rejected"].stdout


def test_the_same_inputs_are_not_trained_again_after_a_rejection(history):
    assert history.published("rejected_again") == history.published("rejected")
    said = history.launches["rejected_again"].stdout
    assert "first: rejected before with these very inputs" in said and "== increment" not in said


def test_on_reject_continue_goes_on_from_the_champion(history):
    said = history.launches["go_on"].stdout
    assert "first: rejected before" in said and "== increment 6: third" in said and "== increment 7" not in said
    third = history.manifest(6)
    files = history.published("go_on")
    assert third["parent"] == files["increments/0005-first/manifest.json"]
    unserved = set(history.manifest(5)["bank"].values())
    served = json.loads((history.work_dir / "champion.json").read_text())
    used = {sha for table in (served["bundles"], served["state"]) for roles in table.values() for sha in roles.values()}
    assert used.isdisjoint(unserved)


def test_other_settings_give_a_rejected_task_another_try_from_the_champions_expert(history):
    assert same(history.expert(7, "dedicated"), history.expert(3, "dedicated"))
    assert not same(history.expert(7, "dedicated"), history.expert(5, "dedicated"))
    assert same(history.expert(7, "shared"), history.expert(6, "shared"))


def test_mlflow_keeps_rejected_versions_as_candidates_only(history):
    from mlflow import MlflowClient

    uri = f"sqlite:///{history.work_dir / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = sorted(client.search_model_versions("name = 'tiny'"), key=lambda version: int(version.version))
    assert [version.tags["verdict"] for version in versions] == [m["verdict"] for m in manifests(history.work_dir)]
    aliases = client.get_registered_model("tiny").aliases
    assert {name: int(version) for name, version in aliases.items()} == {"candidate": 7, "champion": 7}
    experiment = client.get_experiment_by_name("perennial")
    runs = client.search_runs([experiment.experiment_id])
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 7 and len(runs) == 8


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for what 12 steps at a learning rate of 1e-9 can do."""
    return bool((one - other).abs().max() < 1e-6)

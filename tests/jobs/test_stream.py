"""The main job on two ranks (ZeRO-3), seen from outside: what it prints, leaves on disk, and tells MLflow."""

import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import audit
from tests.jobs.many import digests
from tests.jobs.streams import LEARNING, TASKS

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own
STEPS = 18  # 48 rows x 3 epochs / 8 rows


@pytest.fixture(scope="module")
def client(learned):
    """MLflow's own client on the stream's database."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{learned.work_dir / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def runs(client):
    """(parent runs, child runs by increment)."""
    experiment = client.get_experiment_by_name("perennial")
    found = client.search_runs([experiment.experiment_id])
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, sorted(children, key=lambda run: int(run.data.tags["increment"]))


# ---- exit code and print-out


def test_both_launches_succeed_and_the_marker_says_so(learned):
    assert learned.first.code == 0, learned.first.text
    assert learned.second.code == 0, learned.second.text
    finished = json.loads((learned.work_dir / "finished.json").read_text())
    champion = json.loads((learned.work_dir / "champion.json").read_text())
    assert finished == {"exit_code": 0, "head": champion["head"]}
    assert not (learned.work_dir / "stopped.json").exists()
    assert not (learned.work_dir / "inflight").exists()


def test_until_ends_the_first_launch_and_the_second_learns_the_rest(learned):
    assert re.findall(r"== increment (\d+): (\w+)", learned.first.stdout) == [("1", "first")]
    assert re.findall(r"== increment (\d+): (\w+)", learned.second.stdout) == [("2", "second"), ("3", "third")]
    assert "first: learned already" in learned.second.stdout
    assert "inherited increments: 1 first (promoted)" in learned.second.stdout


def test_the_start_prints_the_derived_numbers(learned):
    said = learned.first.stdout
    assert "world size 2" in said and "batch 8 rows" in said
    # 3 layers x (two pairs D=48 -> F=92 and one F -> D) x rank 3
    assert f"shared {3 * 3 * 3 * (48 + 92):,}, dedicated {3 * 3 * 3 * (48 + 92):,}, gate {3 * 2 * 48:,}" in said
    assert f"task first 1.0.0: 48 training rows, {STEPS} steps" in said


def test_every_launch_says_what_its_first_step_waited_for_and_run_json_keeps_it(learned):
    records = [
        json.loads(path.read_text())["startup"] for path in sorted(learned.work_dir.glob("increments/*/run.json"))
    ]
    assert records[2] == {}  # the second launch made its first step in increment 2
    for record, launch in zip(records, (learned.first, learned.second), strict=False):
        phases = dict(record["phases"])
        assert list(phases)[-2:] == ["opening", "first step"]
        assert {"process group", "prepare", "backbone", "engine", "tracking"} <= set(phases)
        assert all(seconds >= 0 for seconds in phases.values())
        said = re.findall(r"^first step done ([\d.]+) s after the process began: imports", launch.stdout, re.MULTILINE)
        assert [float(seconds) for seconds in said] == [pytest.approx(sum(phases.values()), abs=0.051)]


def test_the_table_shows_every_row_of_r_and_the_baselines(learned):
    said = learned.second.stdout.partition("test scores after each increment")[2]
    lines = {line[:12].strip(): line[12:].split() for line in said.splitlines()}
    manifests = learned.manifests
    records = [json.loads(path.read_text()) for path in sorted(learned.work_dir.glob("increments/*/row.json"))]
    for number, task in enumerate(TASKS):
        row = manifests[number]["row"]
        assert list(row) == sorted(TASKS[: number + 1])
        shown = [f"{100 * row[name]:.1f}" for name in TASKS[: number + 1]] + ["-"] * (2 - number)
        assert lines[f"after {task}"][:3] == shown
    for baseline in ("zero_shot", "tfidf"):
        assert lines[baseline][:3] == [f"{100 * record['baselines'][baseline]:.1f}" for record in records]


def test_acc_and_bwt_are_those_of_the_rows(learned):
    rows = [manifest["row"] for manifest in learned.manifests]
    checks = [manifest["validation_row"] for manifest in learned.manifests]
    acc = sum(rows[2].values()) / 3
    bwt = [sum(r[2][task] - r[i][task] for i, task in enumerate(TASKS[:2])) / 2 for r in (rows, checks)]
    said = learned.second.stdout
    assert re.search(rf"^ACC +{100 * acc:.2f}$", said, re.MULTILINE)
    printed = re.search(r"^BWT +([+-][\d.]+) on test, ([+-][\d.]+) on validation$", said, re.MULTILINE)
    assert [float(value) for value in printed.groups()] == pytest.approx([100 * value for value in bwt], abs=0.005)


def test_the_end_says_where_the_heat_map_and_mlflow_are(learned):
    said = learned.second.stdout
    heat_map = re.search(r"^heat map +(.+)$", said, re.MULTILINE)[1]
    assert heat_map == str(learned.work_dir / "increments" / "0003-third" / "report.png")
    with open(heat_map, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert f"mlflow ui --backend-store-uri sqlite:///{learned.work_dir / 'mlflow.db'}" in said


# ---- disk


def test_later_increments_leave_every_earlier_bank_file_and_the_backbone_as_they_were(learned):
    before = {name: digest for name, digest in learned.after_first.items() if name.startswith("bank/")}
    after = digests(learned.work_dir)
    assert len(before) == 4  # shared, dedicated, gate, method state
    assert {name: after[name] for name in before} == before
    assert sum(name.startswith("bank/") for name in after) == 3 * len(before)
    assert digests(learned.inputs.backbone) == learned.backbone


def test_earlier_increment_folders_are_as_they_were(learned):
    before = {name: digest for name, digest in learned.after_first.items() if name.startswith("increments/")}
    after = digests(learned.work_dir)
    assert before and {name: after[name] for name in before} == before


def test_manifests_chain_up_to_the_champion(learned):
    on_disk = digests(learned.work_dir)
    names = [f"increments/{number:04d}-{task}/manifest.json" for number, task in enumerate(TASKS, start=1)]
    manifests = [json.loads((learned.work_dir / name).read_text()) for name in names]
    assert [manifest["parent"] for manifest in manifests] == [None, on_disk[names[0]], on_disk[names[1]]]
    champion = json.loads((learned.work_dir / "champion.json").read_text())
    assert champion["head"] == on_disk[names[2]] and champion["increment"] == 3
    table = {}
    for manifest in manifests:
        table |= manifest["bundles"]
    assert champion["bundles"] == table and sorted(table) == sorted(TASKS)


def test_a_manifest_accounts_for_every_file_and_row(learned):
    on_disk = digests(learned.work_dir)
    for manifest in learned.manifests:
        folder = f"increments/{manifest['increment']:04d}-{manifest['task']}"
        there = {name.removeprefix(f"{folder}/"): sha for name, sha in on_disk.items() if name.startswith(f"{folder}/")}
        assert manifest["files"] == {n: sha for n, sha in there.items() if n not in ("manifest.json", "run.json")}
        assert manifest["training"] == {"steps": STEPS, "rows_consumed": 48 * 3}
        assert {split: data["kept"] for split, data in manifest["data"].items()} == {
            "train": 48,
            "validation": 20,
            "test": 20,
        }
        assert all(f"bank/{sha}.safetensors" in on_disk for sha in manifest["bank"].values())


def test_a_manifest_names_no_place(learned):
    places = (str(learned.work_dir), str(learned.inputs.root), str(learned.inputs.backbone), "world_size", "sqlite")
    for path in learned.work_dir.glob("increments/*/manifest.json"):
        assert [place for place in places if place in path.read_text()] == []


@pytest.mark.parametrize("task", TASKS)
def test_predictions_hold_scores_from_which_the_row_follows(learned, task):
    for manifest in learned.manifests:
        if task not in manifest["row"]:
            continue
        folder = learned.work_dir / "increments" / f"{manifest['increment']:04d}-{manifest['task']}"
        table = pq.read_table(folder / "predictions" / f"{task}.parquet")
        rows = table.to_pylist()
        source = pq.read_table(learned.inputs.root / task / "test.parquet").to_pylist()
        truth = {row["id"]: row["label"] for row in source}
        assert {row["row_id"]: row["reference"] for row in rows} == truth
        labels = ["negative", "neutral", "positive"]
        for row in rows:
            scores = np.array(row["label_scores"], dtype=np.float64)
            assert row["answer"] == labels[int(scores.argmax())]
            assert math.isclose(row["score"], 1 / np.exp(scores - scores.max()).sum(), rel_tol=1e-5)
        right = sum(truth[row["row_id"]] == row["answer"] for row in rows)
        assert manifest["row"][task] == pytest.approx(right / len(rows), abs=1e-12)


def test_every_increment_changed_its_experts_and_its_answers_are_not_all_one(learned):
    bank = [sha for manifest in learned.manifests for sha in manifest["bank"].values()]
    assert len(set(bank)) == len(bank) == 12
    table = pq.read_table(learned.work_dir / "increments" / "0001-first" / "predictions" / "first.parquet")
    assert len(set(table["answer"].to_pylist())) > 1


# ---- MLflow


def test_mlflow_has_one_parent_run_over_both_launches_and_one_child_an_increment(runs):
    parents, children = runs
    assert [run.data.tags["stream"] for run in parents] == ["tiny"]
    assert [run.info.run_name for run in children] == ["0001-first", "0002-second", "0003-third"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in [*parents, *children]} == {"FINISHED"}


def test_mlflow_inputs_carry_the_data_digests(learned, runs):
    for run_, manifest in zip(runs[1], learned.manifests, strict=True):
        found = {}
        for entry in run_.inputs.dataset_inputs:
            tags = {tag.key: tag.value for tag in entry.tags}
            found[entry.dataset.name] = (entry.dataset.digest, tags["sha256"], tags["mlflow.data.context"])
        context = {"train": "training", "validation": "validation", "test": "testing"}
        assert found == {
            f"{manifest['task']}.{split}": (data["digest"][:36], data["digest"], context[split])
            for split, data in manifest["data"].items()
        }


def test_mlflow_parameters_are_the_resolved_configuration(runs):
    for run_ in runs[1]:
        parameters = run_.data.params
        assert parameters["method.name"] == "moe_cl" and parameters["method.lora.rank"] == "3"
        assert parameters["method.gate"] == "per_task"  # a default nobody wrote
        assert float(parameters["training.learning_rate"]) == LEARNING["training"]["learning_rate"]
        assert parameters["world_size"] == "2"


def test_mlflow_has_the_steps_and_the_rows(learned, client, runs):
    parents, children = runs
    for run_, manifest in zip(children, learned.manifests, strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
            history = client.get_metric_history(run_.info.run_id, name)
            assert [metric.step for metric in history] == [1, 5, 10, 15]
        row = {key.removeprefix("row."): value for key, value in run_.data.metrics.items() if key.startswith("row.")}
        assert row == manifest["row"]
    assert "adversary" in children[1].data.metrics and "adversary" not in children[0].data.metrics
    curve = client.get_metric_history(parents[0].info.run_id, "row.first")
    assert [(m.step, m.value) for m in curve] == [(n, m["row"]["first"]) for n, m in enumerate(learned.manifests, 1)]


def test_mlflow_holds_the_heat_map_and_the_manifest(learned, client, runs, tmp_path):
    for run_, manifest in zip(runs[1], learned.manifests, strict=True):
        folder = learned.work_dir / "increments" / f"{manifest['increment']:04d}-{manifest['task']}"
        for name in ("report.png", "manifest.json", "row.json"):
            fetched = client.download_artifacts(run_.info.run_id, name, str(tmp_path))
            with open(fetched, "rb") as file:
                assert file.read() == (folder / name).read_bytes()


def test_mlflow_versions_carry_parent_contract_and_data_digests_and_the_aliases_name_the_last(learned, client, runs):
    on_disk = digests(learned.work_dir)
    versions = sorted(client.search_model_versions("name = 'tiny'"), key=lambda version: int(version.version))
    assert len(versions) == 3
    for version, run_, manifest in zip(versions, runs[1], learned.manifests, strict=True):
        sha = on_disk[f"increments/{manifest['increment']:04d}-{manifest['task']}/manifest.json"]
        bundle = {f"bundle.{role}": digest for role, digest in manifest["bundles"][manifest["task"]].items()}
        data = {f"data_digest_{split}": entry["digest"] for split, entry in manifest["data"].items()}
        expected = {
            "parent": manifest["parent"] or "none",
            "manifest_sha256": sha,
            "head": sha,
            "contract_digest": manifest["contract"]["digest"],
            "contract_version": "1.0.0",
            "task": manifest["task"],
            "increment": str(manifest["increment"]),
            "verdict": "promoted",
            **data,
            **bundle,
        }
        assert {key: version.tags.get(key) for key in expected} == expected
        assert sorted(bundle) == ["bundle.dedicated", "bundle.gate", "bundle.shared"]
        assert version.run_id == run_.info.run_id and run_.data.tags["manifest_sha256"] == sha
    aliases = client.get_registered_model("tiny").aliases
    assert {name: int(version) for name, version in aliases.items()} == {"candidate": 3, "champion": 3}


# ---- audit (tests/jobs/test_tampering.py changes things)


def test_the_audit_of_what_was_published_passes(learned, capsys):
    assert audit.main(["--work-dir", str(learned.work_dir)]) == 0
    said = capsys.readouterr().out
    assert "all agree" in said and "DIFFERS" not in said

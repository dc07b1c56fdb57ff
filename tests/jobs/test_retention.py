"""What earlier tasks are served with after later increments, and the methods beside moe_cl, as whole jobs."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from jobs import audit
from tests.jobs.streams import TASKS, manifests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


def predictions(work_dir: Path, number: int, task: str) -> bytes:
    """The bytes of a task's predictions file in an increment."""
    folder = next((work_dir / "increments").glob(f"{number:04d}-*"))
    return (folder / "predictions" / f"{task}.parquet").read_bytes()


# ---- moe_cl: pin, follow, best


def test_with_pin_scores_and_prediction_files_of_earlier_tasks_never_change(on_two_ranks):
    work_dir, done = on_two_ranks.pin, on_two_ranks.done["pin"]
    assert done.code == 0, done.text
    rows = [manifest["row"] for manifest in manifests(work_dir)]
    checks = [manifest["validation_row"] for manifest in manifests(work_dir)]
    for number, task in enumerate(TASKS, start=1):
        own = predictions(work_dir, number, task)
        for later in range(number, 4):
            assert predictions(work_dir, later, task) == own
            assert rows[later - 1][task] == rows[number - 1][task]
            assert checks[later - 1][task] == checks[number - 1][task]
    scores = [scores_of(work_dir, 3, task) for task in TASKS]
    assert scores[0] != scores[1] != scores[2]  # the files are equal because nothing moved, not because all is one


def test_with_pin_an_increment_changes_its_own_bundle_alone(on_two_ranks):
    for manifest in manifests(on_two_ranks.pin):
        assert list(manifest["bundles"]) == [manifest["task"]]
        assert manifest["bundles"][manifest["task"]] == {
            role: manifest["bank"][role] for role in ("shared", "dedicated", "gate")
        }


def test_with_follow_every_bundle_holds_the_newest_shared_expert(methods):
    work_dir, done = methods["follow"]
    assert done.code == 0, done.text
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    assert {bundle["shared"] for bundle in bundles.values()} == {second["bank"]["shared"]}
    assert first["bank"]["shared"] != second["bank"]["shared"]
    assert bundles["first"] == first["bundles"]["first"] | {"shared": second["bank"]["shared"]}
    assert predictions(work_dir, 2, "first") != predictions(work_dir, 1, "first")  # it can be seen in the scores


def test_with_follow_and_one_gate_the_gate_moves_too(methods):
    work_dir, done = methods["follow_one_gate"]
    assert done.code == 0, done.text
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    newest = {role: second["bank"][role] for role in ("shared", "gate")}
    assert bundles["first"] == {"dedicated": first["bank"]["dedicated"]} | newest
    assert bundles["second"] == second["bundles"]["second"]


def test_with_best_no_earlier_task_gets_worse_on_validation(learned):
    assert learned.second.code == 0, learned.second.text
    checks = [manifest["validation_row"] for manifest in learned.manifests]
    for before, after in pairwise(checks):
        assert all(after[task] >= score for task, score in before.items())
    bwt = sum(checks[2][task] - checks[i][task] for i, task in enumerate(TASKS[:2])) / 2
    assert bwt >= 0


def test_with_best_a_task_moves_exactly_when_its_gain_is_over_the_margin(learned):
    decided = 0
    for manifest in learned.manifests[1:]:
        for task, choice in manifest["gate"]["retention"].items():
            assert choice["policy"] == "best"
            assert choice["moved"] == (choice["gain"] > choice["margin"]) == (task in manifest["bundles"])
            if choice["moved"]:
                assert manifest["bundles"][task]["shared"] == manifest["bank"]["shared"]
            decided += 1
    assert decided == 3


# ---- the methods beside it


RIVALS = ["sequential", "per_task", "zero_shot", "replay", "multitask", "ewc", "olora", "mocl", "moses"]


@pytest.mark.parametrize("name", [*RIVALS, "ablated"])
def test_a_method_completes_and_its_work_dir_passes_the_audit(methods, name, capsys):
    work_dir, done = methods[name]
    assert done.code == 0, done.text
    assert [manifest["method"] for manifest in manifests(work_dir)] == [name if name in RIVALS else "moe_cl"] * 2
    assert json.loads((work_dir / "finished.json").read_text())["exit_code"] == 0
    assert audit.main(["--work-dir", str(work_dir)]) == 0, capsys.readouterr().out


def test_sequential_serves_every_task_with_the_latest_adapter_and_forgets(methods):
    work_dir, _ = methods["sequential"]
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    assert bundles == {task: {"adapter": second["bank"]["adapter"]} for task in ("first", "second")}
    # the second task turns the labels round: what was learned first must be lost
    assert second["row"]["first"] < first["row"]["first"] - 0.2


@pytest.mark.parametrize("name", ["replay", "multitask", "ewc"])
def test_one_expert_for_all_is_served_as_it_was_learned_last(methods, name):
    work_dir, _ = methods[name]
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    assert bundles == {task: {"adapter": second["bank"]["adapter"]} for task in ("first", "second")}
    assert second["bank"]["adapter"] != first["bank"]["adapter"]


def test_old_rows_come_on_top_of_the_new_ones(methods):
    accounts = {
        name: [m["training"] for m in manifests(methods[name][0])] for name in ("replay", "multitask", "ablated")
    }
    first, steps = {"rows_consumed": 48, "steps": 6}, 6
    assert all(account[0] == first for account in accounts.values())
    assert accounts["replay"][1] == {"rows_consumed": 48 + 14, "steps": steps}  # floor(0.3 * 48)
    assert accounts["ablated"][1] == {"rows_consumed": 48 + 48, "steps": steps}
    assert accounts["multitask"][1] == {"rows_consumed": 96, "steps": 12}


def test_ewcs_fisher_information_adds_up_in_the_bank(methods):
    work_dir, _ = methods["ewc"]
    before, after = (load_file(work_dir / "bank" / f"{m['state']['state']}.safetensors") for m in manifests(work_dir))
    expert = load_file(work_dir / "bank" / f"{manifests(work_dir)[0]['bank']['adapter']}.safetensors")
    assert {name.removeprefix("adapter/"): value.shape for name, value in before.items()} == {
        name: value.shape for name, value in expert.items()
    }
    for name, value in after.items():
        assert (before[name] >= 0).all() and (value >= before[name]).all() and (value > before[name]).any(), name


def test_olora_serves_every_task_with_all_experts_and_publishes_each_once(methods):
    work_dir, _ = methods["olora"]
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    summed = {"adapter": second["bank"]["adapter"], "past.1": first["bank"]["adapter"]}
    assert bundles == {"first": summed, "second": summed} and list(second["bank"]) == ["adapter"]
    assert len(list((work_dir / "bank").iterdir())) == 2
    assert "penalty" in methods["olora"][1].stdout


def test_mocl_mixes_the_earlier_expert_in_and_leaves_the_earlier_task_as_it_was(methods):
    work_dir, _ = methods["mocl"]
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    assert bundles["first"] == first["bundles"]["first"] == {"adapter": first["bank"]["adapter"]}
    assert predictions(work_dir, 2, "first") == predictions(work_dir, 1, "first")
    names = {role: second["bank"][role] for role in ("adapter", "past_weights")}
    assert bundles["second"] == names | {"past.1": first["bank"]["adapter"]}
    (weight,) = load_file(work_dir / "bank" / f"{names['past_weights']}.safetensors")["weights"].tolist()
    assert 0.9 < weight < 1  # the tasks' texts are alike


def test_moses_stores_bits_and_new_values_and_leaves_the_earlier_task_as_it_was(methods):
    work_dir, done = methods["moses"]
    first, second = manifests(work_dir)
    assert predictions(work_dir, 2, "first") == predictions(work_dir, 1, "first")
    assert second["bundles"] == {"second": {"adapter": second["bank"]["adapter"], "past.1": first["bank"]["adapter"]}}
    files = [
        load_file(work_dir / "bank" / f"{manifest['bank']['adapter']}.safetensors") for manifest in (first, second)
    ]
    for manifest, file in zip((first, second), files, strict=True):
        account = manifest["training"]
        assert account["stored_bytes"] == sum(tensor.nbytes for tensor in file.values())
        new = sum(len(tensor) for name, tensor in file.items() if name.endswith("values"))
        assert new == account["mask_parameters"] - account["mask_reused"]
        assert f"mask_reused {account['mask_reused']:,}" in done.stdout
    assert 0 == first["training"]["mask_reused"] < second["training"]["mask_reused"]
    assert second["training"]["stored_bytes"] < first["training"]["stored_bytes"]
    client = MlflowClient(tracking_uri=f"sqlite:///{work_dir / 'mlflow.db'}")
    logged = client.get_run(json.loads(next(work_dir.glob("increments/0002-*/run.json")).read_text())["mlflow_run_id"])
    assert logged.data.metrics["mask_reused"] == second["training"]["mask_reused"]


def test_a_warm_start_is_chosen_on_validation_and_negatives_may_be_real_rows(methods):
    _, done = methods["ablated"]
    assert "of 2 has the least validation loss" in done.stdout and "adversary" in done.stdout


def test_per_task_keeps_every_adapter_and_every_answer(methods):
    work_dir, _ = methods["per_task"]
    first, second = manifests(work_dir)
    bundles = json.loads((work_dir / "champion.json").read_text())["bundles"]
    assert bundles == {m["task"]: {"adapter": m["bank"]["adapter"]} for m in (first, second)}
    assert predictions(work_dir, 2, "first") == predictions(work_dir, 1, "first")


def test_zero_shot_trains_nothing_and_publishes_no_expert(methods):
    work_dir, done = methods["zero_shot"]
    assert "trainable parameters: none" in done.stdout
    for manifest in manifests(work_dir):
        assert manifest["bank"] == {} and manifest["bundles"] == {manifest["task"]: {}}
        assert manifest["training"] == {"steps": 0, "rows_consumed": 0}
    assert not (work_dir / "bank").exists()


def test_a_regression_past_the_limit_is_rejected_and_the_champion_keeps_serving(methods, capsys):
    work_dir, done = methods["guarded"]
    assert done.code == 3, done.text
    first, second = manifests(work_dir)
    assert (first["verdict"], second["verdict"]) == ("promoted", "rejected")
    fall = first["row"]["first"] - second["row"]["first"]
    assert fall > 0.1
    assert f"first fell by {fall:.4f}" in second["gate"]["reasons"][0] and second["gate"]["reasons"][0] in done.stdout
    champion = json.loads((work_dir / "champion.json").read_text())
    assert champion["bundles"] == first["bundles"] and champion["increment"] == 1
    assert json.loads((work_dir / "finished.json").read_text())["exit_code"] == 3
    assert audit.main(["--work-dir", str(work_dir)]) == 0, capsys.readouterr().out


def scores_of(work_dir: Path, number: int, task: str) -> list[float]:
    """The score column of a task's predictions in an increment."""
    folder = next((work_dir / "increments").glob(f"{number:04d}-*"))
    return pq.read_table(folder / "predictions" / f"{task}.parquet")["score"].to_pylist()

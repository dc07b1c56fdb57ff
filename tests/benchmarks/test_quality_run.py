"""`jobs/benchmark.py quality` on a tiny backbone: what a cell holds, that it is run once, that a broken one goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.benchmarks.quality import cells, command, launch, run, statistics
from pipeline.benchmarks.quality.few_rows import unseen_bundle
from pipeline.benchmarks.quality.options import QualityOptions
from tests.benchmarks.quality_cells import NUMBERS
from tests.helpers import _FILLERS

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("social_bias", "gender_weibo", "entertainment_sport")
SETTINGS = ("zero_shot", "moe_cl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three two-class tasks in the form of compliance3, without a validation file for one of them."""
    root = tmp_path_factory.mktemp("quality-data")
    for task in TASKS:
        (root / task).mkdir()
        for split, count in (("train", 40), ("validation", 12), ("test", 24)):
            if (task, split) != (TASKS[1], "validation"):
                rows = [row_of(task, split, number) for number in range(count)]
                pq.write_table(pa.Table.from_pylist(rows), root / task / f"{split}.parquet")
    return root


def row_of(task: str, split: str, number: int) -> dict[str, str]:
    """A row that no other split has."""
    word, other = _FILLERS[number % 10], _FILLERS[number // 10]
    text = f"{split} {number}: the {word} and the {other} of {task}"
    return {"id": f"{task}-{split}-{number}", "text": text, "label": ("violation", "compliant")[number % 2]}


def options_of(backbone: Path, data: Path, folder: Path, **changes) -> QualityOptions:
    """A run of seconds."""
    made = {"backbone": str(backbone), "data": str(data), "out": str(folder / "out"), "work_dir": str(folder / "work")}
    return QualityOptions(**{"suite": "compliance3", "dtype": "float32", **NUMBERS, **made, **changes})


@pytest.fixture(scope="module")
def learned(tmp_path_factory, backbone_dir, data) -> tuple[Path, list[list[str]], str]:
    """Two cells of order O2 learned by the command: its folder, the launches, what it printed."""
    folder = tmp_path_factory.mktemp("quality")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in NUMBERS.items()]
    arguments = ["--suite", "compliance3", "--data", data, "--backbone", backbone_dir, "--out", folder / "out"]
    arguments += ["--work-dir", folder / "work", "--dtype", "float32", "--orders", "O2", "--methods", *SETTINGS, *sizes]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.quality_worker", folder / "trace", "quality", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, [json.loads(line) for line in (folder / "trace").read_text().splitlines()], done.stdout


def records(folder: Path) -> dict[str, dict]:
    """The cells by setting."""
    found = [json.loads(path.read_text()) for path in (folder / "out" / "compliance3").glob("*.json")]
    return {record["setting"]: record for record in found}


def test_a_cell_is_the_real_job_with_few_test_rows_until_the_last_task(learned):
    for setting in SETTINGS:
        first, second, third = [rest for name, *rest in learned[1] if name == setting]
        job = str(ROOT / "jobs" / "continual.py")
        before_last = TASKS[2] if setting != "zero_shot" else TASKS[1]  # O2; without an order, O1
        assert first[0] == second[0] == job
        assert first[3:] == ["--until", before_last, "--set", "rows.test=6"] and second[3:] == []
        assert third[:2] == ["--module", "pipeline.benchmarks.quality.few_rows"] and third[3] == "6"


def test_a_cells_answers_say_its_scores_again(learned):
    for record in records(learned[0]).values():
        rows = 20
        for increment, (row, answers) in enumerate(zip(record["R"], record["answers"], strict=True)):
            last = increment == len(record["R"]) - 1
            for task, score in zip(record["tasks"], row, strict=True):
                if score is None:
                    assert task not in answers
                    continue
                own = record["references"][task]
                if not last:
                    own = "".join(c for c, one in zip(own, record["stream_rows"][task], strict=True) if one == "1")
                assert len(own) == len(answers[task]) == (rows if last else 6)
                assert score == sum(a == b for a, b in zip(answers[task], own, strict=True)) / len(own)
        assert set(record["answers_ahead"]) == set(record["tasks"][1:])
        assert set(record["answers_again"]) == set(record["tasks"])


def test_what_has_not_moved_has_neither_gained_nor_lost(learned):
    bare = records(learned[0])["zero_shot"]
    for increment, task in enumerate(bare["tasks"][:-1]):
        assert bare["answers_again"][task] == bare["answers"][increment][task]
    figures = statistics.figures(bare, zero_shot=bare, per_task=bare)
    assert [figures[name] for name in ("bwt", "fwt", "transfer")] == [0, 0, 0]


def test_a_task_is_answered_ahead_by_the_bare_backbone_shared_expert_or_latest_adapter(learned):
    found = records(learned[0])
    bare = found["zero_shot"]
    for task, answers in bare["answers_ahead"].items():
        mask = bare["stream_rows"][task]
        everything = bare["answers"][-1][task]
        assert answers == "".join(a for a, one in zip(everything, mask, strict=True) if one == "1")
    assert unseen_bundle("moe_cl", {"shared": "s", "dedicated": "d", "gate": "g"}) == {"shared": "s"}
    assert unseen_bundle("olora", {"adapter": "a", "past.1": "b"}) == {"adapter": "a", "past.1": "b"}
    assert unseen_bundle("per_task", {"adapter": "a"}) == {}


def test_a_cell_says_what_it_cost(learned):
    found = records(learned[0])
    assert found["zero_shot"]["trained_parameters"] == [0, 0, 0] == found["zero_shot"]["served_bytes"]
    # the tiny Llama: 3 layers, D 48, F 92, three projections of rank 8, and for two experts a gate of 2 x 48
    pair = 3 * 3 * 8 * (48 + 92)
    assert found["moe_cl"]["trained_parameters"] == [2 * pair + 3 * 2 * 48] * 3
    served = found["moe_cl"]["served_bytes"]
    assert all(4 * (2 * pair + 288) < size for size in found["moe_cl"]["published_bytes"])
    assert served[0] < served[1] < served[2] <= sum(found["moe_cl"]["published_bytes"])


def test_a_cell_keeps_what_may_be_decided_alone_and_how_rows_do_without_their_tasks_name(learned):
    found = records(learned[0])
    for record in found.values():
        for task, entry in record["review"].items():
            alone, answers = record["decided"][task], record["answers"][-1][task]
            assert len(alone) == len(answers) == 20 and entry["target_precision"] == 0.95
            assert alone.count("1") / 20 == entry["test"]["stripping_rate"]
            right = [a == b for a, b, one in zip(answers, record["references"][task], alone, strict=True) if one == "1"]
            assert entry["test"]["precision"] == (sum(right) / len(right) if right else None)
    assert [len([s for s in row if s is not None]) for row in found["moe_cl"]["R_inferred"]] == [1, 2, 3]
    assert "R_inferred" not in found["zero_shot"]


def test_every_method_and_order_sees_the_same_rows(learned):
    found = records(learned[0])
    assert len({json.dumps(record["deciding"]["data"], sort_keys=True) for record in found.values()}) == 1
    assert all(r["kept_rows"][t]["train"] == NUMBERS["train_rows"] for r in found.values() for t in TASKS)


def test_nothing_private_and_no_work_folder_is_left(learned, data):
    text = json.dumps(list(records(learned[0]).values()))
    assert all(private not in text for private in (os.uname().nodename, str(ROOT), str(data), str(learned[0])))
    assert list((learned[0] / "work").iterdir()) == []


def test_table_and_pictures_come_with_the_run(learned):
    folder, _, printed = learned
    report = (folder / "out" / "compliance3.md").read_text()
    assert report in printed and "| moe_cl | O2 |" in report and "(macro F1)" in report
    for name in ("matrices", "tasks", "bytes"):
        assert (folder / "out" / f"compliance3-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_cell_is_not_run_again_and_the_report_can_be_made_without_it(
    learned, backbone_dir, data, monkeypatch
):
    folder = learned[0]
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("a finished cell is run"))
    options = options_of(backbone_dir, data, folder, methods=SETTINGS, orders=("O2",))
    said: list[str] = []
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert command.run_command(options, said.append) == 0
    assert said[0] == "2 cells, 2 finished before"
    text, _ = command.write_report(options_of(backbone_dir, data, folder, report_only=True))
    assert text.encode() == before[folder / "out" / "compliance3.md"]
    assert before == {path: path.read_bytes() for path in before}


def test_a_broken_cell_goes_on_and_is_launched_only_for_what_is_missing(tmp_path, backbone_dir, data, monkeypatch):
    options = options_of(backbone_dir, data, tmp_path, methods=("sequential",), orders=("O1",))
    [cell] = run.cells_of(options, cells.settings_of(options.methods), cells.rate_for)
    folder = launch.work_folder(cell)
    launches: list[list[str]] = []
    increments = iter([2, 3])

    def stop_once(_cell, _folder, arguments, _say) -> None:
        launches.append(arguments)
        if arguments[0] == "--module":
            return
        for number in range(next(increments)):
            made = folder / launch.WORK / "increments" / str(number)
            made.mkdir(parents=True, exist_ok=True)
            (made / "manifest.json").touch()
        if len(launches) == 1:
            raise launch.Stopped(cell.name)

    monkeypatch.setattr(launch, "launch", stop_once)
    monkeypatch.setattr(
        run, "collect", lambda *_: {"format": 1, "R": [[1.0]], "R_validation": [[1.0]], "wall_seconds": 1}
    )
    with pytest.raises(launch.Stopped):
        run.run_cells([cell], lambda _: None)
    assert folder.is_dir() and not cell.file.exists()
    run.run_cells([cell], lambda _: None)
    assert cell.file.is_file() and not folder.exists()
    assert ["--until" in arguments for arguments in launches] == [True, False, False]


def test_a_request_to_stop_ends_the_command_with_its_own_exit_code(tmp_path, backbone_dir, data, monkeypatch):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM was not heard")

    monkeypatch.setattr(run, "finish", terminated)
    options = options_of(backbone_dir, data, tmp_path, methods=("sequential",), orders=("O1",))
    said: list[str] = []
    assert command.run_command(options, said.append) == 75 and "goes on from here" in said[-1]


def test_a_failed_launch_shows_the_end_of_its_log(tmp_path, backbone_dir, data):
    options = options_of(backbone_dir, data, tmp_path, methods=("sequential",), orders=("O1",))
    [cell] = run.cells_of(options, cells.settings_of(options.methods), cells.rate_for)
    script = tmp_path / "ends.py"
    script.write_text("import sys; print('no such thing'); sys.exit(3)")
    folder = launch.work_folder(cell)
    folder.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="ended with 3:\nno such thing"):
        launch.launch(cell, folder, [str(script)], lambda _: None)
    assert len(json.loads((folder / launch.LAUNCHES).read_text())) == 1, "its seconds count"


def test_a_cell_that_fails_does_not_keep_the_others_from_running(tmp_path, backbone_dir, data, monkeypatch):
    started = []

    def finish(cell, say):
        started.append(cell.setting.name)
        if cell.setting.name == "per_task":
            raise RuntimeError("no space left")
        return {"R": [[1.0]], "R_validation": [[1.0]], "wall_seconds": 1.0}

    monkeypatch.setattr(run, "finish", finish)
    options = options_of(backbone_dir, data, tmp_path, methods=("per_task", "sequential"), orders=("O1",))
    said: list[str] = []
    assert command.run_command(options, said.append) == 1
    assert started == ["per_task", "sequential"] and any("no space left" in line for line in said)
    assert any("1 of 2 cells failed: per_task-any" in line for line in said)


def test_the_chosen_rate_is_the_best_on_validation_and_later_runs_take_it(tmp_path, backbone_dir, data, monkeypatch):
    validation = {2e-4: 0.4, 5e-4: 0.7, 1e-3: 0.7, 2e-3: 0.1}

    def finish(cell, say):
        score = validation[cell.learning_rate]
        return {"R": [[1 - score]], "R_validation": [[score]], "wall_seconds": 1.0}

    monkeypatch.setattr(run, "finish", finish)
    options = options_of(backbone_dir, data, tmp_path, methods=("sequential",), choose=True)
    said: list[str] = []
    assert command.run_command(options, said.append) == 0
    assert "| sequential | 40.0 | 70.0 | 70.0 | 10.0 | 0.0005 |" in said[-1]
    by_name = {setting.name: setting for setting in cells.settings_of()}
    assert cells.rate_for(options, by_name["replay_10"]) == 5e-4  # takes that of `sequential`

"""A champion restored and a task retired in the life of a stream: learning, serving, measuring and the audit go on."""

import json

import pyarrow.parquet as pq
import pytest

from tests.helpers import make_stream, make_task, save_backbone
from tests.jobs.launch import Case, run_many
from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(900)  # set-up is one launch
SECTIONS = {
    "method": {"retention": {"policy": "pin"}},
    "evaluation": {"baselines": []},
    "router": {"features": 64, "layers": 1},
}


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """(work_dir, what became of each command in turn, folder of the answers)."""
    folder = tmp_path_factory.mktemp("life")
    root, work_dir = folder / "data", folder / "work"
    first, second, third = (make_task(root, name, turn=turn) for turn, name in enumerate(("one", "two", "three")))
    backbone = save_backbone(folder / "backbone")
    both = make_stream(folder / "both.yaml", work_dir, backbone, root, [first, second], **SECTIONS)
    without = make_stream(folder / "without.yaml", work_dir, backbone, root, [second, third], **SECTIONS)

    def bank(*arguments):
        return Case("bank", ["--work-dir", work_dir, *arguments])

    def predict(task, name, *more):
        data = root / "two" / "test.parquet"
        arguments = ["--task", task, "--data", data, "--out", folder / f"{name}.parquet", *more]
        return Case("predict", ["--work-dir", work_dir, *arguments])

    cases = {
        "learn": Case("continual", ["--stream", both]),  # 1 one, 2 two
        "restore": bank("restore", "1"),  # 3
        "relearn": Case("continual", ["--stream", both]),  # 4 two
        "before": predict("two", "before"),
        "retire": bank("retire", "one"),  # 5
        "retired": predict("one", "no"),
        "retired_then": predict("one", "no", "--increment", "1"),
        "unrouted": predict("auto", "no"),
        "still": predict("two", "still"),
        "refused": Case("continual", ["--stream", both]),
        "go_on": Case("continual", ["--stream", without]),  # 6 three
        "routed": predict("auto", "routed"),
        "after": predict("two", "after"),
        "evaluate": Case("evaluate", ["--work-dir", work_dir]),
        "garbage": bank("gc"),
        "audit": Case("audit", ["--work-dir", work_dir]),
    }
    return work_dir, dict(zip(cases, run_many(list(cases.values()), folder / "out"), strict=True)), folder


def test_commands_end_as_they_should(life):
    _, done, _ = life
    refused = {"retired", "retired_then", "unrouted", "refused"}
    for name, result in done.items():
        assert result.code == (2 if name in refused else 0), (name, result.text)
        assert "Traceback" not in result.text, (name, result.text)


def test_the_stream_goes_on_from_the_restored_champion(life):
    work_dir, done, _ = life
    second, third, fourth = manifests(work_dir)[1:4]
    assert (third["verdict"], third["to"]) == ("restored", 1)
    assert (fourth["task"], fourth["increment"], fourth["verdict"]) == ("two", 4, "promoted")
    assert "one: learned already" in done["relearn"].stdout and "increment 4: two" in done["relearn"].stdout
    assert fourth["data"] == second["data"] and set(fourth["row"]) == {"one", "two"}


def test_a_retired_task_is_refused_and_the_others_answer_as_before(life):
    _, done, folder = life
    for name in ("retired", "retired_then"):
        assert "task 'one' was withdrawn with its experts (increment 5)" in done[name].stderr
    assert "has no router" in done["unrouted"].stderr
    assert "task 'one' was withdrawn (increment 5); take its contract out of the stream" in done["refused"].stderr
    answers = [pq.read_table(folder / f"{name}.parquet") for name in ("before", "still", "after")]
    assert answers[0].num_rows and answers[0].equals(answers[1]) and answers[0].equals(answers[2])


def test_what_the_retired_task_left_is_gone_and_the_next_increment_knows_it_no_more(life):
    work_dir, done, folder = life
    fifth, sixth = manifests(work_dir)[4:6]
    assert fifth["verdict"] == "retired" and len(fifth["withdrawn"]) >= 6
    assert not [path for path in work_dir.rglob("one.parquet") if path.is_file()]
    assert not (work_dir / "prepared" / "one").exists() or not list((work_dir / "prepared" / "one").iterdir())
    assert (sixth["task"], set(sixth["row"])) == ("three", {"two", "three"})
    assert set(pq.read_table(folder / "routed.parquet")["task"].to_pylist()) <= {"two", "three"}
    assert "  two" in done["evaluate"].stdout and "  one" not in done["evaluate"].stdout
    champion = json.loads((work_dir / "champion.json").read_text())
    assert set(champion["bundles"]) == {"two", "three"}


def test_the_audit_agrees_with_disk_and_mlflow_and_nothing_is_left_over(life):
    work_dir, done, _ = life
    assert "all agree" in done["audit"].stdout and "task one" in done["audit"].stdout
    assert done["garbage"].stdout.strip() == "everything is reached"
    assert not (work_dir / "lock.json").exists() and not (work_dir / "inflight").exists()

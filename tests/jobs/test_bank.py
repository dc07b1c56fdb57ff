"""A champion restored and a task retired in the life of a stream: learning, serving, measuring and the audit go on."""

import json

import pyarrow.parquet as pq
import pytest

from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(900)  # set-up is one launch


def test_commands_end_as_they_should(life):
    done = life.done
    refused = {"locked", "retired", "retired_then", "unrouted", "refused"}
    for name, result in done.items():
        assert result.code == (2 if name in refused else 0), (name, result.text)
        assert "Traceback" not in result.text, (name, result.text)


def test_the_stream_goes_on_from_the_restored_champion(life):
    work_dir, done = life.work_dir, life.done
    second, third, fourth = manifests(work_dir)[1:4]
    assert (third["verdict"], third["to"]) == ("restored", 1)
    assert (fourth["task"], fourth["increment"], fourth["verdict"]) == ("two", 4, "promoted")
    assert "one: learned already" in done["relearn"].stdout and "increment 4: two" in done["relearn"].stdout
    assert fourth["data"] == second["data"] and set(fourth["row"]) == {"one", "two"}


def test_a_retired_task_is_refused_and_the_others_answer_as_before(life):
    done, folder = life.done, life.folder
    for name in ("retired", "retired_then"):
        assert "task 'one' was withdrawn with its experts (increment 5)" in done[name].stderr
    assert "has no router" in done["unrouted"].stderr
    assert "task 'one' was withdrawn (increment 5); take its contract out of the stream" in done["refused"].stderr
    answers = [pq.read_table(folder / f"{name}.parquet") for name in ("before", "still", "after")]
    assert answers[0].num_rows and answers[0].equals(answers[1]) and answers[0].equals(answers[2])


def test_what_the_retired_task_left_is_gone_and_the_next_increment_knows_it_no_more(life):
    work_dir, done, folder = life.work_dir, life.done, life.folder
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
    work_dir, done = life.work_dir, life.done
    assert "all agree" in done["audit"].stdout and "task one" in done["audit"].stdout
    assert done["garbage"].stdout.strip() == "everything is reached"
    assert not (work_dir / "lock.json").exists() and not (work_dir / "inflight").exists()


def test_a_work_dir_that_another_machine_did_not_let_go_is_not_written(life):
    assert "node-7, process 4, since noon: other" in life.done["locked"].stderr
    assert "--break-lock" in life.done["locked"].stderr
    assert [path.name for path in (life.folder / "left").iterdir()] == ["lock.json"]

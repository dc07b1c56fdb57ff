"""Two real jobs train at once against the tracking server of docker/compose.yaml, which dies under them twice: `make
proof-tracking`. What it shows in the end is held against the same streams learned alone, each with its own database.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from pipeline.tracking.outbox import read_outbox
from tests.helpers import make_stream, make_task
from tests.jobs.launch import ROOT, run, started
from tests.tracking.accounts import aliases_of, find_bytes, runs_of, versions_of
from tests.tracking.stack import CANARIES, lacking, running_stack

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(lacking()), reason=lacking() or "-")]
TASKS = {"left": ("left_a", "left_b", "left_c"), "right": ("right_a", "right_b", "right_c")}
TRAINING = {"epochs": 4, "learning_rate": 1e-2}
TIMES = ("seconds", "tokens_per_second", "peak", "memory")  # in the names of numbers that no two runs share


@pytest.fixture(scope="module")
def streams(tmp_path_factory, backbone_dir):
    """Both streams' files, for a folder of work_dirs and an address."""
    root = tmp_path_factory.mktemp("two-data")
    for turn, task in enumerate((*TASKS["left"], *TASKS["right"])):
        make_task(root, task, turn=turn % 3, seed=turn)

    def write(folder, uri):
        folder.mkdir(parents=True)
        return {
            name: make_stream(
                folder / f"{name}.yaml",
                folder / name,
                backbone_dir,
                root,
                [root / f"{task}.yaml" for task in tasks],
                stream=name,
                training=TRAINING,
                tracking={"uri": uri} if uri else {},
            )
            for name, tasks in TASKS.items()
        }

    return write


def test_two_streams_at_once_through_two_outages_are_each_told_whole_and_apart(streams, tmp_path, tmp_path_factory):
    alone = streams(tmp_path / "alone", None)
    for stream in alone.values():
        done = run("jobs/continual.py", "--stream", stream)
        assert done.code == 0, done.text

    folder, left = tmp_path / "shared", []
    with running_stack(tmp_path_factory.mktemp("stack"), workers=2) as stack, contextlib.ExitStack() as jobs:
        shared = streams(folder, stack.uri)
        environment = {**stack.login, "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
        began = {
            name: jobs.enter_context(started("jobs/continual.py", "--stream", stream, environment=environment))
            for name, stream in shared.items()
        }

        def all_reach(number):
            """Wait until both streams published this many increments or ended."""
            while not all(
                len(list((folder / name).glob("increments/*/manifest.json"))) >= number
                or job.process.poll() is not None
                for name, job in began.items()
            ):
                time.sleep(0.05)

        any_event = lambda: any(read_outbox(folder / name)[0] for name in shared)  # noqa: E731
        while not any(list((folder / name).glob("increments/*/manifest.json")) for name in shared):
            time.sleep(0.05)
        at = time.monotonic()
        stack.end("server")
        while not any_event():
            time.sleep(0.05)
        left.append(sum(len(read_outbox(folder / name)[0]) for name in shared))
        time.sleep(3)
        stack.start_server()
        print(f"server away for {time.monotonic() - at:.1f} s")
        all_reach(2)
        at = time.monotonic()
        stack.end("database", signal.SIGQUIT)
        time.sleep(8)
        left.append(sum(len(read_outbox(folder / name)[0]) for name in shared))
        stack.start_database()
        print(f"PostgreSQL away for {time.monotonic() - at:.1f} s; events waiting during the outages: {left}")
        ended = {name: job.finish() for name, job in began.items()}
        assert {name: done.code for name, done in ended.items()} == {"left": 0, "right": 0}, ended
        output = [done.stdout + done.stderr for done in ended.values()]
        if any_event():  # what a job could not deliver any more, its next launch does
            for stream in shared.values():
                again = subprocess.run(
                    [sys.executable, "jobs/continual.py", "--stream", str(stream)],
                    **{"cwd": ROOT, "env": {**os.environ, **environment}, "capture_output": True, "text": True},
                )
                assert again.returncode == 0, again.stdout + again.stderr
                output.append(again.stdout + again.stderr)
        for name in shared:
            audit = subprocess.run(
                [sys.executable, "jobs/audit.py", "--work-dir", str(folder / name), "--tracking-uri", stack.uri],
                **{"cwd": ROOT, "env": {**os.environ, **environment}, "capture_output": True, "text": True},
            )
            print(audit.stdout.splitlines()[-1])
            assert audit.returncode == 0, audit.stdout + audit.stderr
            output.append(audit.stdout + audit.stderr)

        os.environ.update(stack.login)
        client = MlflowClient(stack.uri, stack.uri)
        for name, tasks in TASKS.items():
            compare(client, name, tasks, tmp_path)
        places = [folder, stack.folder / "artifacts"]
        assert find_bytes(places, CANARIES) == [] and not any(part in text for part in CANARIES for text in output)
        assert not any(part in path.read_text() for part in CANARIES for path in stack.folder.glob("*.log"))
    shutil.rmtree(folder)


def compare(client, name, tasks, tmp_path):
    """One stream on the shared server against the same stream alone: runs, numbers by step, versions, aliases."""
    work_dir, lonely = tmp_path / "shared" / name, tmp_path / "alone" / name
    database = f"sqlite:///{lonely / 'mlflow.db'}"
    alone = MlflowClient(database, database)
    seen, expected = runs_of(client, "perennial", work_dir), runs_of(alone, "perennial", lonely)
    assert sorted(seen) == sorted(expected) == sorted([name, *(f"{n:04d}-{t}" for n, t in enumerate(tasks, 1))])
    for run_name, one in seen.items():
        other = expected[run_name]
        assert (one.status, one.parent, one.inputs, one.artifacts) == (
            *(other.status, other.parent, other.inputs, other.artifacts),
        )
        assert one.points.keys() == other.points.keys() and one.params.keys() == other.params.keys()
        for metric, points in one.points.items():
            assert [step for step, _ in points] == [step for step, _ in other.points[metric]], (run_name, metric)
            if not any(part in metric for part in TIMES):
                assert points == other.points[metric], (run_name, metric)
        differing = {key for key in one.params if one.params[key] != other.params[key]}
        assert differing <= {"work_dir", "tracking.uri"} | {key for key in differing if "work_dir" in key}
        foreign = [task for other_name, other_tasks in TASKS.items() if other_name != name for task in other_tasks]
        assert not any(task in json.dumps([one.tags, one.params, *one.points]) for task in foreign)
    drop = lambda tags: {key: value for key, value in tags.items() if key != "work_dir"}  # noqa: E731
    assert [drop(tags) for tags in versions_of(client, name)] == [drop(tags) for tags in versions_of(alone, name)]
    assert aliases_of(client, name) == aliases_of(alone, name)
    steps = sum(len(points) for one in seen.values() for points in one.points.values())
    print(f"{name}: {len(seen)} runs, {steps} points, {len(versions_of(client, name))} versions agree")

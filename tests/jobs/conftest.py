"""Streams that several files look at from all sides, each learned once."""

from pathlib import Path

import pytest

from tests.helpers import make_stream, make_task
from tests.jobs.launch import Done, run, run_many
from tests.jobs.many import digests
from tests.jobs.mistakes import Place
from tests.jobs.mistakes_in_tasks import too_many_bad_rows
from tests.jobs.streams import LEARNING, TASKS, Inputs, Learned, stream_of


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, backbone_dir) -> Inputs:
    """Three tasks whose labels contradict each other, and the tiny backbone."""
    root = tmp_path_factory.mktemp("jobs-data")
    for turn, task in enumerate(TASKS):
        make_task(root, task, turn=turn, seed=turn)
    return Inputs(root, backbone_dir)


@pytest.fixture(scope="session")
def learned(inputs, tmp_path_factory) -> Learned:
    """The stream learned on two ranks with ZeRO-3, in two launches."""
    folder = tmp_path_factory.mktemp("learned")
    work_dir = folder / "work"
    contracts = [inputs.contract(task) for task in TASKS]
    stream = make_stream(folder / "stream.yaml", work_dir, inputs.backbone, inputs.root, contracts, **LEARNING)
    backbone = digests(inputs.backbone)
    first = run("jobs/continual.py", "--stream", stream, "--until", "first", ranks=2)
    after_first = digests(work_dir)
    second = run("jobs/continual.py", "--stream", stream, ranks=2)
    return Learned(inputs, stream, work_dir, first, second, after_first, backbone)


@pytest.fixture(scope="session")
def on_two_ranks(inputs, learned, tmp_path_factory) -> dict[str, tuple[Path, Done]]:
    """Commands that share one launch of two ranks; {name: (work_dir, what became of it)}.

    `pin`: three tasks under retention `pin`. `divides`: a batch of 6 rows in micro-batches of 2. `bad_rows`: a stream
    whose second task, which rank 1 checks, has too many bad rows.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    method = LEARNING["method"] | {"retention": {"policy": "pin"}}
    pin = stream_of(inputs, folder / "pin", TASKS, method, training=LEARNING["training"] | {"epochs": 1})
    divides, bad_rows = (Place(folder / name, learned) for name in ("divides", "bad_rows"))
    divides.folder.mkdir()
    bad_rows.folder.mkdir()
    too_many_bad_rows(bad_rows)
    cases = {
        "pin": pin,
        "divides": divides.case(divides.stream(training={"batch_size": 6, "micro_batch_size": 2})),
        "bad_rows": bad_rows.case(bad_rows.stream(bad_rows.task("good"), bad_rows.root / "alone.yaml")),
    }
    done = run_many([case for _, case in cases.values()], folder / "out", ranks=2)
    return {name: (work_dir, result) for (name, (work_dir, _)), result in zip(cases.items(), done, strict=True)}

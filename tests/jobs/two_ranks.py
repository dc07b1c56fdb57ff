"""Launches of two ranks on what was learned: one that is stopped by a signal, and one that many commands share."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.failures import A_KILLED_RUNNER, A_SLEEPING_RANK, KINDS, Outcome, break_job
from tests.jobs.launch import Case, Done, run_many, started
from tests.jobs.many import digests
from tests.jobs.mistakes import Place
from tests.jobs.mistakes_in_tasks import too_many_bad_rows
from tests.jobs.new_rows import reading_commands, write_new_rows
from tests.jobs.streams import LEARNING, TASKS, Inputs, Learned, stream_of


@dataclass(frozen=True)
class Stopped:
    """The first increment of the learned stream in another work_dir, stopped while it was trained."""

    work_dir: Path
    command: tuple  # its arguments; the same ones go on
    stop: Done
    marker: dict | None  # stopped.json
    left: list[str]  # names of the files in work_dir after the stop


@dataclass(frozen=True)
class Shared:
    """What became of the commands of one launch, and where."""

    done: dict[str, Done]
    pin: Path  # work_dir of three tasks learned under retention `pin`
    answers: Path  # folder of what jobs/predict.py wrote
    before: dict[str, str]  # sha256 of every file of the learned work_dir before the launch


def stop_by_signal(learned: Learned, folder: Path) -> Stopped:
    """Start an increment on two ranks and send SIGTERM to rank 1 when training begins."""
    work_dir = folder / "work"
    command = ("--stream", learned.stream, "--until", "first", "--set", f"work_dir={work_dir}")
    with started("jobs/continual.py", *command, ranks=2) as running:
        running.wait_for("== increment 1: first")
        os.kill(running.rank_pid(1), signal.SIGTERM)
        stop = running.finish()
    path = work_dir / "stopped.json"
    marker = json.loads(path.read_text()) if path.is_file() else None
    return Stopped(work_dir, command, stop, marker, list(digests(work_dir)))


def break_two(learned: Learned, folder: Path) -> tuple[Outcome, ...]:
    """The first increment of the learned stream in work_dirs of its own, broken in two ways."""
    asleep, orphaned = (kind for kind in KINDS if kind.name in (A_SLEEPING_RANK, A_KILLED_RUNNER))
    return (
        break_job(asleep, learned.stream, folder / "asleep", forked=True, limit=5.0),
        break_job(orphaned, learned.stream, folder / "orphaned", limit=60.0),  # its end is no matter of a limit
    )


def share_a_launch(
    inputs: Inputs, learned: Learned, stopped: Stopped | None, broken: Sequence[Outcome], folder: Path
) -> Shared:
    """Run commands one after another on two ranks.

    `relaunch` goes on after the stop, and each of `broken` under its kind's name. `pin` learns three tasks under
    retention `pin`. `divides` has a batch of 6 rows in micro-batches of 2, `bad_rows` a second task, checked by rank 1,
    with too many bad rows. Then come those of `new_rows`.
    """
    method = LEARNING["method"] | {"retention": {"policy": "pin"}}
    pin, learn_pin = stream_of(inputs, folder / "pin", TASKS, method, training=LEARNING["training"] | {"epochs": 1})
    divides, bad_rows = (Place(folder / name, learned) for name in ("divides", "bad_rows"))
    divides.folder.mkdir()
    bad_rows.folder.mkdir()
    too_many_bad_rows(bad_rows)
    cases = {
        **({"relaunch": Case("continual", stopped.command)} if stopped else {}),
        **{outcome.kind.name: outcome.relaunch for outcome in broken},
        "pin": learn_pin,
        "divides": divides.case(divides.stream(training={"batch_size": 6, "micro_batch_size": 2})),
        "bad_rows": bad_rows.case(bad_rows.stream(bad_rows.task("good"), bad_rows.root / "alone.yaml")),
        **reading_commands(learned, write_new_rows(learned, folder / "new"), folder / "answers"),
    }
    before = digests(learned.work_dir)
    done = run_many(list(cases.values()), folder / "out", ranks=2)
    return Shared(dict(zip(cases, done, strict=True)), pin, folder / "answers", before)

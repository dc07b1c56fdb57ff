"""The life of a work_dir in which a champion is restored and a task retired."""

from dataclasses import dataclass
from pathlib import Path

from tests.helpers import make_stream, make_task
from tests.jobs.launch import Case, Done, run_many

SECTIONS = {
    "method": {"retention": {"policy": "pin"}},
    "evaluation": {"baselines": []},
    "router": {"features": 64, "layers": 1},
}


@dataclass(frozen=True)
class Life:
    """A work_dir after all commands, what became of each, and where the answers are."""

    work_dir: Path
    done: dict[str, Done]
    folder: Path


def make_life(backbone: Path, folder: Path) -> Life:
    """Six entries of a chain in one launch; the comments say which command makes which."""
    root, work_dir = folder / "data", folder / "work"
    first, second, third = (make_task(root, name, turn=turn) for turn, name in enumerate(("one", "two", "three")))
    both = make_stream(folder / "both.yaml", work_dir, backbone, root, [first, second], **SECTIONS)
    without = make_stream(folder / "without.yaml", work_dir, backbone, root, [second, third], **SECTIONS)

    def bank(*arguments):
        return Case("bank", ["--work-dir", work_dir, *arguments])

    def predict(task, name, *more):
        data = root / "two" / "test.parquet"
        arguments = ["--task", task, "--data", data, "--out", folder / f"{name}.parquet", *more]
        return Case("predict", ["--work-dir", work_dir, *arguments])

    left = folder / "left"
    left.mkdir()
    (left / "lock.json").write_text('{"host": "node-7", "machine": "m", "pid": 4, "since": "noon", "command": "other"}')
    cases = {
        "locked": Case("continual", ["--stream", make_stream(folder / "left.yaml", left, backbone, root, [first])]),
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
    return Life(work_dir, dict(zip(cases, run_many(list(cases.values()), folder / "out"), strict=True)), folder)

"""The life of one work_dir: tasks learned, learned again in new versions and from new data, rejected, tried again."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.helpers import make_stream, make_task
from tests.jobs.launch import Case, Done, run_many
from tests.jobs.streams import LEARNING, TASKS, manifests, published

STILL = "training.learning_rate=1e-9"  # so small that experts end as they began: their start can be seen


@dataclass(frozen=True)
class History:
    """The work_dir after all launches, and what became of each."""

    work_dir: Path
    root: Path
    launches: dict[str, Done]
    answers: Path  # of jobs/predict.py --increment 2

    def manifest(self, number: int) -> dict:
        """An increment's manifest."""
        return manifests(self.work_dir)[number - 1]

    def expert(self, number: int, role: str) -> torch.Tensor:
        """All tensors an increment put into the bank for a role, as one vector."""
        tensors = load_file(self.work_dir / "bank" / f"{self.manifest(number)['bank'][role]}.safetensors")
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    def published(self, launch: str) -> dict[str, str]:
        """sha256 of every published file after a launch."""
        return published(self.launches[launch].files)


def make_history(backbone: Path, folder: Path) -> History:
    """Seven increments in nine launches; the comments say which launch makes which."""
    root, newer, work_dir = folder / "data", folder / "newer", folder / "work"
    first, second, third = (make_task(root, name, turn=turn, seed=turn) for turn, name in enumerate(TASKS))
    make_task(newer, "second", turn=1, seed=77).unlink()  # other rows under the same names, in a root of their own

    def version(number: str, prompt: str) -> Path:
        path = root / f"first-{number}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(first.read_text()) | {"version": number, "prompt": prompt}))
        return path

    v11, v12 = version("1.1.0", "{text}\nVerdict:"), version("1.2.0", "{text}\nSo:")
    sections = LEARNING | {"training": LEARNING["training"] | {"epochs": 2}, "evaluation": {"baselines": []}}

    def launch(name: str, tasks: list[Path], *overrides: str, roots: tuple[Path, ...] = (newer, root)) -> Case:
        stream = make_stream(folder / f"{name}.yaml", work_dir, backbone, root, tasks, **sections)
        settings = [f"data_roots=[{', '.join(map(str, roots))}]", *overrides]
        return Case("continual", ["--stream", stream, *(a for s in settings for a in ("--set", s))], work_dir)

    impossible = "gate.min_metric.first=1.01"
    cases = {
        "learn": launch("learn", [first, second], roots=(root,)),  # 1 first, 2 second
        "again": launch("again", [first, second], roots=(root,)),
        "other_settings": launch("other_settings", [first, second], STILL, roots=(root,)),
        "new_version": launch("new_version", [v11, second], STILL, roots=(root,)),  # 3 first
        "new_data": launch("new_data", [v11, second], STILL),  # 4 second
        "rejected": launch("rejected", [v12, second], impossible),  # 5 first, rejected
        "rejected_again": launch("rejected_again", [v12, second], impossible),
        "go_on": launch("go_on", [v12, second, third], impossible, "gate.on_reject=continue"),  # 6 third
        "retry": launch("retry", [v12, second, third], STILL),  # 7 first
    }
    test_split = root / "first" / "test.parquet"
    back = ("--increment", "2", "--task", "first", "--data", test_split, "--out", folder / "answers.parquet")
    cases["back"] = Case("predict", ["--work-dir", work_dir, *back])
    done = run_many(list(cases.values()), folder / "out")
    return History(work_dir, root, dict(zip(cases, done, strict=True)), folder / "answers.parquet")

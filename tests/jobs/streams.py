"""The streams that the tests of jobs/ learn: tasks, what decides their numbers, how a finished one is read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import make_stream
from tests.jobs.launch import Case, Done, run
from tests.jobs.many import digests

TASKS = ("first", "second", "third")
# everything that decides the learned numbers; dropout and clipping are on, so that what continues must carry them
LEARNING = {
    "method": {
        "name": "moe_cl",
        "lora": {"rank": 3, "alpha": 6, "dropout": 0.1},
        "adversary": {"weight": 0.1, "negatives": "prototypes"},
        "retention": {"policy": "best"},
    },
    "training": {"epochs": 3, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "gradient_clipping": 1.0},
    "evaluation": {"baselines": ["zero_shot", "tfidf"]},
}


@dataclass(frozen=True)
class Inputs:
    """What the streams of this folder are made of; not to be changed."""

    root: Path  # data root and contracts: <task>/{train,validation,test}.parquet, <task>.yaml
    backbone: Path

    def contract(self, task: str) -> Path:
        """A task's contract file."""
        return self.root / f"{task}.yaml"


@dataclass(frozen=True)
class Learned:
    """A work_dir after two launches: the first `--until first`, the second to the end."""

    inputs: Inputs
    stream: Path
    work_dir: Path
    first: Done
    second: Done
    after_first: dict[str, str]  # sha256 of every file below work_dir after the first launch
    backbone: dict[str, str]  # sha256 of every backbone file before the first launch

    @property
    def manifests(self) -> list[dict]:
        """Oldest first, as JSON."""
        return manifests(self.work_dir)


def learn(inputs: Inputs, folder: Path) -> Learned:
    """Learn the three tasks on two ranks with ZeRO-3, in two launches."""
    work_dir = folder / "work"
    contracts = [inputs.contract(task) for task in TASKS]
    stream = make_stream(folder / "stream.yaml", work_dir, inputs.backbone, inputs.root, contracts, **LEARNING)
    backbone = digests(inputs.backbone)
    first = run("jobs/continual.py", "--stream", stream, "--until", "first", ranks=2)
    after_first = digests(work_dir)
    second = run("jobs/continual.py", "--stream", stream, ranks=2)
    return Learned(inputs, stream, work_dir, first, second, after_first, backbone)


def stream_of(
    inputs: Inputs, folder: Path, tasks: tuple[str, ...], method: dict[str, Any], **sections: Any
) -> tuple[Path, Case]:
    """The work_dir of a stream of some of the tasks in a new folder, and the command that learns it."""
    folder.mkdir()
    contracts = [inputs.contract(task) for task in tasks]
    path = make_stream(folder / "stream.yaml", folder / "work", inputs.backbone, inputs.root, contracts, **sections)
    arguments = ["--stream", path, "--set", f"method={json.dumps(method)}"]
    return folder / "work", Case("continual", arguments, folder / "work")


def manifests(work_dir: Path) -> list[dict]:
    """The manifests of a work_dir, oldest first, as JSON."""
    files = sorted((work_dir / "increments").glob("*/manifest.json"))
    return [json.loads(file.read_text()) for file in files]


def published(files: dict[str, str]) -> dict[str, str]:
    """Of a work_dir's files, those that make up what is served."""
    return {name: sha for name, sha in files.items() if name.startswith(("champion.json", "increments/", "bank/"))}

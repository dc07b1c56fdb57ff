"""How tests/jobs/test_bad_input.py describes what users get wrong.

A builder gets a `Place`, makes its mistake there and returns the command's arguments; `@mistake` names what the
sentence on stderr must contain. The mistakes themselves stand in mistakes_in_*.py.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import make_stream, make_task
from tests.jobs.launch import Case, Done, run_many
from tests.jobs.many import digests
from tests.jobs.streams import LEARNING, TASKS, Learned, published

ROWS = {"train": 12, "validation": 6, "test": 6}


@dataclass(frozen=True)
class Place:
    """An empty folder for one mistake, with a work_dir that does not exist yet."""

    folder: Path
    learned: Learned

    @property
    def root(self) -> Path:
        """The data root."""
        return self.folder / "data"

    @property
    def work_dir(self) -> Path:
        """Where the stream would publish."""
        return self.folder / "work"

    def task(self, name: str = "alone", **changes: Any) -> Path:
        """A small good task with contract fields changed."""
        return make_task(self.root, name, **({"rows": ROWS} | changes))

    def source(self, **splits: Any) -> dict[str, Any]:
        """The `source` of the task `alone` with splits changed."""
        return {"format": "parquet", **{split: [f"alone/{split}.parquet"] for split in ROWS}} | splits

    def stream(self, *tasks: Path, **sections: Any) -> list[str]:
        """Arguments that name a stream of these tasks (of one good task if none)."""
        backbone = sections.pop("backbone_dir", self.learned.inputs.backbone)
        contracts = tasks or (self.task(),)
        path = make_stream(
            self.folder / "stream.yaml", self.work_dir, backbone, self.root, contracts, **(LEARNING | sections)
        )
        return ["--stream", str(path)]

    def going_on(self, **sections: Any) -> list[str]:
        """Arguments that name the learned stream with sections changed, on a copy of its work_dir."""
        shutil.copytree(self.learned.work_dir, self.work_dir)
        inputs = self.learned.inputs
        return self.stream_of(inputs.root, [inputs.contract(task) for task in TASKS], **sections)

    def stream_of(self, root: Path, tasks: list[Path], **sections: Any) -> list[str]:
        """Arguments that name a stream of tasks elsewhere."""
        backbone = sections.pop("backbone_dir", self.learned.inputs.backbone)
        path = make_stream(self.folder / "stream.yaml", self.work_dir, backbone, root, tasks, **(LEARNING | sections))
        return ["--stream", str(path)]

    def case(self, arguments: list[str]) -> Case:
        """The command with these arguments, which may not publish into the work_dir."""
        return Case("continual", arguments, self.work_dir)

    def deepspeed(self, text: str) -> list[str]:
        """Arguments that name a DeepSpeed file with this text."""
        path = self.folder / "deepspeed.json"
        path.write_text(text)
        return self.stream(deepspeed=str(path))


@dataclass(frozen=True)
class Mistake:
    """How it is made, and what the sentence must contain."""

    build: Callable[[Place], list[str]]
    says: tuple[str, ...]


MISTAKES: dict[str, Mistake] = {}


def mistake(*says: str) -> Callable:
    """Register a builder under its own name."""

    def register(build: Callable[[Place], list[str]]) -> Callable:
        MISTAKES[build.__name__] = Mistake(build, says)
        return build

    return register


@dataclass(frozen=True)
class Made:
    """What became of every mistake, made in one plain process, and of one good command after them."""

    places: dict[str, Place]
    before: dict[str, dict[str, str]]  # sha256 of what each work_dir had published before
    done: dict[str, Done]
    alone: Done  # jobs/predict.py on the rows of `third`
    answers: Path


def make_mistakes(learned: Learned, folder: Path) -> Made:
    """Make every mistake in a folder of its own and hand it to jobs/continual.py."""
    places = {name: Place(folder / name, learned) for name in MISTAKES}
    cases: list[Case] = []
    before = {}
    for name, place in places.items():
        place.folder.mkdir()
        cases.append(place.case(MISTAKES[name].build(place)))
        before[name] = published(digests(place.work_dir))
    data, answers = learned.inputs.root / "third" / "test.parquet", folder / "answers.parquet"
    alone = ("--work-dir", learned.work_dir, "--task", "third", "--data", data, "--out", answers)
    *done, good = run_many([*cases, Case("predict", alone)], folder / "out")
    return Made(places, before, dict(zip(places, done, strict=True)), good, answers)

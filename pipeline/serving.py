"""Open a work_dir for reading: the model with the bundles of an increment, nothing trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract, UserError
from pipeline.backbones.load import backbone_digest, load_tokenizer
from pipeline.config import StreamConfig, build_method, override_config
from pipeline.evaluation.review_cost import Thresholds
from pipeline.experts.bank import Bank
from pipeline.hosts.meeting import meet
from pipeline.hosts.storage import find_storage
from pipeline.methods.protocol import Bundle, bundle_digest
from pipeline.placement.distributed import start_world
from pipeline.placement.learner import build_learner, check_before_loading, check_world
from pipeline.review import read_review
from pipeline.stages.job import Job
from pipeline.tracking.chain import read_published
from pipeline.tracking.champion import Champion
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.reading import AsOf, as_of
from pipeline.watch import rank as watch


@dataclass(frozen=True)
class Served:
    """A work_dir as of one increment, and the job to run it with."""

    job: Job
    at: AsOf

    @property
    def champion(self) -> Champion:
        """The champion of that time."""
        return self.at.champion

    @property
    def chain(self) -> list[Manifest]:
        """The increments that champion stands on, newest first."""
        return self.at.chain

    def bundle(self, task: str) -> Bundle:
        """What the task is served with. Raises UserError naming the tasks there are, or that it was withdrawn."""
        return self.at.bundle(task)

    def contract(self, task: str) -> TaskContract:
        """The contract the task was last learned under, from its increment's folder. Collective."""
        manifest = self.at.learned(task)
        work_dir = self.job.work_dir
        data = self.job.world.on_main(
            lambda: read_published(work_dir, manifest.folder, manifest.files, "contract.json")
        )
        return TaskContract.model_validate(json.loads(data))

    def thresholds(self, task: str) -> Thresholds | None:
        """From which scores on the answers of the task's bundle may be decided, by class; None where no increment
        measured it. Collective.
        """
        return self.job.world.on_main(lambda: self._thresholds(task))

    def _thresholds(self, task: str) -> Thresholds | None:
        digest = bundle_digest(self.bundle(task))
        for manifest in self.chain:
            record = read_review(self.job.work_dir, manifest).get(task) if manifest.verdict == "promoted" else None
            if record is not None:
                return record["thresholds"] if record["bundle"] == digest else None
        return None


def open_served(work_dir: str, increment: int | None, overrides: Sequence[str] = ()) -> Served:
    """Verify the chain and load the model as it was at an increment (default: now). Collective.

    Paths and placement come from the newest run.json, and `overrides` (key=value) replace them; what decides numbers
    comes from the manifest. Raises UserError for a work_dir without increments, or a backbone that is not the one
    trained on.
    """
    world = start_world()
    hosts = meet(world)
    folder = Path(work_dir).expanduser().resolve()
    at = world.on_main(lambda: as_of(folder, increment))
    newest = at.chain[0]
    config = world.on_main(lambda: read_config(folder, newest, overrides))
    watch.set_limits(**config.watch.model_dump())
    method = build_method(config)
    loaded: list[PreTrainedTokenizerFast] = []

    def load() -> None:
        if world.rank == hosts.ranks[0] and backbone_digest(config.backbone.path) != newest.backbone.digest:
            raise UserError(
                f"the backbone in {config.backbone.path} is not the one increment {newest.increment} was trained on; "
                "name its folder with --set backbone.path=..."
            )
        check_before_loading(config, method.plan)
        loaded.append(load_tokenizer(config.backbone))

    hosts.on_each(load)
    (tokenizer,) = loaded
    check_world(config, world)
    storage = find_storage(hosts, folder)
    learner = build_learner(config, method.plan, world, train=False)
    job = Job(config, world, folder, method, tokenizer, learner, Bank(folder / "bank"), {}, storage=storage)
    return Served(job, at)


def read_config(work_dir: Path, manifest: Manifest, overrides: Sequence[str]) -> StreamConfig:
    """The configuration an increment ran with; method and evaluation as its manifest states them."""
    path = work_dir / "increments" / manifest.folder / "run.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from a backup") from error
    learned = {key: manifest.learning[key] for key in ("method", "rows", "evaluation", "seed")}
    return override_config({**raw, **learned, "work_dir": str(work_dir)}, overrides, str(path))

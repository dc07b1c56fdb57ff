"""Open a work_dir for reading: the model with the bundles of an increment, nothing trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_contracts import TaskContract, UserError
from pipeline.backbones.load import backbone_digest, load_tokenizer
from pipeline.config import StreamConfig, build_method, override_config
from pipeline.evaluation.review_cost import Thresholds
from pipeline.experts.bank import Bank
from pipeline.methods.protocol import Bundle, bundle_digest
from pipeline.placement.distributed import start_world
from pipeline.placement.learner import build_learner, check_before_loading, check_world
from pipeline.review import read_review
from pipeline.stages.job import Job
from pipeline.tracking.chain import Champion, fold, load_chain
from pipeline.tracking.manifest import Manifest


@dataclass(frozen=True)
class Served:
    """A work_dir at one increment: the job to run it with, the champion of that time, the chain up to it (newest
    first).
    """

    job: Job
    champion: Champion
    chain: list[Manifest]

    def bundle(self, task: str) -> Bundle:
        """What the task is served with. Raises UserError naming the tasks there are."""
        if task not in self.champion.bundles:
            known = ", ".join(self.champion.bundles) or "none yet"
            raise UserError(f"task '{task}' is not learned in {self.job.work_dir}; learned: {known}")
        return self.champion.bundles[task]

    def contract(self, task: str) -> TaskContract:
        """The contract the task was last learned under, from its increment's folder."""
        manifest = next(m for m in self.chain if m.task == task and m.verdict == "promoted")
        path = self.job.work_dir / "increments" / manifest.folder / "contract.json"
        contract = TaskContract.model_validate(json.loads(path.read_text(encoding="utf-8")))
        if contract.digest != manifest.contract.digest:
            raise UserError(f"{path} was altered: it is not the contract of increment {manifest.increment}; restore it")
        return contract

    def thresholds(self, task: str) -> Thresholds | None:
        """From which scores on the answers of the task's bundle may be decided, by class; None where no increment
        measured it.
        """
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
    folder = Path(work_dir).expanduser().resolve()
    chain = load_chain(folder)
    if not chain:
        raise UserError(f"work_dir {folder} has no published increment; run jobs/continual.py first")
    if increment is not None:
        chain = [manifest for manifest in chain if manifest.increment <= increment]
        if not chain or chain[0].increment != increment:
            raise UserError(f"work_dir {folder} has no increment {increment}")
    config = read_config(folder, chain[0], overrides)
    if backbone_digest(config.backbone.path) != chain[0].backbone.digest:
        raise UserError(
            f"the backbone in {config.backbone.path} is not the one increment {chain[0].increment} was trained on; "
            "name its folder with --set backbone.path=..."
        )
    method = build_method(config)
    check_before_loading(config, method.plan)
    tokenizer = load_tokenizer(config.backbone)
    world = start_world()
    check_world(config, world)
    learner = build_learner(config, method.plan, world, train=False)
    job = Job(config, world, folder, method, tokenizer, learner, Bank(folder / "bank"), {})
    return Served(job, fold(chain), chain)


def read_config(work_dir: Path, manifest: Manifest, overrides: Sequence[str]) -> StreamConfig:
    """The configuration an increment ran with; method and evaluation as its manifest states them."""
    path = work_dir / "increments" / manifest.folder / "run.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from a backup") from error
    learned = {key: manifest.learning[key] for key in ("method", "rows", "evaluation", "seed")}
    return override_config({**raw, **learned, "work_dir": str(work_dir)}, overrides, str(path))

"""A row of R measured again from what is published."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_contracts import UserError, load_contract
from pipeline.serving import Served
from pipeline.stages.evaluate import measure
from pipeline.stages.prepare import prepare
from pipeline.stages.validate import validate
from pipeline.tracking.history import History


@dataclass(frozen=True)
class Recomputed:
    """One cell: the score now, and the one in the manifest (None where that increment did not measure the task)."""

    task: str
    score: float
    recorded: float | None


def recompute(served: Served, tasks: Sequence[str] | None = None) -> list[Recomputed]:
    """Test scores of learned tasks under their bundles, in the stream's order. Collective.

    Raises UserError for a task that is not learned or withdrawn, or whose contract or data is no longer the one it
    was learned from.
    """
    job = served.job
    for task in tasks or ():
        served.bundle(task)
    cells = []
    recorded, history = served.chain[0].row, History.of(served.chain)
    root = job.storage.root
    for path in job.config.tasks:
        name = job.world.on_main(lambda path=path: load_contract(path).task)
        if not served.at.serves(name) or (tasks and name not in tasks):
            continue
        prepared = job.storage.once(lambda path=path: validate(path, job.config, job.tokenizer, history, root))
        job.storage.once(lambda prepared=prepared: prepare(prepared, job.tokenizer) and None)
        opened = prepare(prepared, job.tokenizer)
        if opened.contract.digest != served.contract(name).digest:
            raise UserError(f"{path} is not the contract {name} was learned under; check out the one of its increment")
        cells.append(Recomputed(name, measure(job, opened, served.bundle(name), "test").score, recorded.get(name)))
    return cells

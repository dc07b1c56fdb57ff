"""One call of the quality benchmark: the cells one after another, each run once and for all."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest
from pipeline.benchmarks.quality.cells import ANY_ORDER, Cell, Setting, rate_for, settings_of, write_cell
from pipeline.benchmarks.quality.collect import collect
from pipeline.benchmarks.quality.launch import remove, run_cell, work_folder
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.sampling import Sample, sample_suite
from pipeline.benchmarks.quality.suites import SUITES
from pipeline.evaluation import matrix

Record = dict[str, Any]


class CellsFailed(Exception):
    """Some cells could not be finished; the others were."""


def run_quality(options: QualityOptions, say: Callable[[str], None] = print) -> list[Record]:
    """The records of every cell asked for, those of before among them. Raises UserError for what cannot be run."""
    settings = settings_of(options.methods)
    for setting in settings:
        setting.check()
    return run_cells(cells_of(options, settings, rate_for), say)


def cells_of(
    options: QualityOptions, settings: list[Setting], rate: Callable[[QualityOptions, Setting], float]
) -> list[Cell]:
    """Settings x orders x seeds; settings that do not depend on the order once a seed. First orders come first."""
    orders = SUITES[options.suite].orders
    if unknown := [name for name in options.orders if name not in orders]:
        raise UserError(f"--orders {unknown[0]}: suite {options.suite} has {', '.join(orders)}")
    backbone = backbone_digest(options.backbone)
    folders = list(dict.fromkeys(folder for order in orders.values() for folder in order))
    first = next(iter(orders))
    cells: list[Cell] = []
    for seed in options.seeds:
        samples: dict[str, Sample] = sample_suite(options, seed, folders)

        def cell(setting: Setting, order: str, name: str, seed: int = seed, samples=samples) -> Cell:
            tasks = orders[order]
            return Cell(options.suite, setting, name, tasks, seed, rate(options, setting), options, samples, backbone)

        cells += [cell(setting, first, ANY_ORDER) for setting in settings if setting.order_free]
        for order in options.orders or orders:
            cells += [cell(setting, order, order) for setting in settings if not setting.order_free]
    return cells


def run_cells(cells: list[Cell], say: Callable[[str], None]) -> list[Record]:
    """Run what is not finished; a cell's file appears when it is. Stops cleanly on SIGTERM or Ctrl-C.

    A cell that fails does not keep the others from running: CellsFailed is raised at the end, naming it.
    """
    records, failed, ran, spent = [], [], 0, 0.0
    missing = sum(not cell.file.is_file() for cell in cells)
    say(f"{len(cells)} cells, {len(cells) - missing} finished before")
    with terminating():
        for number, cell in enumerate(cells, start=1):
            record = cell.load()
            if record is None:
                say(f"[{number}/{len(cells)}] {cell.suite} {cell.name}, learning rate {cell.learning_rate:g}")
                began = time.monotonic()
                try:
                    record = finish(cell, say)
                except RuntimeError as error:
                    say(f"  FAILED: {error}")
                    failed.append(cell.name)
                    continue
                ran, spent = ran + 1, spent + time.monotonic() - began
                left = spent / ran * (missing - ran)
                say(f"  {outcome(record)}; about {left / 3600:.1f} h for the {missing - ran} cells that are left")
            records.append(record)
    if failed:
        raise CellsFailed(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}")
    return records


def finish(cell: Cell, say: Callable[[str], None]) -> Record:
    """Run one cell, or go on where it was broken, and keep its record; its work folder then goes."""
    folder: Path = work_folder(cell)
    run_cell(cell, folder, say)
    record = collect(cell, folder)
    write_cell(cell.file, record)
    remove(folder)
    return record


def outcome(record: Record) -> str:
    """A finished cell in a line."""
    test, validation = matrix.acc(record["R"]), matrix.acc(record["R_validation"])
    return f"ACC {100 * test:.1f} on test, {100 * validation:.1f} on validation, {record['wall_seconds']:,.0f} s"


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM ends the benchmark as Ctrl-C does, so that the running launch is asked to save its state."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""What `jobs/benchmark.py scale` is asked to measure."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError

FIRST = (2, 101)  # increments that the first window spans; increment 1 has no past and pays for what is lazy
WINDOW = FIRST[1] - FIRST[0] + 1


@dataclass(frozen=True)
class ScaleOptions:
    """One run of the scale benchmark. Raises UserError for numbers that leave nothing to compare."""

    increments: int = 1000
    earlier_tasks: int = 2  # evaluation.earlier_tasks: earlier tasks scored again in an increment
    rows: int = 8  # training rows of a task; half as many each to validate and to test
    batch_size: int = 1  # rows of an optimizer step: small, so that an increment has steps enough for a median
    width: int = 32  # D of the backbone
    layers: int = 1
    rank: int = 4  # of the LoRA experts
    mlflow: bool = True  # whether every increment is recorded in MLflow too
    work_dir: str | None = None  # where the increments go, kept afterwards; None: a temporary folder
    seed: int = 17

    def __post_init__(self) -> None:
        if self.increments < 3:
            raise UserError(f"--increments is {self.increments}; a first and a last window need at least 3")
        for name in ("rows", "batch_size", "width", "layers", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.rows < 4 or self.width % 8 or self.earlier_tasks < 0:
            raise UserError("--rows must be at least 4, --width a multiple of 8, --earlier-tasks at least 0")
        if self.work_dir is not None and Path(self.work_dir).exists() and any(Path(self.work_dir).iterdir()):
            raise UserError(f"--work-dir {self.work_dir} is not empty; name a new folder")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ScaleOptions":
        """From a command line; other keys are left alone."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def public(self) -> dict[str, Any]:
        """The settings for the report: no paths."""
        return {name: value for name, value in asdict(self).items() if name != "work_dir"}

    @property
    def windows(self) -> dict[str, tuple[int, int]]:
        """First and last increment of the two windows that are compared; shorter where the run is short."""
        size = min(WINDOW, (self.increments - 1) // 2)
        return {"first": (FIRST[0], FIRST[0] + size - 1), "last": (self.increments - size + 1, self.increments)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `scale`; defaults are those of `ScaleOptions`."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(ScaleOptions)}
    add("--out", required=True, metavar="F", type=Path, help="JSON report; a PNG of the same name stands beside it")
    add("--work-dir", metavar="W", help="where the increments go, and stay (default: a temporary folder)")
    add("--no-mlflow", dest="mlflow", action="store_false", help="do not record the increments in MLflow")
    for name in ("increments", "earlier_tasks", "rows", "batch_size", "width", "layers", "rank"):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help="(%(default)s)")

"""What `jobs/benchmark.py router` is asked to measure."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.config import RouterConfig

_ROUTER = RouterConfig()


@dataclass(frozen=True)
class RouterOptions:
    """One run of the router benchmark. Raises UserError for numbers that leave nothing to measure."""

    backbone: str  # folder of a backbone
    data: str  # folder with one folder a task: {train,validation,test}.parquet with a column text
    tasks: tuple[str, ...]  # folders, in the order their tasks arrive
    layers: tuple[int, ...] = ()  # depths to choose from, on validation; none: half of the backbone's layers
    regularisation: tuple[float, ...] = (_ROUTER.regularisation,)  # to choose from, on validation
    features: int = _ROUTER.features  # random features
    max_tokens: int = _ROUTER.max_tokens  # of a text that are read
    train_rows: int = 400  # of a task
    validation_rows: int = 200
    test_rows: int = 500
    dtype: str = "bfloat16"  # of the backbone
    seed: int = 17  # of the rows drawn

    def __post_init__(self) -> None:
        if len(set(self.tasks)) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise UserError("--tasks: name at least two tasks, each once; a router has nothing to choose otherwise")
        for name in ("train_rows", "validation_rows", "test_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RouterOptions":
        """From a command line, whose lists become tuples; other keys are left alone."""
        names = [field.name for field in fields(cls) if field.name in values]
        return cls(**{name: tuple(v) if isinstance(v := values[name], list) else v for name in names})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `router`; defaults are those of `RouterOptions`."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(RouterOptions)}
    add("--backbone", required=True, metavar="B", help="folder of a backbone")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task")
    add("--out", required=True, metavar="F", type=Path, help="JSON report")
    add("--tasks", required=True, nargs="+", metavar="TASK", help="in the order they arrive; at least two")
    add("--layers", nargs="+", type=int, default=default["layers"], metavar="N", help="depths to choose from (half)")
    add(
        "--regularisation", nargs="+", type=float, default=default["regularisation"], metavar="X", help="to choose from"
    )
    add("--dtype", default=default["dtype"], choices=["bfloat16", "float32"], help="of the backbone (%(default)s)")
    for name, text in (
        ("features", "random features"),
        ("max_tokens", "of a text that are read"),
        ("train_rows", "training texts of a task"),
        ("validation_rows", "validation texts of a task"),
        ("test_rows", "test texts of a task"),
        ("seed", "of the rows drawn"),
    ):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help=f"{text} (%(default)s)")

"""What `jobs/benchmark.py quality` is asked to measure."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.suites import SUITES

MAX_LEARNING_RATES = 4  # the budget of every method: no more settings are tried for one than for another
_ZERO2 = Path(__file__).resolve().parents[3] / "deepspeed_configs" / "zero2.json"


@dataclass(frozen=True)
class QualityOptions:
    """One call of the quality benchmark. Raises UserError for numbers that leave nothing to compare."""

    suite: str
    data: str  # folder with one folder a task: train, test and, where there is one, validation.parquet
    backbone: str
    out: str  # folder of the results; the cells are in <out>/<suite>/
    methods: tuple[str, ...] = ()  # names in methods.yaml; none: all of them
    orders: tuple[str, ...] = ()  # names of the suite's orders; none: all of them
    seeds: tuple[int, ...] = (17,)  # of sampling and of training
    train_rows: int = 200  # of a task
    validation_rows: int = 100
    test_rows: int = 500  # scored after the last task of the stream
    test_rows_stream: int = 100  # of these, scored after every other task
    epochs: int = 3
    batch_size: int = 16  # rows of an optimizer step
    max_tokens: int | None = None  # of a row, longer ones are cut; None: as the suite says
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3)  # that `choose` tries
    choose: bool = False  # try the learning rates on the suite's first order and keep the best by validation
    report_only: bool = False  # run nothing
    dtype: str = "bfloat16"
    ranks: int = 1
    threads: int | None = None  # of each rank; None: the cores shared out
    deepspeed: str = str(_ZERO2)
    work_dir: str | None = None  # where cells that run have their files; None: a fixed folder among temporary files

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UserError(f"--suite {self.suite}: choose one of {', '.join(SUITES)}")
        names = ("train_rows", "validation_rows", "test_rows", "test_rows_stream", "epochs", "batch_size", "ranks")
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size % self.ranks:
            raise UserError(f"--batch-size {self.batch_size} cannot be shared out evenly over {self.ranks} ranks")
        if self.choose and not 1 <= len(self.learning_rates) <= MAX_LEARNING_RATES:
            raise UserError(f"--learning-rates: give 1 to {MAX_LEARNING_RATES}; every method has the same few tries")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}; it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 32:
            raise UserError(f"--max-tokens is {self.max_tokens}; a prompt and its label need at least 32")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "QualityOptions":
        """From a command line, whose lists become tuples and paths become text; other keys are left alone."""
        given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})

    @property
    def folder(self) -> Path:
        """Where the suite's cells are."""
        return Path(self.out) / self.suite

    def budget(self) -> dict[str, Any]:
        """What all methods are given alike; cells of different budgets never share a table."""
        names = ("train_rows", "validation_rows", "test_rows", "test_rows_stream", "epochs", "batch_size", "max_tokens")
        return {name: getattr(self, name) for name in (*names, "dtype")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `quality`; defaults are those of `QualityOptions`."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(QualityOptions)}
    add("--suite", required=True, choices=SUITES, help="which tasks in which orders")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task of the suite")
    add("--backbone", required=True, metavar="B", help="folder of a backbone")
    add("--out", required=True, metavar="DIR", help="results; a finished cell stands in DIR/SUITE and is not run again")
    add("--methods", nargs="+", default=(), metavar="NAME", help="of methods.yaml beside the benchmark (default: all)")
    add("--orders", nargs="+", default=(), metavar="ORDER", help="orders of the tasks (default: all of the suite's)")
    add("--seeds", nargs="+", type=int, default=default["seeds"], metavar="N", help="of sampling and of training")
    add("--max-tokens", type=int, metavar="N", help="of a row; longer ones are cut (default: the suite's)")
    add("--dtype", default=default["dtype"], choices=["bfloat16", "float32"], help="of backbone and LoRA")
    add("--deepspeed", default=default["deepspeed"], metavar="F", help="DeepSpeed file (default: ZeRO-2)")
    add("--threads", type=int, metavar="N", help="of each rank (default: the cores shared out)")
    add("--work-dir", metavar="W", help="where running cells have their files (default: a fixed temporary folder)")
    add("--choose", action="store_true", help="choose each method's learning rate by validation on the first order")
    rates = default["learning_rates"]
    add("--learning-rates", nargs="+", type=float, default=rates, metavar="LR", help="for --choose (%(default)s)")
    add("--report-only", action="store_true", help="run nothing; make table and pictures from the finished cells")
    for name, text in (
        ("train_rows", "training rows of a task"),
        ("validation_rows", "validation rows of a task"),
        ("test_rows", "test rows of a task after the last task of a stream"),
        ("test_rows_stream", "of these, scored after every other task"),
        ("epochs", "passes over a task's rows"),
        ("batch_size", "rows of an optimizer step"),
        ("ranks", "processes of a run; they share out the cores"),
    ):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help=f"{text} (%(default)s)")

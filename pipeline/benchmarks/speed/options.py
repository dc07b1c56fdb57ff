"""What `jobs/benchmark.py speed` is asked to measure."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_contracts.errors import UserError

CASES = ("startup", "step", "trainer", "ranks", "evaluation", "validation", "data")
_ZERO2 = Path(__file__).resolve().parents[3] / "deepspeed_configs" / "zero2.json"


@dataclass(frozen=True)
class SpeedOptions:
    """One run of the speed benchmark. Raises UserError for numbers that leave nothing to measure."""

    backbone: str  # folder of a dense backbone
    data: str  # folder with one folder a task: {train,validation,test}.parquet with columns text and label
    cases: tuple[str, ...] = CASES
    tasks: tuple[str, ...] = ()  # folders whose training is measured; none: all of them
    label_task: str | None = None  # folder whose rows are scored; None: the one with most labels
    repeats: int = 5  # timed rounds of every case
    warmup: int = 2  # rounds, and steps of a trainer run, that are not counted
    steps: int = 12  # counted optimizer steps of one trainer run
    batch_size: int = 8  # rows of an optimizer step
    max_tokens: int = 256  # of a row; longer texts are cut
    rank: int = 8  # of the LoRA experts
    rows: int = 64  # rows answered a round in the evaluation case
    answer_tokens: int = 16  # most tokens of a generated answer
    validation_rows: int = 1_000_000  # synthetic rows of the validation case
    dtype: str = "bfloat16"  # of the backbone and of the LoRA weights
    deepspeed: str = str(_ZERO2)
    seed: int = 17

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise UserError(f"--cases {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
        for name in ("repeats", "warmup", "steps", "batch_size", "rank", "rows", "answer_tokens", "validation_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.max_tokens < 32:
            raise UserError(f"--max-tokens is {self.max_tokens}; a prompt and its label need at least 32")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SpeedOptions":
        """From a command line or a JSON object, whose lists become tuples; other keys are left alone."""
        names = [field.name for field in fields(cls) if field.name in values]
        return cls(**{name: tuple(v) if isinstance(v := values[name], list) else v for name in names})

    def public(self) -> dict[str, Any]:
        """The settings for the report: numbers and names, no paths."""
        return {name: value for name, value in asdict(self).items() if name not in ("backbone", "data", "deepspeed")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `speed`; defaults are those of `SpeedOptions`."""
    default = {field.name: field.default for field in fields(SpeedOptions)}
    add = parser.add_argument
    add("--backbone", required=True, metavar="B", help="folder of a dense backbone")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task")
    add("--out", required=True, metavar="F", type=Path, help="JSON report; a PNG of the same name stands beside it")
    add("--cases", nargs="+", default=CASES, metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    add(
        "--tasks",
        nargs="+",
        default=(),
        metavar="TASK",
        help="tasks to train on; step, startup and ranks take the first",
    )
    add("--label-task", metavar="TASK", help="task to score (default: the one with most labels)")
    add("--dtype", default=default["dtype"], choices=["bfloat16", "float32"], help="of backbone and LoRA")
    add("--deepspeed", default=default["deepspeed"], metavar="F", help="DeepSpeed file (default: ZeRO-2)")
    for name, text in (
        ("repeats", "timed rounds of every case"),
        ("warmup", "rounds, and steps of a trainer run, that are not counted"),
        ("steps", "counted steps of a trainer run"),
        ("batch_size", "rows of an optimizer step"),
        ("max_tokens", "of a row; longer texts are cut"),
        ("rank", "of the LoRA experts"),
        ("rows", "rows answered a round"),
        ("answer_tokens", "most tokens of a generated answer"),
        ("validation_rows", "synthetic rows that are validated"),
    ):
        add(f"--{name.replace('_', '-')}", type=int, default=default[name], metavar="N", help=f"{text} (%(default)s)")

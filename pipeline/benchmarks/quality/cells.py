"""A cell: one method setting on one order of one suite with one seed, and the file that keeps its result."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_contracts.errors import UserError
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.sampling import Sample
from pipeline.benchmarks.quality.suites import SUITES, contract_of
from pipeline.config import describe, method_module
from pipeline.files import canonical_json, sha256_text, write_atomic

FORMAT = 1
_DECIDING = ("prompt", "labels", "metric", "answer_match", "limits")  # fields of a contract
ANY_ORDER = "any"
DEFAULT_RATE = 5e-4  # where nothing was chosen
CHOSEN = "chosen.json"  # in the suite's folder: the learning rates that validation chose
TABLE = Path(__file__).with_name("methods.yaml")


@dataclass(frozen=True)
class Setting:
    """One line of methods.yaml."""

    name: str
    method: dict[str, Any]
    order_free: bool = False
    rate_of: str | None = None

    def check(self) -> None:
        """Raise UserError where there is no such method, or it has no such options."""
        options = {key: value for key, value in self.method.items() if key != "name"}
        try:
            method_module(self.method["name"]).Options.model_validate(options)
        except ValidationError as error:
            raise UserError(f"methods.yaml: {self.name}: {describe(error, 'method.')}") from None
        except ValueError as error:
            raise UserError(f"methods.yaml: {self.name}: {error}") from None

    @property
    def trains(self) -> bool:
        """Whether there is a learning rate to choose."""
        return self.method["name"] != "zero_shot"


def settings_of(names: Sequence[str] = ()) -> list[Setting]:
    """The settings named, or all. Raises UserError naming those there are."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    if unknown := [name for name in names if name not in table]:
        raise UserError(f"--methods {unknown[0]}: choose from {', '.join(table)}")
    return [Setting(name, **table[name]) for name in names or table]


@dataclass(frozen=True)
class Cell:
    """What decides the numbers of a cell. Tasks are folders of the data, in the order of learning."""

    suite: str
    setting: Setting
    order: str
    tasks: tuple[str, ...]
    seed: int
    learning_rate: float
    options: QualityOptions
    samples: Mapping[str, Sample]
    backbone: str  # digest

    @property
    def max_tokens(self) -> int:
        return self.options.max_tokens or SUITES[self.suite].max_tokens

    def contracts(self) -> dict[str, dict[str, Any]]:
        """By task folder the contract that the cell's stream names."""
        found = self.samples
        return {folder: contract_of(found[folder].task, found[folder].labels, self.max_tokens) for folder in self.tasks}

    @cached_property
    def deciding(self) -> dict[str, Any]:
        """Everything that makes this cell another than its neighbours; no path, no placement, no number of threads."""
        return {
            "format": FORMAT,
            "suite": self.suite,
            "tasks": list(self.tasks),
            "seed": self.seed,
            "method": self.setting.method,
            "learning_rate": self.learning_rate if self.setting.trains else None,
            **self.options.budget(),
            "max_tokens": self.max_tokens,
            "backbone": self.backbone,
            "contracts": {
                name: {key: contract[key] for key in _DECIDING if key in contract}
                for name, contract in self.contracts().items()
            },
            "data": {folder: self.samples[folder].digest for folder in self.tasks},
        }

    @property
    def digest(self) -> str:
        """Hex sha256 of what decides the cell."""
        return sha256_text(canonical_json(self.deciding))

    @property
    def name(self) -> str:
        """Names its file and its work folder."""
        return f"{self.setting.name}-{self.order}-s{self.seed}-{self.digest[:10]}"

    @property
    def file(self) -> Path:
        """Where its result is, once it is finished."""
        return self.options.folder / f"{self.name}.json"

    def load(self) -> dict[str, Any] | None:
        """Its result; None where it is not finished."""
        return read_cell(self.file) if self.file.is_file() else None


def read_cell(path: Path) -> dict[str, Any]:
    """A finished cell. Raises UserError for a file that is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a cell of this benchmark ({error}); remove it and it is run again") from None
    return record


def write_cell(path: Path, record: Mapping[str, Any]) -> None:
    """Write a cell so that equal results give equal files: keys sorted, short lists on one line."""
    write_atomic(path, (_pretty(record) + "\n").encode())


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for every key; a list or a mapping of plain values stays on one line up to 120 characters."""
    flat = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not nested or (len(indent) + len(flat) <= 118 and not any(isinstance(item, dict | list) for item in nested)):
        return flat
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_pretty(value[key], inner)}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"


def rate_for(options: QualityOptions, setting: Setting) -> float:
    """The learning rate of a setting: as `choose` left it, else that of its `rate_of`; for this suite, else for mtl5.

    `DEFAULT_RATE` where nothing was chosen.
    """
    for suite in (options.suite, "mtl5"):
        path = Path(options.out) / suite / CHOSEN
        rates = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in (setting.name, setting.rate_of):
            if name in rates:
                return rates[name]["learning_rate"]
    return DEFAULT_RATE

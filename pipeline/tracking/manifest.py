"""The increment manifest: what an increment learned from and what it made, to the bit.

A manifest holds only what a repeated run would write again: no path, host, address, time or placement. Its sha256
is taken over its canonical JSON and is named by the next manifest as `parent`, which makes the chain. What differs
between runs stands in run.json.

Beside increments the chain holds changes: `restored`, which makes the champion again what it was after an earlier
entry, and `retired`, which withdraws a task with its experts. A change is an entry like any other: it has the next
number and a folder with its manifest.json (a `Change`) and run.json,

    increments/0004-restored.2/        the champion is again as it was after entry 2
    increments/0005-retired.tweets/    task tweets withdrawn; the manifest names the withdrawn files with their digests

and rewrites nothing. Withdrawn files are removed once the entry stands; the digests that name them stay.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from data_contracts.errors import UserError
from pipeline.config import describe
from pipeline.files import canonical_json, sha256_bytes, sha256_text

MANIFEST = "manifest.json"
ROUTER = "router"  # name of the task router among an increment's state
RUN = "run.json"  # beside the manifest, outside the chain


def _plain_json(value: Any) -> Any:
    """The value as it will be read back: tuples become lists, keys become strings, NaN is refused."""
    return json.loads(canonical_json(value))


def _no_places(value: Any, where: str = "") -> Any:
    """Refuse absolute paths and addresses anywhere in `value`: they would differ between runs of the same learning."""
    if isinstance(value, dict):
        for key, item in value.items():
            _no_places(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            _no_places(item, where)
    elif isinstance(value, str) and (re.match(r"/|~/|[A-Za-z]:\\", value) or "://" in value):
        raise ValueError(f"{where.lstrip('.') or 'it'} holds the path or address {value!r}, which belongs into {RUN}")
    return value


def _file_name(name: str) -> str:
    parts = name.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", part) for part in parts):
        raise ValueError(f"{name!r} is not a plain file name below the increment's folder")
    if name in (MANIFEST, RUN):
        raise ValueError(f"{name} is not one of the files a manifest digests")
    return name


def _increment_file(name: str) -> str:
    folder, _, rest = name.partition("/")
    if not re.fullmatch(r"\d{4,}-[a-z][a-z0-9_]{0,62}", folder):
        raise ValueError(f"{name!r} is not a file of an increment's folder")
    _file_name(rest)
    return name


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TaskName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
RoleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
FileName = Annotated[str, AfterValidator(_file_name)]
DataPlace = Annotated[
    str,
    StringConstraints(
        pattern=r"^(prepared/[a-z][a-z0-9_]{0,62}/[0-9a-f]{64}|quarantine/[a-z][a-z0-9_]{0,62}/[0-9a-f]{64}\.parquet)$"
    ),
]
IncrementFile = Annotated[str, AfterValidator(_increment_file)]
Score = Annotated[float, Field(allow_inf_nan=False)]
PlainDict = Annotated[dict[str, Any], BeforeValidator(_plain_json), AfterValidator(_no_places)]


class Record(BaseModel):
    """A published record: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ContractRecord(Record):
    """The contract learned under; labels and prompt stand here in full, as they decide what an answer means."""

    version: str
    digest: Sha256
    labels: dict[str, str] | None  # None for generation
    prompt: str


class DataRecord(Record):
    """One split: digest of its clean rows and the rows in, kept, and rejected by reason."""

    digest: Sha256
    rows_in: int = Field(ge=0)
    kept: int = Field(ge=0)
    rejected: dict[str, int]

    @model_validator(mode="after")
    def _rows_add_up(self) -> "DataRecord":
        if self.rows_in != self.kept + sum(self.rejected.values()):
            raise ValueError(
                f"{self.rows_in} rows in are not {self.kept} kept + {sum(self.rejected.values())} rejected"
            )
        return self


class BackboneRecord(Record):
    """The frozen model: digest of its weights and configuration, its transformers model type, the dtype it ran in."""

    digest: Sha256
    model_type: str
    dtype: str


class Link(Record):
    """A link of the chain. `sha256` is its name there."""

    def to_bytes(self) -> bytes:
        """The file's content: canonical JSON in UTF-8."""
        return canonical_json(self.model_dump(mode="json")).encode("utf-8")

    @property
    def sha256(self) -> str:
        """Hex sha256 of `to_bytes()`."""
        return sha256_bytes(self.to_bytes())


class Manifest(Link):
    """One increment."""

    format: Literal[1] = 1
    increment: int = Field(ge=1)
    task: TaskName
    parent: Sha256 | None  # sha256 of the manifest before this one; None for the first
    contract: ContractRecord
    data: dict[RoleName, DataRecord]  # by split
    learning: PlainDict
    learning_digest: Sha256  # of `learning` in canonical JSON
    training: dict[str, int] = Field(default_factory=dict)  # steps, rows consumed, the method's own account
    backbone: BackboneRecord
    method: str
    verdict: Literal["promoted", "rejected"]
    bundles: dict[TaskName, dict[RoleName, Sha256]]  # only those this increment changed
    bank: dict[RoleName, Sha256]  # everything it put into the bank, also when rejected
    state: dict[RoleName, Sha256]  # method state carried on
    row: dict[TaskName, Score]  # this row of R, on test, the task of every row known
    row_inferred: dict[TaskName, Score] = Field(default_factory=dict)  # the same, the task chosen by the router
    validation_row: dict[TaskName, Score]
    files: dict[FileName, Sha256]  # every other file of the increment's folder except run.json
    gate: PlainDict
    versions: dict[str, str]  # packages, and `code`: the digest of our own sources

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if (self.increment == 1) != (self.parent is None):
            raise ValueError("the first increment has no parent, every later one names its parent")
        if self.verdict == "rejected" and (self.bundles or self.state):
            raise ValueError("a rejected increment moves no bundle and no state")
        if self.learning_digest != sha256_text(canonical_json(self.learning)):
            raise ValueError("learning_digest is not the sha256 of learning in canonical JSON")
        return self

    @model_serializer(mode="wrap")
    def _without_router(self, handler) -> dict[str, Any]:
        """A stream without a router has no second row, not an empty one."""
        return {key: value for key, value in handler(self).items() if key != "row_inferred" or value}

    @property
    def folder(self) -> str:
        """Name of the increment's folder: its number in four digits or more, and its task."""
        return f"{self.increment:04d}-{self.task}"


class Change(Link):
    """An entry that learns nothing: an earlier champion restored, or a task retired."""

    format: Literal[1] = 1
    increment: int = Field(ge=2)  # its number in the chain
    parent: Sha256
    verdict: Literal["restored", "retired"]
    to: int | None = Field(None, ge=1)  # restored: the entry whose champion stands again
    task: TaskName | None = None  # retired
    withdrawn: tuple[Sha256, ...] = ()  # retired: bank files, sorted
    withdrawn_files: dict[IncrementFile, Sha256] = Field(default_factory=dict)  # retired: below increments/
    withdrawn_data: tuple[DataPlace, ...] = ()  # retired: its prepared shards and quarantine, below the work_dir

    @model_validator(mode="after")
    def _consistent(self) -> "Change":
        restored = self.verdict == "restored"
        if restored != (self.to is not None) or restored == (self.task is not None):
            raise ValueError("a restored champion names the entry it was after, a retired task itself")
        if restored and (self.withdrawn or self.withdrawn_files or self.withdrawn_data):
            raise ValueError("only a retired task withdraws files")
        if self.to is not None and self.to >= self.increment:
            raise ValueError(f"entry {self.increment} cannot restore entry {self.to}: it is not an earlier one")
        return self

    @property
    def name(self) -> str:
        """What happened, in a word."""
        return f"{self.verdict}.{self.to if self.task is None else self.task}"

    @property
    def folder(self) -> str:
        """Name of the entry's folder."""
        return f"{self.increment:04d}-{self.name}"


Entry = Manifest | Change


def parse_manifest(data: bytes, where: Path | str) -> Entry:
    """Read a manifest's bytes. Raises UserError naming `where` when they are no manifest or not its canonical form."""
    try:
        manifest = _read(data)
    except ValidationError as error:
        raise UserError(f"{where}: not a valid manifest ({describe(error)}); restore it from a backup") from error
    if manifest.to_bytes() != data:
        raise UserError(f"{where}: not in the form it was written in; restore it from a backup")
    return manifest


def _read(data: bytes) -> Entry:
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        try:
            return Change.model_validate_json(data)
        except ValidationError:
            raise error from None

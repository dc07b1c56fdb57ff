"""TaskContract: what a business task promises about its data, read from one YAML file."""

import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from data_contracts.errors import UserError
from data_contracts.template import prompt_columns
from data_contracts.yaml_text import parse_yaml
from pipeline.files import canonical_json, sha256_text

TASK_PATTERN = r"^[a-z][a-z0-9_]{0,62}$"
SEMVER_PATTERN = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$"
MAX_CONTRACT_BYTES = 1_000_000
MAX_REGEX_LENGTH = 500
SPLITS = ("train", "validation", "test")
METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "generation": ("exact_match", "rouge_l", "edit_similarity", "sari"),
}


def _sequence(value: Any) -> Any:
    """YAML gives lists; the frozen models keep tuples."""
    return tuple(value) if isinstance(value, list) else value


def _split_form(value: Any) -> str:
    return "share" if isinstance(value, dict | TrainShare) else "files"


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Files = Annotated[tuple[Text, ...], BeforeValidator(_sequence), Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Scalar = str | int | float | bool


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class TrainShare(_Model):
    """A split taken out of the training files: the rows whose text hash falls in a share of the hash range."""

    from_: Literal["train"] = Field(alias="from")
    fraction: Fraction


SplitSource = Annotated[
    Annotated[Files, Tag("files")] | Annotated[TrainShare, Tag("share")],
    Discriminator(_split_form),
]


class Source(_Model):
    """Where the rows are: paths, globs or fsspec URIs below the allowed roots."""

    format: Literal["parquet", "jsonl", "csv"]
    train: Files
    validation: SplitSource
    test: SplitSource

    @model_validator(mode="after")
    def _train_keeps_rows(self) -> "Source":
        shares = [split.fraction for split in (self.validation, self.test) if isinstance(split, TrainShare)]
        if sum(shares) >= 1:
            raise ValueError("the fractions of validation and test leave no rows for train; make their sum less than 1")
        return self


class Columns(_Model):
    """The columns' names in the files: `id` (optional), `text` and `answer` (a label name, or the reference text)."""

    id: Text | None = None
    text: Text
    answer: Text

    @model_validator(mode="after")
    def _distinct(self) -> "Columns":
        names = [name for name in (self.id, self.text, self.answer) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError("id, text and answer must be three different columns")
        return self


class MinRows(_Model):
    """Fewest kept rows a split may have."""

    train: int = Field(default=50, ge=1)
    validation: int = Field(default=20, ge=1)
    test: int = Field(default=20, ge=1)


class Limits(_Model):
    """Token limits of a row (prompt + answer + end of answer; answer alone) and how much bad data is tolerated."""

    max_tokens: int = Field(default=256, ge=2)
    max_answer_tokens: int = Field(default=16, ge=1)
    too_long: Literal["reject", "truncate"] = "reject"
    max_rejected_fraction: float = Field(default=0.01, ge=0, le=1)
    min_rows: MinRows = MinRows()


class Rule(_Model):
    """One check of the contract's own. A missing value never satisfies a rule."""

    column: Text
    check: Literal["min_length", "max_length", "regex", "allowed_values", "min_value", "max_value"]
    value: Annotated[Scalar | tuple[Scalar, ...], BeforeValidator(_sequence)]
    severity: Literal["reject", "warn"] = "reject"

    @property
    def code(self) -> str:
        """Reason code of a row that breaks the rule."""
        return f"rule:{self.check}:{self.column}"

    @model_validator(mode="after")
    def _value_fits_check(self) -> "Rule":
        value = self.value
        if self.check in ("min_length", "max_length"):
            if type(value) is not int or value < 0:
                raise ValueError(f"{self.check} needs a whole number of characters, 0 or more")
        elif self.check in ("min_value", "max_value"):
            if type(value) not in (int, float):
                raise ValueError(f"{self.check} needs a number")
        elif self.check == "allowed_values":
            if not isinstance(value, tuple) or not value:
                raise ValueError("allowed_values needs a list of at least one value")
        elif not isinstance(value, str) or not 0 < len(value) <= MAX_REGEX_LENGTH:
            raise ValueError(f"regex needs a pattern of 1 to {MAX_REGEX_LENGTH} characters")
        else:
            _refuse_bad_regex(value)
        return self


class TaskContract(_Model):
    """One task's contract. Immutable; unknown keys are refused."""

    task: str = Field(pattern=TASK_PATTERN)
    version: str = Field(pattern=SEMVER_PATTERN)
    owner: Text
    description: Text
    kind: Literal["classification", "generation"]
    language: Text
    source: Source
    columns: Columns
    prompt: Text
    labels: dict[Text, Text] | None = None
    metric: Literal["accuracy", "macro_f1", "exact_match", "rouge_l", "edit_similarity", "sari"]
    answer_match: Literal["full", "first_line", "first_token"] = "full"
    limits: Limits = Limits()
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_sequence)] = ()
    licence: Text
    sensitivity: Literal["public", "internal", "personal"]

    @property
    def digest(self) -> str:
        """Hex sha256 of the contract's canonical JSON: the same for any layout, key order or comments of the file."""
        return sha256_text(canonical_json(self.model_dump(mode="json", by_alias=True)))

    @property
    def prompt_columns(self) -> list[str]:
        """The columns the prompt names, in order."""
        return prompt_columns(self.prompt)

    @property
    def data_columns(self) -> list[str]:
        """Every column the contract reads from the files, each once: id, text, answer, the prompt's, the rules'."""
        named = (self.columns.id, self.columns.text, self.columns.answer, *self.prompt_columns)
        ruled = (rule.column for rule in self.rules)
        return list(dict.fromkeys(name for name in (*named, *ruled) if name is not None))

    @model_validator(mode="after")
    def _parts_agree(self) -> "TaskContract":
        try:
            columns = prompt_columns(self.prompt)
        except UserError as error:
            raise ValueError(f"prompt: {error}") from None
        if self.columns.text not in columns:
            raise ValueError(f"prompt: must contain the text column {{{self.columns.text}}}")
        if self.columns.answer in columns:
            raise ValueError(f"prompt: must not contain the answer column {{{self.columns.answer}}}")
        if self.metric not in METRICS[self.kind]:
            raise ValueError(
                f"metric: {self.metric} does not measure {self.kind}; choose one of {', '.join(METRICS[self.kind])}"
            )
        if self.kind == "generation":
            if self.labels is not None:
                raise ValueError("labels: only a classification task has labels; remove them")
            return self
        if self.answer_match != "full":
            raise ValueError("answer_match: only a generation task matches answers by line or token; remove it")
        if self.labels is None or len(self.labels) < 2:
            raise ValueError("labels: a classification task needs at least two labels, each with its answer text")
        if len({text.strip() for text in self.labels.values()}) < len(self.labels):
            raise ValueError("labels: two labels have the same answer text; give each its own")
        return self


def load_contract(path: Path | str) -> TaskContract:
    """Read a contract file. Raises UserError with one sentence that names the file and the field."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CONTRACT_BYTES:
            raise UserError(f"{path}: is too large for a contract ({MAX_CONTRACT_BYTES:,} bytes); name the YAML file")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save the contract as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({_yaml_place(error)}); mend it there") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of contract fields such as 'task: product_reviews'")
    try:
        return TaskContract.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None


def refuse_silent_change(
    contract: TaskContract, *, version: str, labels: dict[str, str] | None, prompt: str, learned_as: str
) -> None:
    """Raise UserError if labels or prompt differ from those learned under the same version, as `learned_as`."""
    if contract.version != version:
        return
    changed = [name for name, old in (("labels", labels), ("prompt", prompt)) if getattr(contract, name) != old]
    if changed:
        raise UserError(
            f"contract {contract.task}: {' and '.join(changed)} changed under version {version}, "
            f"which was learned as {learned_as}; raise the contract's version"
        )


def _refuse_bad_regex(pattern: str) -> None:
    try:
        pc.match_substring_regex(pa.array([""]), pattern=pattern)
    except pa.ArrowInvalid as error:
        raise ValueError(f"regex {pattern!r} is not a valid RE2 pattern ({error})") from None


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "unreadable"
    return f"line {mark.line + 1}: {problem}" if mark else problem


# YAML aliases can make a small file a huge value: what is shown of it is bounded in depth and length.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 70, 70

# What pydantic adds to an error's location beside the fields: members of unions, and the keys of a mapping.
_NO_FIELDS = frozenset(
    {"files", "share", "str", "int", "float", "bool", "tuple[union[str,int,float,bool], ...]", "[key]"}
)


def _first_problem(error: ValidationError) -> str:
    """The first error in one clause: field, what is wrong, what was given, how many more."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place: list[Hashable] = [part for part in first["loc"] if part not in _NO_FIELDS and "function-" not in str(part)]
    field = ".".join(str(part) for part in place)
    message = _plain(first, field)
    others = dict.fromkeys(str(problem["loc"][0]) for problem in problems if problem["loc"][:1] != first["loc"][:1])
    return (f"{field}: " if field else "") + message + (f" (mend also {', '.join(others)})" if others else "")


def _plain(problem: dict[str, Any], field: str) -> str:
    kind, given = problem["type"], _SHORT.repr(problem["input"])
    if kind == "missing":
        return "is missing; add it"
    if kind == "extra_forbidden":
        return "is not a field of a contract; remove it or mend its spelling"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if field == "task" and kind == "string_pattern_mismatch":
        return f"{given} must be a lower-case letter followed by at most 62 lower-case letters, digits or _"
    if field == "version" and kind in ("string_pattern_mismatch", "string_type"):
        return f"{given} must be a version such as 1.0.0"
    if kind == "string_type":
        return f"{given} must be text; put it in quotes"
    if kind in ("string_too_short", "string_pattern_mismatch", "too_short"):
        return "must not be empty"
    if kind == "tuple_type":
        return f"{given} must be a list; write [{given}]"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{message} (given {given})"

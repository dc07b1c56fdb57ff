"""Stream configuration: one YAML file and `--set key.path=value` overrides, read into one typed object that refuses
unknown keys.

A method's options are a pydantic model `Options` in the method's own file, found by the method's name.
"""

import copy
import functools
import importlib
import pkgutil
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_contracts.credentials import REMEDY, password_keys, shown
from data_contracts.errors import UserError, one_line
from data_contracts.yaml_text import parse_yaml
from pipeline.files import canonical_json, sha256_file, sha256_text

MAX_STREAM_BYTES = 1_000_000


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(Section):
    """The frozen pretrained model."""

    path: str  # folder, or URI of one, with config.json, *.safetensors and the tokenizer
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # of the files, as manifests name it (at least 12 of its 64 digits): another backbone is refused
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{12,64}$")
    trust_remote_code: Literal[False] = False  # code from a checkpoint is never run; the key stands here to say so


class RowsConfig(Section):
    """At most this many rows of each split of a task, drawn by seed; null takes all."""

    train: int | None = Field(None, ge=1)
    validation: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)


class RoutedLearningRate(Section):
    """Hunyuan-Large's law for LoRA experts on routed experts, which see top_k / E of the tokens (METHODS section 6)."""

    noise_batch_tokens: int | None = Field(None, ge=1)  # null: the square-root limit, sqrt(top_k / E)


class TrainingConfig(Section):
    """How one increment is trained. Batches count rows, budgets count tokens, learning rates are AdamW's."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(32, ge=1)  # rows of a global batch, over all ranks
    micro_batch_size: int = Field(32, ge=1)  # most rows of one forward pass on one rank
    micro_batch_tokens: int = Field(2048, ge=16)  # most tokens, padding included, of one forward pass on one rank
    learning_rate: float = Field(2e-4, gt=0)
    routed_learning_rate: RoutedLearningRate | None = None  # null: the same learning rate for all
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)  # share of the steps; then cosine to zero
    gradient_clipping: float = Field(1.0, ge=0)  # 0 turns it off
    # a loss over this many times ln(vocabulary), what blind guessing costs, stops the increment; null: none does
    max_loss_factor: float | None = Field(3.0, gt=0)
    save_every: int = Field(50, ge=1)  # steps between two in-flight states
    # layers keep their input alone and are computed again in backward: less memory for one more forward pass a step
    activation_checkpointing: bool = False


_NOT_LEARNED = {"max_loss_factor", "save_every", "activation_checkpointing"}  # they decide none of the learned numbers


class ReviewConfig(Section):
    """Which rows may be decided without a person: score thresholds chosen on validation (METHODS section 5)."""

    target_precision: float = Field(gt=0, le=1)  # share of right answers wanted among the rows that are decided


class EvaluationConfig(Section):
    """How rows are scored after an increment."""

    batch_tokens: int = Field(4096, ge=16)  # most tokens, padding included, of one forward pass on one rank
    baselines: tuple[Literal["zero_shot", "tfidf"], ...] = ()  # measured beside each new task, same rows
    # most earlier tasks an increment scores again, drawn by seed and increment; the others stay pinned. null: all
    earlier_tasks: int | None = Field(None, ge=0)
    review: ReviewConfig | None = None  # null: no thresholds, every row counts alike


class RouterConfig(Section):
    """The task router, which serves rows whose task nobody names: ridge regression onto task ids (METHODS section 3).

    It reads the raw text through the frozen first layers of the backbone. Every increment keeps features^2 numbers.
    """

    layers: int | None = Field(None, ge=1)  # decoder layers that read the text; null: as the router there is, or half
    features: int = Field(2000, ge=1)  # random ReLU features; 2000 keep 32 MB
    regularisation: float = Field(10.0, gt=0)  # of the ridge regression
    max_tokens: int = Field(256, ge=1)  # of a text that are read
    rows: int | None = Field(5000, ge=1)  # most training rows of a task that are read, drawn by seed; null takes all
    seed: int = Field(17, ge=0, lt=2**31)  # of the random features


class GateConfig(Section):
    """When an increment may become the champion. Scores are test scores in [0, 1]."""

    max_regression: float | None = Field(0.02, ge=0)  # most an earlier task may lose against its last champion row
    min_metric: float | dict[str, float] | None = None  # least score of the new task; one number or one a task
    on_reject: Literal["stop", "continue"] = "stop"


class TrackingConfig(Section):
    """MLflow. Without `uri`, a sqlite database in the work_dir."""

    uri: str | None = None
    experiment: str = "perennial"
    registered_model: str | None = None  # default: the stream's name
    artifact_location: str | None = None
    system_metrics: bool = False  # of every host, sampled by MLflow every 10 s, on the running increment's run


class StoreConfig(Section):
    """The shared source of truth for published work, for several machines that take turns (docs/STORAGE.md)."""

    uri: str  # s3://bucket/prefix, or a folder; credentials come from the environment


class WatchConfig(Section):
    """How long ranks may keep a job waiting (docs/RELIABILITY.md). Both in seconds."""

    limit_seconds: float | None = Field(60, ge=1)  # from a rank's death or standstill to the job's end; null: for ever
    grace_seconds: float = Field(30, ge=1)  # from a request to stop to the end of the last rank


class SpansConfig(Section):
    """Where a run's time goes, rank by rank, below <work_dir>/spans (docs/OBSERVABILITY.md)."""

    enabled: bool = True
    every: int = Field(50, ge=1)  # steps from one that is written span by span to the next; of the others their sums
    max_bytes: int = Field(64_000_000, ge=10_000)  # of each rank's files; the oldest are given up


class StreamConfig(Section):
    """Everything `jobs/continual.py` needs to know: a stream file."""

    stream: str = Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")
    work_dir: str
    data_roots: tuple[str, ...] = Field(min_length=1)  # folders or URI prefixes a contract may point below
    backbone: BackboneConfig
    tasks: tuple[str, ...] = Field(min_length=1)  # contract files, in the order they are learned
    method: dict[str, Any]
    start_from: dict[str, str] = {}  # task -> PEFT adapter folder that its LoRA expert starts from, when it is new
    rows: RowsConfig = RowsConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    router: RouterConfig | None = None  # null: a task is named with every row; no time and no bank file is spent
    gate: GateConfig = GateConfig()
    tracking: TrackingConfig = TrackingConfig()
    watch: WatchConfig = WatchConfig()
    store: StoreConfig | None = None  # null: published work stands in the work_dir alone
    spans: SpansConfig = SpansConfig()
    deepspeed: str = "deepspeed_configs/zero3.json"
    seed: int = Field(17, ge=0, lt=2**31)

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("a contract file is named twice; name each once, in the order of learning")
        return tasks

    @model_validator(mode="after")
    def _method_options(self) -> "StreamConfig":
        options = dict(self.method)
        name = options.pop("name", None)
        try:
            parsed = method_module(name).Options.model_validate(options)
        except ValidationError as error:
            raise ValueError(describe(error, "method.")) from None
        object.__setattr__(self, "method", {"name": name, **parsed.model_dump(mode="json")})
        return self

    def work_path(self) -> Path:
        """The work_dir as an absolute path."""
        return Path(self.work_dir).expanduser().resolve()

    def learning(self) -> dict[str, Any]:
        """What decides the learned numbers: no paths, hosts, addresses or placement."""
        started = {task: adapter_digest(folder) for task, folder in self.start_from.items()}
        return ({"start_from": started} if started else {}) | {
            "seed": self.seed,
            "method": self.method,
            "rows": self.rows.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", exclude=_NOT_LEARNED),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "router": self.router.model_dump(mode="json") if self.router else None,
            "gate": self.gate.model_dump(mode="json", exclude={"on_reject"}),
        }


@functools.lru_cache(maxsize=64)
def adapter_digest(folder: str) -> str:
    """sha256 over the bytes of a PEFT adapter folder's two files. Raises UserError where one cannot be read."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    try:
        return sha256_text(canonical_json({name: sha256_file(Path(folder) / name) for name in names}))
    except OSError as error:
        raise UserError(
            f"start_from: {error.filename} cannot be read ({error.strerror}); restore the folder"
        ) from error


def method_names() -> list[str]:
    """The methods there are: one file each in `pipeline/methods/`."""
    import pipeline.methods

    names = {module.name for module in pkgutil.iter_modules(pipeline.methods.__path__)}
    return sorted(names - {"protocol"})


def build_method(config: "StreamConfig"):
    """The `Method` object of a stream (see pipeline/methods/protocol.py)."""
    options = {key: value for key, value in config.method.items() if key != "name"}
    module = method_module(config.method["name"])
    return module.build(module.Options.model_validate(options))


def method_module(name: Any):
    """The module of a method, which has `Options` and `build`. Raises ValueError naming the methods there are."""
    if not isinstance(name, str) or name not in method_names():
        raise ValueError(f"method.name is {reprlib.repr(name)}; it must be one of: {', '.join(method_names())}")
    return importlib.import_module(f"pipeline.methods.{name}")


def load_stream(path: str | Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """Read a stream file and apply `key.path=value` overrides (values are YAML).

    Raises UserError naming the file and the key for a missing file, broken YAML, an unknown key or a bad value.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_STREAM_BYTES:
            raise UserError(f"{path}: is too large for a stream file ({MAX_STREAM_BYTES:,} bytes); name the YAML file")
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the stream file ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({shown(one_line(error))}); correct the file") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a stream file is a mapping of keys to values; see jobs/streams/quickstart.yaml")
    return override_config(raw, overrides, str(path))


def override_config(raw: dict[str, Any], overrides: Sequence[str], where: str) -> StreamConfig:
    """A raw configuration with `key.path=value` overrides, validated. Raises UserError naming `where` and the key."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        _apply_override(raw, override)
    for key in password_keys(raw):
        raise UserError(f"{where}: {key} holds a password or a token, which would be logged; {REMEDY}")
    try:
        return StreamConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError, prefix: str = "") -> str:
    """A pydantic error as one sentence: each key, after `prefix`, with what is wrong; unknown keys are called so."""
    parts = []
    for item in error.errors():
        where = prefix + ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key '{where}'; remove it or correct its spelling")
            continue
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--set {shown(override)}: write it as key.path=value, for example --set training.epochs=2")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {shown(override)}: '{parent}' is a value, not a section; correct the key path")
        node = child
    try:
        node[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {shown(override)}: the value is not valid YAML ({shown(one_line(error))})") from None

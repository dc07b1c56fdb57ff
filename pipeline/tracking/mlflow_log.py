"""MLflow: what the auditor reads. One parent run a stream and work_dir, one child run an increment, one registered
version an increment, whose tags hold the manifest's sha256 and the digests it rests on.

Rank 0 only. Nothing is kept in process-wide MLflow state (no active run, no global tracking URI), and everything is
found again by tag, so that a launch which continues logs on where the last one stopped.
"""

import json
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.files import canonical_json, sha256_text
from pipeline.tracking.manifest import MANIFEST, Change, Entry
from pipeline.tracking.registry import (
    Registry,
    aliases_of,
    default_uri,
    equals,
    open_client,
    row_metrics,
    run_tags,
    version_tags,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

KEY_TAG = "perennial.key"  # finds a run again: a digest, since a path may hold characters a search cannot quote
_MAX_VALUE = 6000  # characters of a parameter's value in MLflow
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # entries of one call
_MAX_DATASET_DIGEST = 36  # characters
_MAX_FILES = 100  # file names shown with a dataset; all of them are in its digest


class Tracker:
    """Logs a stream: `increment` opens a child run, the log methods write to it, `register` makes its version."""

    def __init__(self, work_dir: Path | str, stream_name: str, settings: TrackingConfig):
        self.work_dir = Path(work_dir).resolve()
        self.stream_name = stream_name
        self.registered_model = settings.registered_model or stream_name
        if any(character in self.registered_model for character in "'/:"):
            raise UserError(f"tracking.registered_model: {self.registered_model!r} holds a quote, / or :; rename it")
        self.uri = settings.uri or default_uri(self.work_dir)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._open(settings)
        except Exception as error:  # of whatever kind: a server, a database driver and MLflow each raise their own
            reason = " ".join(str(error).split())
            raise UserError(
                f"tracking.uri {self.uri!r}: MLflow cannot use it ({reason}); correct it or start the server"
            ) from error
        self.run: Run | None = None
        self.number = 0
        self.task = ""

    def _open(self, settings: TrackingConfig) -> None:
        """Find or make experiment, registered model and the stream's run."""
        self.client = open_client(self.uri)
        self.experiment_id = self._experiment(settings)
        self.registry = Registry(self.client, self._model())
        key = ["stream", self.stream_name, str(self.work_dir)]
        self.parent = self._run(self.stream_name, key, {"stream": self.stream_name})

    def increment(self, number: int, task: str, inputs_key: str = "") -> "Run":
        """Open the child run of one attempt at an increment; the same number and inputs key find the same run again."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        key = ["increment", self.stream_name, str(self.work_dir), number, task, inputs_key]
        tags = {
            MLFLOW_PARENT_RUN_ID: self.parent.info.run_id,
            "stream": self.stream_name,
            "task": task,
            "increment": str(number),
        }
        self.run = self._run(f"{number:04d}-{task}", key, tags)
        self.number, self.task = number, task
        return self.run

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a nested configuration as `a.b.c` parameters. A value past MLflow's length ends in its sha256.

        MLflow's parameters never change: where a continued increment runs with another value (another work place,
        say), the new value becomes the tag `continued.<key>`.
        """
        from mlflow.entities import Param, RunTag

        before = self.client.get_run(self._run_id()).data.params
        values = {key: _cut(value) for key, value in flatten(config)}
        params = [Param(key, value) for key, value in values.items() if key not in before]
        changed = [RunTag(f"continued.{k}", v) for k, v in values.items() if k in before and before[k] != v]
        for part in _parts(params, _MAX_PARAMS):
            self.client.log_batch(self._run_id(), params=part)
        for part in _parts(changed, _MAX_PARAMS):
            self.client.log_batch(self._run_id(), tags=part)

    def log_inputs(self, split: str, digest: str, rows: int, source: str | Sequence[str], context: str) -> None:
        """Log one split as a dataset input: its sha256 (cut as MLflow demands, whole in the tags), rows and sources."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        files = [source] if isinstance(source, str) else list(source)
        scheme, separator, _ = files[0].partition("://")
        dataset = Dataset(
            name=f"{self.task}.{split}",
            digest=digest[:_MAX_DATASET_DIGEST],
            source_type=scheme if separator else "local",
            source=canonical_json({"uri": files[0], "num_files": len(files), "files": files[:_MAX_FILES]}),
            profile=canonical_json({"num_rows": rows}),
        )
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, context), InputTag("sha256", digest)]
        self.client.log_inputs(self._run_id(), [DatasetInput(dataset, tags)])
        self.client.set_tag(self._run_id(), f"data_digest_{split}", digest)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of one training step."""
        self._metrics(self._run_id(), step, metrics)

    def log_row(self, row: Mapping[str, float], name: str = "row") -> None:
        """Log this increment's row of R as `<name>.<task>`, on its run and on the stream's, as a curve."""
        metrics = {f"{name}.{task}": score for task, score in row.items()}
        self._metrics(self._run_id(), self.number, metrics)
        self._metrics(self.parent.info.run_id, self.number, metrics)

    def log_artifacts(self, paths: Iterable[Path | str]) -> None:
        """Upload files, and folders under their own names."""
        for path in map(Path, paths):
            if path.is_dir():
                self.client.log_artifacts(self._run_id(), str(path), path.name)
            else:
                self.client.log_artifact(self._run_id(), str(path))

    def register(self, manifest: Entry, run: "Run | None" = None) -> "ModelVersion":
        """Register a published increment as a model version, once for a manifest, and move the aliases.

        `candidate` names the newest version, `champion` the newest promoted one. Neither is moved back by an older
        manifest that is registered late. The version's source is the folder of the run's artifacts that holds the
        manifest.
        """
        run = run or self.run
        if run is None:
            raise RuntimeError("register needs the run that increment() returned")
        run_id = run.info.run_id
        for key, value in run_tags(manifest).items():
            self.client.set_tag(run_id, key, value)
        logged = self.client.get_run(run_id).data.metrics
        missing = {name: score for name, score in row_metrics(manifest).items() if name not in logged}
        self._metrics(run_id, manifest.increment, missing)
        version = self._version(manifest, run)
        for alias in aliases_of(manifest):
            if self.registry.alias(alias) < int(version.version):
                self.client.set_registered_model_alias(self.registered_model, alias, version.version)
        return self.client.get_model_version(self.registered_model, version.version)

    def register_change(self, change: Change) -> None:
        """Register a change of the chain, which has a run and a version of its own; once."""
        self.increment(change.increment, change.name, change.sha256)
        self.register(change)
        self.finish()

    def finish(self, ok: bool = True) -> None:
        """Close the increment's run as finished or failed."""
        if self.run is not None:
            self.client.set_terminated(self.run.info.run_id, "FINISHED" if ok else "FAILED")
            self.run = None

    def close(self, ok: bool = True) -> None:
        """Close the stream's run, and an increment's that is still open, as finished or failed."""
        self.finish(ok)
        self.client.set_terminated(self.parent.info.run_id, "FINISHED" if ok else "FAILED")

    def _experiment(self, settings: TrackingConfig) -> str:
        experiment = self.client.get_experiment_by_name(settings.experiment)
        if experiment is not None:
            return experiment.experiment_id
        location = settings.artifact_location
        if location is None and not self.uri.startswith(("http://", "https://")):
            location = (self.work_dir / "mlartifacts").as_uri()  # a server knows its own place, a database does not
        return self.client.create_experiment(settings.experiment, artifact_location=location)

    def _run(self, name: str, key: list, tags: dict[str, str]) -> "Run":
        """The run with this key, set running again, or a new one (MLflow's own tags say who started it, from where)."""
        from mlflow.tracking.context.registry import resolve_tags

        digest = sha256_text(canonical_json(key))
        found = self.client.search_runs([self.experiment_id], equals(f"tags.`{KEY_TAG}`", digest), max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return self.client.get_run(found[0].info.run_id)
        tags = resolve_tags() | tags | {KEY_TAG: digest, "work_dir": str(self.work_dir)}
        return self.client.create_run(self.experiment_id, tags=tags, run_name=name)

    def _model(self) -> str:
        """Make the registered model if there is none: a name MLflow refuses then shows before anything is trained."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(self.registered_model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.client.create_registered_model(self.registered_model)
        return self.registered_model

    def _version(self, manifest: Entry, run: "Run") -> "ModelVersion":
        version = self.registry.find_version(manifest.sha256)
        if version is not None:
            return version
        self.client.log_text(run.info.run_id, manifest.to_bytes().decode("utf-8"), f"increment/{MANIFEST}")
        tags = version_tags(manifest) | {"stream": self.stream_name, "work_dir": str(self.work_dir)}
        source = f"{run.info.artifact_uri}/increment"
        return self.client.create_model_version(self.registered_model, source, run_id=run.info.run_id, tags=tags)

    def _metrics(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for part in _parts(entries, _MAX_METRICS):
            self.client.log_batch(run_id, metrics=part)

    def _run_id(self) -> str:
        if self.run is None:
            raise RuntimeError("no increment is open: call increment() first")
        return self.run.info.run_id


def how_to_open(uri: str) -> str:
    """The line that shows a person what was logged at `uri`."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}   # then open http://127.0.0.1:5000"


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of a nested mapping; strings as they are, everything else as JSON."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _cut(value: str) -> str:
    if len(value) <= _MAX_VALUE:
        return value
    ending = f"... sha256={sha256_text(value)}"
    return value[: _MAX_VALUE - len(ending)] + ending


def _parts(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]

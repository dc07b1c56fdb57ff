"""MLflow's side of tracking: what an event of the outbox does to the database. The second time it changes nothing.

Runs are found again by the tag `perennial.key`, points of a curve by name and step, versions by their manifest's
sha256. Nothing is kept in process-wide MLflow state (no active run, no global tracking URI).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TrackingConfig
from pipeline.files import canonical_json, sha256_file
from pipeline.tracking.chain import INCREMENTS
from pipeline.tracking.manifest import MANIFEST, Entry, parse_manifest
from pipeline.tracking.outbox import Event
from pipeline.tracking.registry import (
    Registry,
    aliases_of,
    open_client,
    row_metrics,
    run_tags,
    version_tags,
)
from pipeline.tracking.sharing import KEY_TAG, claim_model, find_experiment, find_run

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_MAX_PARAMS, _MAX_METRICS = 100, 1000  # entries of one call
_MAX_DATASET_DIGEST = 36  # characters
_DATABASE_ERROR = "https://sqlalche.me/e/"  # a server calls a connection that its database closed a bad request
_MAX_FILES = 100  # file names shown with a dataset; all of them are in its digest


class UnknownRun(LookupError):
    """MLflow has no run with this key: it was deleted, or this is another server than the one that was told of it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no run has the tag {KEY_TAG} = {key}")
        self.key = key


class Delivery:
    """Applies events to one MLflow server or database. Used by one thread at a time."""

    def __init__(
        self, work_dir: Path, stream_name: str, settings: TrackingConfig, uri: str, registered_model: str, owner: str
    ):
        import mlflow  # noqa: F401  by the thread that opens, not by the one that delivers: it costs seconds

        self.work_dir, self.stream_name, self.settings = work_dir, stream_name, settings
        self.uri, self.registered_model = uri, registered_model
        self.owner = owner  # `stream_key` of the stream
        self._opened = False
        self.was_opened = False  # ever: what fails afterwards is no mistake in the address or a name
        self._runs: dict[str, str] = {}  # run id by key
        self._points: dict[tuple[str, str], dict[int, float]] = {}  # (run id, metric): value by step
        self._new: set[str] = set()  # ids of runs made here: they hold no points but ours

    def open(self) -> None:
        """Find or make experiment and registered model."""
        if self._opened:
            return
        _quieten()
        self.client = open_client(self.uri)
        self.experiment_id = find_experiment(self.client, self.settings.experiment, self._location())
        self.registry = Registry(self.client, self.registered_model)
        claim_model(self.client, self.registered_model, self.owner, self.stream_name, self.work_dir, self._manifests)
        self._opened = self.was_opened = True

    def forget(self) -> None:
        """Look everything up again: after a failure, nobody knows what MLflow has taken."""
        self._opened = False
        self._runs.clear()
        self._points.clear()
        self._new.clear()

    def run_id(self, key: str) -> str | None:
        """The run with this key, if an event made or found it."""
        return self._runs.get(key)

    def apply(self, event: Event) -> None:
        """Make MLflow say what the event says."""
        data = event.data
        if event.kind == "run":
            self._run(data, event.time, "RUNNING")
        elif event.kind == "params":
            self._params(self._find(data["run"]), data["values"])
        elif event.kind == "inputs":
            self._inputs(self._find(data["run"]), data)
        elif event.kind == "metrics":
            self._metrics(self._find(data["run"]), event.time, data["step"], data["values"])
        elif event.kind == "published":
            self._published(data, event.time)
        elif event.kind == "ended":
            self.client.set_terminated(self._find(data["run"]), data["status"], event.time)
        else:
            raise ValueError(f"outbox: {event.kind!r} is no kind of event; it was written by another version of this")

    def _location(self) -> str | None:
        """Where artifacts of a new experiment go: a server knows its own place, a database does not."""
        if self.settings.artifact_location is None and not self.uri.startswith(("http://", "https://")):
            return (self.work_dir / "mlartifacts").as_uri()
        return self.settings.artifact_location

    def _manifests(self) -> set[str]:
        return {sha256_file(path) for path in (self.work_dir / INCREMENTS).glob(f"*/{MANIFEST}")}

    def _search(self, key: str) -> str | None:
        if key not in self._runs:
            run_id = find_run(self.client, self.experiment_id, key)
            if run_id is not None:
                self._runs[key] = run_id
        return self._runs.get(key)

    def _find(self, key: str) -> str:
        run_id = self._search(key)
        if run_id is None:
            raise UnknownRun(key)
        return run_id

    def _run(self, spec: Mapping[str, Any], time: int, status: str | None = None) -> str:
        """The run that `spec` describes, found by its key or made; its id."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        run_id = self._search(spec["key"])
        if run_id is None:
            tags = spec["tags"] | {KEY_TAG: spec["key"]}
            if spec["parent"]:
                tags[MLFLOW_PARENT_RUN_ID] = self._find(spec["parent"])
            run = self.client.create_run(self.experiment_id, start_time=time, tags=tags, run_name=spec["name"])
            run_id = self._runs[spec["key"]] = run.info.run_id
            self._new.add(run_id)
        elif status is not None:
            self.client.update_run(run_id, status=status)
        return run_id

    def _params(self, run_id: str, values: Mapping[str, str]) -> None:
        """MLflow's parameters never change: a value other than the first becomes the tag `continued.<key>`."""
        from mlflow.entities import Param, RunTag

        before = self.client.get_run(run_id).data.params
        params = [Param(key, value) for key, value in values.items() if key not in before]
        changed = [RunTag(f"continued.{k}", v) for k, v in values.items() if k in before and before[k] != v]
        for part in _parts(params, _MAX_PARAMS):
            self.client.log_batch(run_id, params=part)
        for part in _parts(changed, _MAX_PARAMS):
            self.client.log_batch(run_id, tags=part)

    def _inputs(self, run_id: str, data: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        files, digest = data["files"], data["digest"]
        scheme, separator, _ = files[0].partition("://")
        dataset = Dataset(
            name=f"{data['task']}.{data['split']}",
            digest=digest[:_MAX_DATASET_DIGEST],
            source_type=scheme if separator else "local",
            source=canonical_json({"uri": files[0], "num_files": len(files), "files": files[:_MAX_FILES]}),
            profile=canonical_json({"num_rows": data["rows"]}),
        )
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, data["context"]), InputTag("sha256", digest)]
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])
        self.client.set_tag(run_id, f"data_digest_{data['split']}", digest)

    def _metrics(self, run_id: str, time: int, step: int, metrics: Mapping[str, float]) -> None:
        """Add the points whose step the curve does not have: steps trained again after a kill are not drawn twice."""
        new = {name: value for name, value in metrics.items() if step not in self._curve(run_id, name)}
        self._log(run_id, time, step, new)

    def _row(self, run_id: str, time: int, step: int, metrics: Mapping[str, float]) -> None:
        """Add the scores that the curve does not have: another score of the same increment is shown."""
        new = {name: value for name, value in metrics.items() if self._curve(run_id, name).get(step) != value}
        self._log(run_id, time, step, new)

    def _curve(self, run_id: str, name: str) -> dict[int, float]:
        if (run_id, name) not in self._points:
            history = [] if run_id in self._new else self.client.get_metric_history(run_id, name)
            self._points[run_id, name] = {point.step: point.value for point in history}
        return self._points[run_id, name]

    def _log(self, run_id: str, time: int, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        entries = [Metric(key, float(value), time, step) for key, value in metrics.items()]
        for part in _parts(entries, _MAX_METRICS):
            self.client.log_batch(run_id, metrics=part)
        for name, value in metrics.items():
            self._curve(run_id, name)[step] = value

    def _published(self, data: Mapping[str, Any], time: int) -> None:
        """Row, files and version of an entry of the chain, the aliases last: whose aliases stand is told whole.

        `candidate` names the newest version, `champion` the newest that made a champion. Neither is moved back by an
        older manifest that is registered late. The version's source is the folder of the run's artifacts that holds the
        manifest.
        """
        manifest = parse_manifest((self.work_dir / data["manifest"]).read_bytes(), data["manifest"])
        if self.registry.is_registered(manifest):
            return
        run_id = self._run(data["run"], time)
        rows = row_metrics(manifest)
        self._row(run_id, time, manifest.increment, rows)
        self._row(self._find(data["run"]["parent"]), time, manifest.increment, rows)
        artifacts = self._artifacts(run_id)
        for path in (self.work_dir / name for name in data["artifacts"]):
            if path.is_dir():
                artifacts.log_artifacts(str(path), path.name)
            else:
                artifacts.log_artifact(str(path))
        for key, value in run_tags(manifest).items():
            self.client.set_tag(run_id, key, value)
        self.client.set_terminated(run_id, "FINISHED", time)
        version = self._version(manifest, run_id, self.work_dir / data["manifest"])
        for alias in aliases_of(manifest):
            if self.registry.increment_of(alias) < manifest.increment:
                self.client.set_registered_model_alias(self.registered_model, alias, version.version)

    def _artifacts(self, run_id: str) -> "ArtifactRepository":
        """Where a run's files go. The client's own `log_artifact` keeps one of these for each run, with its threads."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self.client.get_run(run_id).info.artifact_uri, tracking_uri=self.uri)

    def _version(self, manifest: Entry, run_id: str, path: Path) -> "ModelVersion":
        version = self.registry.find_version(manifest.sha256)
        if version is not None:
            return version
        self._artifacts(run_id).log_artifact(str(path), "increment")
        tags = version_tags(manifest) | {"stream": self.stream_name, "work_dir": str(self.work_dir)}
        source = f"{self.client.get_run(run_id).info.artifact_uri}/increment"
        return self.client.create_model_version(self.registered_model, source, run_id=run_id, tags=tags)


def is_outage(error: Exception) -> bool:
    """Whether an error says that the server is away, locked or busy, and not that it was asked for something wrong."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import InterfaceError, OperationalError

    if isinstance(error, MlflowException):
        passing = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
        return error.error_code in passing or _DATABASE_ERROR in str(error)
    return isinstance(error, (OSError, OperationalError, InterfaceError))


def _quieten() -> None:
    """MLflow prints a traceback for each locked database; the courier says it in a line."""
    import logging

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _parts(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]

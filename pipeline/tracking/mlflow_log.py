"""What is logged in MLflow, as plain events: one parent run a stream and work_dir, one child run an increment, one
registered version an increment, whose tags hold the manifest's sha256 and the digests it rests on.

Rank 0 only. Every event goes through the outbox, and from there to MLflow by a thread of its own (`Courier`): a server
that is away stops neither training nor publishing. A launch which continues logs on where the last one stopped, and
first delivers what that one could not.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_contracts.credentials import refuse_password, shown
from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.files import canonical_json, sha256_text
from pipeline.tracking.chain import INCREMENTS
from pipeline.tracking.courier import Courier, short, warn
from pipeline.tracking.delivery import Delivery, is_outage
from pipeline.tracking.history import History
from pipeline.tracking.manifest import MANIFEST, RUN, Change, Entry, Manifest
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.registry import default_uri
from pipeline.tracking.sharing import identity, stream_key

SHOWN_FILES = ("report.png", "row.json", "review.json", MANIFEST)  # of an increment's folder, where it has them
_MAX_VALUE = 6000  # characters of a parameter's value in MLflow
_OPEN_SECONDS, _END_SECONDS, _FAIL_SECONDS, _RUN_SECONDS = 30.0, 30.0, 5.0, 5.0  # most that MLflow is waited for


class Tracker:
    """Logs a stream: `increment` opens a child run, the log methods add to it, `published` makes its version."""

    def __init__(self, work_dir: Path | str, stream_name: str, settings: TrackingConfig):
        """Open MLflow and deliver what an earlier launch left. Raises UserError for an address or a name that it
        refuses; a server that is away is a printed warning.
        """
        self.work_dir = Path(work_dir).resolve()
        self.stream_name = stream_name
        self.registered_model = settings.registered_model or stream_name
        if any(character in self.registered_model for character in "'/:"):
            raise UserError(f"tracking.registered_model: {self.registered_model!r} holds a quote, / or :; rename it")
        self.uri = settings.uri or default_uri(self.work_dir)
        refuse_password(self.uri, "tracking.uri")
        refuse_password(settings.artifact_location, "tracking.artifact_location")
        self.shown_uri = shown(self.uri)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self._identity = identity(self.work_dir)
        owner = stream_key(stream_name, self.work_dir, self._identity)
        delivery = Delivery(self.work_dir, stream_name, settings, self.uri, self.registered_model, owner)
        self._courier = Courier(Outbox(self.work_dir, self.shown_uri), delivery)
        told = self._courier.flush(_OPEN_SECONDS)
        problem = self._courier.problem
        if problem is None and not told:
            warn(f"MLflow at {self.shown_uri} has not answered in {_OPEN_SECONDS:.0f} s; the work goes on without it")
        elif isinstance(problem, UserError):
            raise problem
        elif problem is not None and not is_outage(problem) and not delivery.was_opened:
            raise UserError(
                f"tracking.uri {self.shown_uri!r}: MLflow cannot use it ({short(problem)}); correct `tracking`"
            ) from problem
        from mlflow.tracking.context.registry import resolve_tags

        tags = resolve_tags()  # who started this, from where; the address of a git remote may hold a token
        self._context = {key: shown(value) for key, value in tags.items()}
        self._stream = self._spec(stream_name, owner, {"stream": stream_name}, None)
        self._increment: dict[str, Any] | None = None
        self.task = ""
        self._courier.send("run", self._stream)

    @property
    def waiting(self) -> int:
        """Events that MLflow has not been told yet."""
        return len(self._courier.outbox)

    def increment(self, number: int, task: str, inputs_key: str = "") -> None:
        """Open the child run of one attempt at an increment; the same number and inputs key find the same run again."""
        self._increment, self.task = self._attempt(number, task, inputs_key), task
        self._courier.send("run", self._increment)

    def run_id(self) -> str:
        """MLflow's id of the increment's run; empty where MLflow does not say so within a few seconds."""
        key = self._key()
        if self._courier.delivery.run_id(key) is None and self._courier.problem is None:
            self._courier.flush(_RUN_SECONDS)
        return self._courier.delivery.run_id(key) or ""

    def run_key(self) -> str:
        """What the increment's run is found by: its tag `perennial.key`."""
        return self._key()

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a nested configuration as `a.b.c` parameters. A value past MLflow's length ends in its sha256.

        MLflow's parameters never change: where a continued increment runs with another value (another work place,
        say), the new value becomes the tag `continued.<key>`.
        """
        self._courier.send("params", {"run": self._key(), "values": {k: _cut(shown(v)) for k, v in flatten(config)}})

    def log_inputs(self, split: str, digest: str, rows: int, source: str | Sequence[str], context: str) -> None:
        """Log one split as a dataset input: its sha256 (cut as MLflow demands, whole in the tags), rows and sources."""
        files = [shown(file) for file in ([source] if isinstance(source, str) else source)]
        about = {"task": self.task, "split": split, "digest": digest, "rows": rows, "files": files, "context": context}
        self._courier.send("inputs", {"run": self._key(), **about})

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of one training step; those of a step that was logged before are left out."""
        values = {name: float(value) for name, value in metrics.items()}
        once = sha256_text(canonical_json([self._key(), step, sorted(values)]))
        self._courier.send("metrics", {"run": self._key(), "step": step, "values": values}, once)

    def published(self, entry: Entry, artifacts: Iterable[str] | None = None, inputs_key: str = "") -> None:
        """Log an entry of the chain: its row of R as `row.<task>` on its run and, as a curve, on the stream's; files
        and folders of its folder as artifacts (default: `SHOWN_FILES`); the registered version and the aliases. Its
        run is then finished.

        It is logged once for a manifest, so a launch may call it for what an earlier one has published.
        """
        files = getattr(entry, "files", {})
        names = [name for name in SHOWN_FILES if name in (*files, MANIFEST)] if artifacts is None else artifacts
        key = entry.sha256 if isinstance(entry, Change) else inputs_key
        name = entry.name if isinstance(entry, Change) else entry.task
        data = {
            "run": self._attempt(entry.increment, name, key),
            "manifest": f"{INCREMENTS}/{entry.folder}/{MANIFEST}",
            "artifacts": [f"{INCREMENTS}/{entry.folder}/{name}" for name in names],
        }
        self._courier.send("published", data, f"published {entry.sha256}")
        self._increment = None

    def catch_up(self, history: History) -> None:
        """Log the newest increment, where a launch was killed between its publishing and its logging, and every change
        of the chain. What MLflow has already is left alone.
        """
        entries = [*history.changes, *([history.newest] if history.newest else [])]
        for entry in sorted(entries, key=lambda entry: entry.increment):
            key = "" if isinstance(entry, Change) else read_inputs_key(self.work_dir, entry)
            self.published(entry, inputs_key=key)

    def close(self, ok: bool = True) -> None:
        """Close the stream's run, and an increment's that is still open, as finished or failed; wait for the outbox a
        while, and say what stays in it.
        """
        for spec in (self._increment, self._stream):
            if spec is not None:
                self._courier.send("ended", {"run": spec["key"], "status": "FINISHED" if ok else "FAILED"})
        self._increment = None
        if not self.flush(_END_SECONDS if ok else _FAIL_SECONDS):
            print(
                f"MLflow at {self.shown_uri}: {self.waiting} events wait in {self._courier.outbox.folder} for the next "
                "launch to deliver",
                flush=True,
            )

    def flush(self, seconds: float = _END_SECONDS) -> bool:
        """Wait at most `seconds` for what is under way to MLflow. Whether it now knows everything."""
        return self._courier.flush(seconds)

    def _attempt(self, number: int, task: str, inputs_key: str) -> dict[str, Any]:
        place = ["increment", self.stream_name, str(self.work_dir), *self._identity]
        key = sha256_text(canonical_json([*place, number, task, inputs_key]))
        tags = {"stream": self.stream_name, "task": task, "increment": str(number)}
        return self._spec(f"{number:04d}-{task}", key, tags, self._stream["key"])

    def _spec(self, name: str, key: str, tags: dict[str, str], parent: str | None) -> dict[str, Any]:
        """What a run is found by, and made of where there is none."""
        tags = self._context | tags | {"work_dir": str(self.work_dir)}
        return {"key": key, "name": name, "tags": tags, "parent": parent}

    def _key(self) -> str:
        if self._increment is None:
            raise RuntimeError("no increment is open: call increment() first")
        return self._increment["key"]


def read_inputs_key(work_dir: Path, manifest: Manifest) -> str:
    """The digest of what an increment was learned from, out of its run.json. Raises UserError where that is damaged."""
    path = work_dir / INCREMENTS / manifest.folder / RUN
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["inputs_key"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: missing or damaged, so its MLflow run is not known; restore it from a backup"
        ) from None


def how_to_open(uri: str) -> str:
    """The line that shows a person what was logged at `uri`."""
    if uri.startswith(("http://", "https://")):
        return f"open {shown(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(shown(uri))}   # then open http://127.0.0.1:5000"


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

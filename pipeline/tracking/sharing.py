"""What streams share on one MLflow server: an experiment, and the names of registered models.

Two jobs may make either at the same moment: the server lets one of them, and the other takes what is there. A
registered model belongs to one stream of one work_dir, since its aliases say what *that* stream's champion is.
"""

import json
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.errors import UserError
from pipeline.files import canonical_json, sha256_text, write_atomic
from pipeline.tracking.chain import INCREMENTS
from pipeline.tracking.outbox import OUTBOX

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDENTITY = "tracking.json"  # in the work_dir
OWNER_TAG = "perennial.owner"  # of a registered model: `stream_key` of the stream whose versions it holds
KEY_TAG = "perennial.key"  # finds a run again: a digest, since a path may hold characters a search cannot quote
_EXISTS = "RESOURCE_ALREADY_EXISTS"


def identity(work_dir: Path) -> list[str]:
    """What tells this work_dir from one of the same path on another machine: an id it was given before it was first
    logged; empty for one that has none. A disk that takes no file leaves it without.
    """
    path = work_dir / IDENTITY
    try:
        return [str(json.loads(path.read_text(encoding="utf-8"))["id"])]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged, so its MLflow runs are not known; restore it from a backup") from None
    if any((work_dir / name).is_dir() and any((work_dir / name).iterdir()) for name in (INCREMENTS, OUTBOX)):
        return []  # it was logged before ids were given: its runs are known without
    new = uuid.uuid4().hex
    try:
        write_atomic(path, canonical_json({"id": new}).encode())
    except OSError:
        return []
    return [new]


def stream_key(stream_name: str, work_dir: Path, ident: Collection[str]) -> str:
    """What the stream's run is found by, and its registered model belongs to."""
    return sha256_text(canonical_json(["stream", stream_name, str(work_dir), *ident]))


def find_experiment(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    """The id of the experiment of this name, made where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name) if error.error_code == _EXISTS else None
            if experiment is None:  # made by another job just now, or a name that is refused
                raise
    return experiment.experiment_id


def claim_model(
    client: "MlflowClient", name: str, owner: str, stream_name: str, work_dir: Path, ours: Callable[[], Collection[str]]
) -> None:
    """Make the registered model, or see that it is this stream's. `ours` gives the sha256 of the manifests here.

    Raises UserError where it holds, or was made for, another stream: two champions cannot share an alias.
    """
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.registry import MANIFEST_TAG, Registry

    mine = {OWNER_TAG: owner, "stream": stream_name, "work_dir": str(work_dir)}
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, tags=mine)
            return
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise
            model = client.get_registered_model(name)
    if model.tags.get(OWNER_TAG) == owner:
        return
    versions = Registry(client, name).versions()
    here = {"stream": stream_name, "work_dir": str(work_dir)}
    known = ours() if versions else ()
    is_ours = any(version.tags.get(MANIFEST_TAG) in known for version in versions)  # under an earlier path, say
    unclaimed = OWNER_TAG not in model.tags and all(
        version.tags.get(key) == value for version in versions for key, value in here.items()
    )
    if not is_ours and not unclaimed:
        tags: dict[str, Any] = versions[-1].tags if versions and OWNER_TAG not in model.tags else model.tags
        raise UserError(
            f"the registered model {name!r} belongs to stream {tags.get('stream')!r} in work_dir "
            f"{tags.get('work_dir')!r}; name another in tracking.registered_model, or delete that one in MLflow"
        )
    for key, value in mine.items():
        client.set_registered_model_tag(name, key, value)


def find_run(client: "MlflowClient", experiment_id: str, key: str) -> str | None:
    """The id of the run with this key. Of several, which a request answered too late and sent twice can make, the one
    that holds something; the empty ones are deleted.
    """
    from pipeline.tracking.registry import equals

    found = client.search_runs([experiment_id], equals(f"tags.`{KEY_TAG}`", key), max_results=10)
    holds = lambda run: bool(run.data.params or run.data.metrics)  # noqa: E731
    found = sorted(found, key=lambda run: (not holds(run), run.info.run_id))
    for run in found[1:]:
        if not holds(run):
            client.delete_run(run.info.run_id)
    return found[0].info.run_id if found else None

"""The registered versions in MLflow: how they are found, and the tags that tie each to its manifest.

mlflow is imported late, inside functions: it costs seconds, and only rank 0 and the audit need it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.errors import UserError
from pipeline.tracking.manifest import Change, Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported, which is done late
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own 120 and 7 retries make a server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # that hangs cost a quarter of an hour a call, and a
# request sent twice may make a run twice; the courier tries again, and looks first

DATABASE = "mlflow.db"
CANDIDATE, CHAMPION = "candidate", "champion"  # registered-model aliases
MANIFEST_TAG = "manifest_sha256"


@dataclass(frozen=True)
class Registry:
    """The registered versions of one stream, for reading."""

    client: "MlflowClient"
    registered_model: str

    def versions(self) -> list["ModelVersion"]:
        """All versions of the registered model, oldest first."""
        query = equals("name", self.registered_model)
        found = _all_pages(lambda token: self.client.search_model_versions(query, page_token=token))
        return sorted(found, key=lambda version: int(version.version))

    def find_version(self, manifest_sha256: str) -> "ModelVersion | None":
        """The version of a manifest; the oldest, should there be several. MLflow searches: the others are not read."""
        query = f"{equals('name', self.registered_model)} and {equals(f'tags.`{MANIFEST_TAG}`', manifest_sha256)}"
        found = _all_pages(lambda token: self.client.search_model_versions(query, page_token=token))
        return min(found, key=lambda version: int(version.version), default=None)

    def is_registered(self, manifest: Entry) -> bool:
        """Whether a manifest has its version and the aliases are at it or beyond: False after a kill in between."""
        version = self.find_version(manifest.sha256)
        if version is None:
            return False
        due = aliases_of(manifest)
        return all(self.increment_of(alias) >= manifest.increment for alias in due)

    def aliases(self) -> dict[str, int]:
        """Version number by alias."""
        aliases = self.client.get_registered_model(self.registered_model).aliases
        return {alias: int(version) for alias, version in aliases.items()}

    def increment_of(self, alias: str) -> int:
        """The increment whose version an alias names, 0 for none: versions are numbered as they were registered. Unlike
        `aliases`, it does not make MLflow read every version.
        """
        from mlflow.exceptions import MlflowException

        try:
            return int(self.client.get_model_version_by_alias(self.registered_model, alias).tags["increment"])
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return 0


def aliases_of(manifest: Entry) -> tuple[str, ...]:
    """The aliases that an entry moves to its version: a restored champion or a retired task makes a new champion."""
    return (CANDIDATE,) if manifest.verdict == "rejected" else (CANDIDATE, CHAMPION)


def version_tags(manifest: Entry) -> dict[str, str]:
    """The tags of a manifest's registered version; the audit holds them against the manifest."""
    if isinstance(manifest, Change):
        return run_tags(manifest) | {"parent": manifest.parent, "head": manifest.sha256}
    return {
        "task": manifest.task,
        "increment": str(manifest.increment),
        "parent": manifest.parent or "none",
        MANIFEST_TAG: manifest.sha256,
        "head": manifest.sha256,  # the chain's head once this increment was published
        "contract_digest": manifest.contract.digest,
        "contract_version": manifest.contract.version,
        "verdict": manifest.verdict,
        **{f"data_digest_{split}": data.digest for split, data in manifest.data.items()},
        **{f"bundle.{role}": sha for role, sha in manifest.bundles.get(manifest.task, {}).items()},
    }


def row_metrics(manifest: Entry) -> dict[str, float]:
    """The metrics of a manifest's run that the audit holds against it: its row of R, with task ids and without."""
    if isinstance(manifest, Change):
        return {}
    rows = {"row": manifest.row, "row_inferred": manifest.row_inferred}
    return {f"{name}.{task}": score for name, row in rows.items() for task, score in row.items()}


def run_tags(manifest: Entry) -> dict[str, str]:
    """The tags of a manifest's run: it is found by the manifest's sha256."""
    return {
        "task": manifest.name if isinstance(manifest, Change) else manifest.task,
        "increment": str(manifest.increment),
        MANIFEST_TAG: manifest.sha256,
        "verdict": manifest.verdict,
    }


def default_uri(work_dir: Path | str) -> str:
    """The sqlite database inside a work_dir."""
    return f"sqlite:///{Path(work_dir).resolve() / DATABASE}"


def open_client(uri: str) -> "MlflowClient":
    """A client for tracking and registry at `uri`; no process-wide setting is touched."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_registry(work_dir: Path | str, manifests: Sequence[Entry], uri: str | None = None) -> Registry:
    """The registry that holds the versions of these manifests, found by their sha256, newest first; nothing is created.

    Of several models that hold the same manifest (learned again elsewhere), the one of this work_dir is taken.
    Raises UserError when the work_dir has no database and no URI is given, or no version of any manifest is there.
    """
    if uri is None and not (Path(work_dir) / DATABASE).is_file():
        raise UserError(f"{Path(work_dir) / DATABASE}: not found; name the MLflow server with --tracking-uri")
    client = open_client(uri or default_uri(work_dir))
    for manifest in sorted(manifests, key=lambda m: -m.increment):
        found = client.search_model_versions(equals(f"tags.`{MANIFEST_TAG}`", manifest.sha256))
        if found:
            ours = [version for version in found if version.tags.get("work_dir") == str(Path(work_dir).resolve())]
            return Registry(client, (ours or found)[0].name)
    raise UserError(
        f"{uri or default_uri(work_dir)}: no registered version carries the sha256 of any increment's manifest"
    )


def equals(field: str, value: str) -> str:
    """An MLflow search filter. Raises UserError for a value it cannot quote."""
    if "'" in value:
        raise UserError(f"{value!r}: a name searched for in MLflow cannot hold a quote; rename it in `tracking`")
    return f"{field} = '{value}'"


def _all_pages(fetch) -> Iterator[Any]:
    token = None
    while True:
        page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return

"""The audit's MLflow half: registered versions, their tags, runs and aliases against the manifests of the chain."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from data_contracts.credentials import shown
from pipeline.tracking.finding import Finding
from pipeline.tracking.manifest import Entry
from pipeline.tracking.registry import (
    CANDIDATE,
    CHAMPION,
    MANIFEST_TAG,
    Registry,
    aliases_of,
    row_metrics,
    run_tags,
    version_tags,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def mlflow_findings(registry: Registry, manifests: Iterable[Entry], waiting: Collection[str] = ()) -> Iterator[Finding]:
    """Versions, aliases and runs in MLflow against the manifests. MLflow failing half-way is one more finding.

    Increments whose folders are in `waiting` still stand in the outbox: that MLflow lacks them is no difference.
    """
    try:
        yield from _compare(registry, manifests, waiting)
    except Exception as error:  # of whatever kind: a server, a database driver and MLflow each raise their own
        yield unreachable(error)


def unreachable(error: Exception) -> Finding:
    """The finding that MLflow, or a part of it, could not be compared."""
    return Finding("MLflow", False, f"cannot be compared: {shown(str(error)).strip().partition(chr(10))[0]}")


def _compare(registry: Registry, manifests: Iterable[Entry], waiting: Collection[str]) -> Iterator[Finding]:
    manifests = sorted(manifests, key=lambda manifest: manifest.increment)
    versions = registry.versions()
    matched = _match(manifests, versions)
    for manifest in manifests:
        version = matched.get(manifest.sha256)
        who = f"MLflow version of {manifest.folder}"
        if manifest.folder in waiting:
            yield Finding(who, False, "not yet delivered", pending=True)
            continue
        if version is None:
            yield Finding(who, False, f"no version of {registry.registered_model} belongs to {manifest.sha256}")
            continue
        differences = list(_tag_differences(version.tags, version_tags(manifest)))
        differences += _run_differences(registry, version, manifest)
        for difference in differences:
            yield Finding(f"{who} (version {version.version})", False, difference)
        if not differences:
            yield Finding(who, True, f"version {version.version}: tags, run and scores agree")
    taken = {version.version for version in matched.values()}
    places = {version.tags.get("work_dir") for version in matched.values()}
    for version in versions:
        if version.version not in taken and version.tags.get("work_dir") in places:
            detail = f"of this work_dir, tagged increment {version.tags.get('increment')}, is no increment of the chain"
            yield Finding(f"MLflow version {version.version}", False, detail)
    yield from _alias_findings(registry, manifests, matched, waiting)


def _match(manifests: list[Entry], versions: list["ModelVersion"]) -> dict[str, "ModelVersion"]:
    """Version by manifest sha256: first by that tag, then, as it may be the one changed, by most of the other tags."""
    tagged = {version.tags.get(MANIFEST_TAG): version for version in reversed(versions)}  # the oldest of several
    matched = {manifest.sha256: tagged[manifest.sha256] for manifest in manifests if manifest.sha256 in tagged}
    taken = {version.version for version in matched.values()}
    free = [version for version in versions if version.version not in taken]
    for manifest in manifests:
        if manifest.sha256 in matched:
            continue
        expected = version_tags(manifest)
        scored = [(sum(version.tags.get(k) == v for k, v in expected.items()), i) for i, version in enumerate(free)]
        score, index = max(scored, default=(0, -1))
        if score > len(expected) / 2:
            matched[manifest.sha256] = free.pop(index)
    return matched


def _tag_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[str]:
    ours = {key for key in found if key in expected or key.startswith(("bundle.", "data_digest_"))}
    for key in sorted(ours | expected.keys()):
        if found.get(key) != expected.get(key):
            yield f"tag {key} is {found.get(key)!r}, {expected.get(key)!r} is expected"


def _run_differences(registry: Registry, version: "ModelVersion", manifest: Entry) -> list[str]:
    from mlflow.exceptions import MlflowException

    try:
        run = registry.client.get_run(version.run_id)
    except MlflowException as error:
        return [f"its run {version.run_id} cannot be read ({error.error_code})"]
    expected = run_tags(manifest) | {key: version.tags.get(key) for key in ("stream", "work_dir")}
    found = {key: run.data.tags.get(key) for key in expected}
    differences = [f"run: {difference}" for difference in _tag_differences(found, expected)]
    for name, score in sorted(row_metrics(manifest).items()):
        logged = run.data.metrics.get(name)
        if logged != score:
            differences.append(f"run: metric {name} is {logged}, the manifest says {score}")
    return differences


def _alias_findings(
    registry: Registry, manifests: list[Entry], matched: Mapping[str, "ModelVersion"], waiting: Collection[str]
) -> Iterator[Finding]:
    aliases = registry.aliases()
    promoted = [manifest for manifest in manifests if CHAMPION in aliases_of(manifest)]
    for alias, owners in ((CANDIDATE, manifests), (CHAMPION, promoted)):
        if owners and owners[-1].folder in waiting:
            yield Finding(f"MLflow alias {alias}", False, "not yet delivered", pending=True)
            continue
        owner = matched.get(owners[-1].sha256) if owners else None
        expected = int(owner.version) if owner else None
        found = aliases.get(alias)
        detail = f"names version {found}" + ("" if found == expected else f", the chain says {expected}")
        yield Finding(f"MLflow alias {alias}", found == expected, detail)

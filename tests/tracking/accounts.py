"""What a shared MLflow server shows of one stream and of all, for comparing: nothing that is an id or a time."""

from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient


@dataclass(frozen=True)
class Run:
    """One run: points by metric, in the order of steps."""

    name: str
    status: str
    parent: str
    tags: dict[str, str]
    params: dict[str, str]
    points: dict[str, list[tuple[int, float]]]
    inputs: list[tuple[str, str]]
    artifacts: list[str]


def runs_of(client: MlflowClient, experiment: str, work_dir: Path) -> dict[str, Run]:
    """The runs of a work_dir by name. Fails where one name has two runs."""
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in found}
    runs = {}
    for run in found:
        if run.data.tags.get("work_dir") != str(work_dir):
            continue
        assert run.info.run_name not in runs, f"{run.info.run_name} twice"
        history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        runs[run.info.run_name] = Run(
            run.info.run_name,
            run.info.status,
            names.get(run.data.tags.get("mlflow.parentRunId"), ""),
            run.data.tags,
            run.data.params,
            {name: sorted((point.step, point.value) for point in points) for name, points in history.items()},
            sorted((each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs),
            sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        )
    return runs


def versions_of(client: MlflowClient, model: str) -> list[dict[str, str]]:
    """The tags of a registered model's versions, oldest first."""
    found = client.search_model_versions(f"name = '{model}'", max_results=1000)
    return [version.tags for version in sorted(found, key=lambda version: int(version.version))]


def aliases_of(client: MlflowClient, model: str) -> dict[str, int]:
    """Version number by alias."""
    return {alias: int(number) for alias, number in client.get_registered_model(model).aliases.items()}


def find_bytes(folders: list[Path], needles: tuple[str, ...]) -> list[str]:
    """Files below the folders that hold one of the texts, and processes whose command line does."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and any(needle.encode() in path.read_bytes() for needle in needles):
                found.append(str(path))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if any(needle.encode() in path.read_bytes() for needle in needles):
                found.append(str(path))
        except OSError:
            continue
    return found

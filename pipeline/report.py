"""What a run prints at its start and at its end."""

import json
from pathlib import Path

from pipeline.config import StreamConfig
from pipeline.data.batching import num_steps
from pipeline.data.tokens import PreparedTask
from pipeline.evaluation import matrix
from pipeline.evaluation.review_cost import REVIEW
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner
from pipeline.placement.state import full_shape
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.matrix_rows import matrix_of
from pipeline.tracking.mlflow_log import how_to_open


def print_start(
    config: StreamConfig, world: World, learner: Learner, prepared: dict[str, PreparedTask], chain: list[Manifest]
) -> None:
    """The resolved configuration, the derived numbers and what was inherited; once, on rank 0."""
    print(json.dumps(config.model_dump(mode="json"), indent=1))
    training = config.training
    counts = {
        name: sum(full_shape(parameter).numel() for parameter in part.values())
        for name, part in learner.components.items()
    }
    print(f"world size {world.size} on {world.device}, ZeRO {config.deepspeed}, batch {training.batch_size} rows")
    print("trainable parameters: " + (", ".join(f"{name} {n:,}" for name, n in counts.items()) or "none"))
    for name, task in prepared.items():
        rows = min(len(task.splits["train"]), config.rows.train or 10**12)
        steps = num_steps(rows, training.epochs, training.batch_size)
        print(f"task {name} {task.contract.version}: {rows} training rows, {steps} steps")
    inherited = ", ".join(f"{m.increment} {m.task} ({m.verdict})" for m in reversed(chain))
    print(f"inherited increments: {inherited or 'none'}", flush=True)


def final_report(config: StreamConfig, chain: list[Manifest], tracking_uri: str) -> None:
    """The accuracy matrix with the baselines, the continual-learning metrics, and where everything is."""
    promoted = [manifest for manifest in reversed(chain) if manifest.verdict == "promoted"]
    if not promoted:
        print("no increment was promoted yet")
        return
    folders = [config.work_path() / "increments" / manifest.folder for manifest in promoted]
    tasks, rows, names = matrix_of((manifest.task, manifest.row) for manifest in promoted)
    print(f"\n{config.method['name']} on stream {config.stream}: test scores after each increment\n")
    print(matrix.render_table(tasks, rows, baseline_rows(folders), names))
    print_router(folders)
    print()
    for line in metric_lines(promoted):
        print(line)
    for line in review_lines(folders[-1]):
        print(line)
    print(f"heat map     {folders[-1] / 'report.png'}")
    print(f"MLflow       {tracking_uri}")
    print(f"  open it:   {how_to_open(tracking_uri)}", flush=True)


def print_router(folders: list[Path]) -> None:
    """The accuracy matrix once more with the task of every row chosen by the router, where there is one."""
    records = [json.loads((folder / "row.json").read_text()) for folder in folders]
    tasks, rows, names = matrix_of((record["task"], record.get("test_inferred", {})) for record in records)
    if any(score is not None for row in rows for score in row):
        print("\nthe same, the task of every row chosen by the router\n")
        print(matrix.render_table(tasks, rows, None, names))
    if routing := records[-1].get("routing"):
        total = sum(sum(chosen.values()) for chosen in routing.values())
        right = sum(chosen.get(task, 0) for task, chosen in routing.items())
        print(
            f"\nrouted to their own task after {records[-1]['task']}: {100 * right / total:.2f} % of {total} test rows"
        )


def review_lines(folder: Path) -> list[str]:
    """Per task the share of test rows that need no review, and how many of these are right, after an increment."""
    if not (folder / REVIEW).is_file():
        return []
    lines = []
    for task, record in json.loads((folder / REVIEW).read_text()).items():
        share, precision = record["test"]["stripping_rate"], record["test"]["precision"]
        right = "" if precision is None else f", {100 * precision:.1f} % of them right"
        lines.append(f"decided      {task} {100 * share:.1f} %{right} (target {100 * record['target_precision']:g} %)")
    return lines


def metric_lines(promoted: list[Manifest]) -> list[str]:
    """ACC, BWT and forgetting on test, BWT on validation, from the chain's promoted increments, oldest first."""
    _, test, _ = matrix_of((manifest.task, manifest.row) for manifest in promoted)
    _, validation, _ = matrix_of((manifest.task, manifest.validation_row) for manifest in promoted)
    last = len(test)
    if any(test[t][i] is None or validation[t][i] is None for t in range(last) for i in range(t + 1)):
        return ["ACC, BWT    not defined: an earlier task was not measured in every increment"]
    lines = [f"ACC          {100 * matrix.acc(test):.2f}"]
    if last > 1:
        on_test, on_validation = 100 * matrix.bwt(test, last), 100 * matrix.bwt(validation, last)
        lines.append(f"BWT          {on_test:+.2f} on test, {on_validation:+.2f} on validation")
        lines.append("forgetting   " + ", ".join(f"{100 * value:.2f}" for value in matrix.forgetting(test)))
    return lines


def baseline_rows(folders: list[Path]) -> dict[str, dict[str, float]]:
    """{baseline: {task: score}} as the increments recorded them."""
    rows: dict[str, dict[str, float]] = {}
    for folder in folders:
        record = json.loads((folder / "row.json").read_text())
        for name, score in record["baselines"].items():
            rows.setdefault(name, {})[record["task"]] = score
    return rows

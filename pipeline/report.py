"""What a run prints at its start and at its end."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config import StreamConfig
from pipeline.data.batching import num_steps
from pipeline.data.tokens import PreparedTask
from pipeline.evaluation import matrix
from pipeline.evaluation.review_cost import REVIEW
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner
from pipeline.placement.state import full_shape
from pipeline.tracking.chain import read_published
from pipeline.tracking.history import ROW, History
from pipeline.tracking.matrix_rows import SHOWN, matrix_of, newest_rows
from pipeline.tracking.mlflow_log import how_to_open


def print_start(
    config: StreamConfig, world: World, learner: Learner, prepared: dict[str, PreparedTask], history: History
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
        rows = min(task.counts["train"]["kept"], config.rows.train or 10**12)
        steps = num_steps(rows, training.epochs, training.batch_size)
        print(f"task {name} {task.contract.version}: {rows} training rows, {steps} steps on them")
    entries = {entry.increment: f"{entry.task} ({entry.verdict})" for entry in history.entries}
    entries |= {change.increment: change.name for change in history.changes}
    inherited = ", ".join(f"{number} {said}" for number, said in sorted(entries.items()))
    print(f"inherited increments: {inherited or 'none'}", flush=True)


def final_report(config: StreamConfig, history: History, tracking_uri: str) -> None:
    """The accuracy matrix with the baselines, the continual-learning metrics, and where everything is."""
    if not history.learned:
        print("no increment was promoted yet")
        return
    increments, learned = config.work_path() / "increments", history.learned
    tasks, rows, names = matrix_of(newest_rows(history.learned, SHOWN))
    print(f"\n{config.method['name']} on stream {config.stream}: test scores after each increment\n")
    records = [json.loads(read_published(config.work_path(), learned[t].folder, learned[t].files, ROW)) for t in tasks]
    print(matrix.render_table(tasks, rows, baseline_rows(records), names))
    if len(tasks) < len(history.learned):
        print(f"the newest {len(tasks)} of {len(history.learned)} tasks; every row stands in its increment's row.json")
    print_router(records)
    print()
    for line in metric_lines(history):
        print(line)
    newest = learned[tasks[-1]]
    if REVIEW in newest.files:
        for line in review_lines(json.loads(read_published(config.work_path(), newest.folder, newest.files, REVIEW))):
            print(line)
    print(f"heat map     {increments / newest.folder / 'report.png'}")
    print(f"MLflow       {tracking_uri}")
    print(f"  open it:   {how_to_open(tracking_uri)}", flush=True)


def print_router(records: list[dict[str, Any]]) -> None:
    """The accuracy matrix once more with the task of every row chosen by the router, where there is one."""
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


def review_lines(review: Mapping[str, dict[str, Any]]) -> list[str]:
    """Per task the share of test rows that need no review, and how many of these are right, after an increment."""
    lines = []
    for task, record in review.items():
        share, precision = record["test"]["stripping_rate"], record["test"]["precision"]
        right = "" if precision is None else f", {100 * precision:.1f} % of them right"
        lines.append(f"decided      {task} {100 * share:.1f} %{right} (target {100 * record['target_precision']:g} %)")
    return lines


def metric_lines(history: History) -> list[str]:
    """ACC, BWT and forgetting on test, BWT on validation, from each task's newest promotion, oldest first.

    Where the last increment did not score all tasks, the figures are over those it scored, and the lines say so.
    """
    learned = list(history.learned.values())
    test = matrix.sampled_columns({entry.task: entry.row for entry in learned})
    validation = matrix.sampled_columns({entry.task: entry.validation_row for entry in learned})
    total, scored = len(learned), len(test)
    over = "" if scored == total else f" over the {scored} of {total} tasks scored after the last increment"
    lines = [f"ACC          {100 * matrix.sampled_acc(test):.2f}{over}"]
    if over:
        mean = sum(history.row[entry.task] for entry in learned) / total
        lines.append(f"last scores  {100 * mean:.2f} mean of all {total} tasks, each when it was scored last")
    if scored > 1:
        over = over and f" over {scored - 1} of {total - 1} earlier tasks"
        on_test, on_validation = 100 * matrix.sampled_bwt(test), 100 * matrix.sampled_bwt(validation)
        lines.append(f"BWT          {on_test:+.2f} on test, {on_validation:+.2f} on validation{over}")
        falls = [100 * value for value in matrix.sampled_forgetting(test)]
        if scored <= SHOWN:
            lines.append("forgetting   " + ", ".join(f"{value:.2f}" for value in falls))
        else:
            lines.append(f"forgetting   {sum(falls) / scored:.2f} in the mean, {max(falls):.2f} at most")
    return lines


def baseline_rows(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{baseline: {task: score}} as the increments recorded them."""
    rows: dict[str, dict[str, float]] = {}
    for record in records:
        for name, score in record["baselines"].items():
            rows.setdefault(name, {})[record["task"]] = score
    return rows

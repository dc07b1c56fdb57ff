"""What the router benchmark found, as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def as_table(report: Mapping[str, Any]) -> str:
    """What was found, as text."""
    chosen = report["settings"]
    best = f"layers {chosen['layers']}, regularisation {chosen['regularisation']:g}"
    lines = [f"chosen by accuracy (%) on validation: {best}"]
    lines += [
        f"  layers {choice['layers']:3d} regularisation {choice['regularisation']:8g} {100 * choice['validation']:6.2f}"
        for choice in report["chosen_on_validation_from"]
    ]
    lines.append("test texts routed to their own task, after each task")
    lines += [
        f"  {stage['tasks']:3d} tasks, last {stage['task']:24s} {100 * stage['accuracy']:.2f} %"
        for stage in report["after_each_task"]
    ]
    last = report["after_each_task"][-1]["routed"]
    lines += _confusion(last, list(last))
    lines.append(f"TF-IDF, all tasks at once: {100 * report['tfidf_all_tasks_at_once']:.2f} %")
    lines.append(f"recursive against batch weights: {report['recursive_against_batch']:.1e} relative")
    lines.append(f"kept: {report['kept_bytes'] / 1e6:.1f} MB; {report['seconds']} s")
    return "\n".join(lines)


def _confusion(shares: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    width = max(12, *map(len, tasks))
    head = " " * (width + 2) + "  ".join(f"{task:>{width}s}" for task in tasks)
    rows = [f"  {task:{width}s}" + "  ".join(f"{100 * shares[task][t]:{width}.1f}" for t in tasks) for task in tasks]
    return ["rows of the table: the true task; columns: where its texts went, in %", head, *rows]

"""Tables of cells."""

from collections.abc import Sequence
from typing import Any

from pipeline.evaluation import matrix


def as_table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown line a cell."""
    lines = ["| cell | ACC | BWT | s |", "|---|---:|---:|---:|"]
    for record in records:
        name = f"{record['setting']} {record['order']} {record['deciding']['seed']}"
        acc, bwt = 100 * matrix.acc(record["R"]), 100 * (matrix.bwt(record["R"], len(record["R"])) or 0)
        lines.append(f"| {name} | {acc:.1f} | {bwt:+.1f} | {record['wall_seconds']:,.0f} |")
    return "\n".join(lines)

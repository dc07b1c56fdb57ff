"""Stage 5: may this increment become the champion? A pure function of scores and the stream's rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import GateConfig

ROUNDING = 1e-9  # 0.8 - 0.75 is more than 0.05 in floats


@dataclass(frozen=True)
class Verdict:
    """`reasons` are sentences, empty when promoted; `numbers` are what the rules compared."""

    promoted: bool
    reasons: tuple[str, ...]
    numbers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"promoted": self.promoted, "reasons": list(self.reasons), **self.numbers}


def gate(rules: GateConfig, task: str, row: Mapping[str, float], champion_row: Mapping[str, float]) -> Verdict:
    """Judge the row of R that learned `task` against each earlier task's score in its last champion row."""
    reasons = []
    changes = {name: score - champion_row[name] for name, score in row.items() if name != task and name in champion_row}
    if rules.max_regression is not None:
        for name, change in changes.items():
            if -change > rules.max_regression + ROUNDING:
                reasons.append(
                    f"{name} fell by {-change:.4f} (from {champion_row[name]:.4f} to {row[name]:.4f}), "
                    f"more than gate.max_regression {rules.max_regression}"
                )
    floor = rules.min_metric.get(task) if isinstance(rules.min_metric, dict) else rules.min_metric
    if floor is not None and row[task] < floor - ROUNDING:
        reasons.append(f"{task} scored {row[task]:.4f}, less than gate.min_metric {floor}")
    numbers = {"changes": changes, "max_regression": rules.max_regression, "min_metric": floor}
    return Verdict(not reasons, tuple(reasons), numbers)

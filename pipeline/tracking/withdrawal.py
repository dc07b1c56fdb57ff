"""What retired tasks withdrew and is still on disk."""

from pathlib import Path

from pipeline.experts.bank import Bank
from pipeline.tracking.chain import INCREMENTS, remove_paths
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Entry, Manifest


def withdrawn_names(history: History) -> set[str]:
    """Bank digests, and names below increments/, that retired tasks withdrew."""
    return history.withdrawn.keys() | {name for change in history.changes for name in change.withdrawn_files}


def withdrawn_paths(work_dir: Path, chain: list[Entry]) -> list[Path]:
    """What retired tasks withdrew and is still there."""
    bank, history = Bank(work_dir / "bank"), History.of(chain)
    paths = [bank.path(sha) for sha in history.withdrawn]
    for change in history.changes:
        paths += [work_dir / INCREMENTS / name for name in change.withdrawn_files]
        paths += [work_dir / name for name in change.withdrawn_data]
    for task, retired in history.retired.items():  # also what another machine than the retiring one has of its rows
        if not any(isinstance(entry, Manifest) and entry.task == task and entry.increment > retired for entry in chain):
            paths += [*(work_dir / "prepared" / task).glob("*"), *(work_dir / "quarantine" / task).glob("*.parquet")]
    return [path for path in dict.fromkeys(paths) if path.exists()]


def remove_withdrawn(work_dir: Path, chain: list[Entry]) -> list[str]:
    """Remove `withdrawn_paths`; returns their names."""
    return remove_paths(work_dir, withdrawn_paths(work_dir, chain))

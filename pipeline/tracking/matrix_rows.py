"""The accuracy matrix R as the chain tells it."""

from collections.abc import Iterable, Mapping
from itertools import islice

from pipeline.tracking.history import Entry

SHOWN = 20  # tasks of a picture or a printed table; of longer streams the newest stand for all


def matrix_of(
    learned: Iterable[tuple[str, Mapping[str, float]]],
) -> tuple[list[str], list[list[float | None]], list[str]]:
    """Tasks, R and row names from (task, row of R) of each promoted increment, oldest first.

    A task learned again counts with its newest increment, so that R has one row and one column for each task, in the
    order of learning; None where a task was not evaluated.
    """
    newest: dict[str, tuple[int, Mapping[str, float]]] = {}
    for number, (task, row) in enumerate(learned, start=1):
        newest.pop(task, None)
        newest[task] = (number, row)
    tasks = list(newest)
    rows = [[row.get(name) for name in tasks] for _, row in newest.values()]
    return tasks, rows, [f"after {task}" for task in tasks]


def newest_rows(learned: Mapping[str, Entry], count: int) -> list[tuple[str, Mapping[str, float]]]:
    """(task, row of R) of the `count` tasks learned last, oldest first; reads no others."""
    return [(task, entry.row) for task, entry in islice(reversed(learned.items()), count)][::-1]

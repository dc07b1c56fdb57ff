"""The accuracy matrix R and what is read from it: pure functions (METHODS section 5).

`R[t - 1][i - 1]` is the score in [0, 1] on task i after increment t, where increment t learned task t; None where it
was not evaluated. As in the formulas, t and i count from 1 in arguments. A function that meets a None in its sum raises
ValueError: a mean over other cells would be another number.

Where an increment scores a sample of the earlier tasks, the `sampled_` functions give the same figures over the tasks
that the last increment scored; whoever shows them says how many those are.
"""

from collections.abc import Mapping

Matrix = list[list[float | None]]


def acc(R: Matrix) -> float:
    """Average accuracy: ACC = mean over i of R[T][i], over the T tasks learned so far."""
    return op(R, len(R))


def op(R: Matrix, t: int) -> float:
    """TRACE's overall performance after increment t: OP_t = (1/t) sum over i <= t of R[t][i]."""
    return sum(_cell(R, t, i) for i in range(1, t + 1)) / t


def bwt(R: Matrix, t: int) -> float | None:
    """Backward transfer after increment t: (1/(t-1)) sum over i < t of (R[t][i] - R[i][i]); None for t = 1, where there
    is no past.
    """
    if t == 1:
        return None
    return sum(_cell(R, t, i) - _cell(R, i, i) for i in range(1, t)) / (t - 1)


def fwt(R: Matrix, zero_shot: list[float]) -> float | None:
    """Forward transfer: (1/(T-1)) sum over i > 1 of (R[i-1][i] - zero_shot[i]); None for one task.

    `zero_shot` holds the frozen backbone's score on every task. Needs the cells right of the diagonal, which only
    benchmarks evaluate.
    """
    last = len(R)
    if last == 1:
        return None
    return sum(_cell(R, i - 1, i) - zero_shot[i - 1] for i in range(2, last + 1)) / (last - 1)


def transfer(R: Matrix, per_task: list[float]) -> float:
    """Transfer against a LoRA trained on each task alone: (1/T) sum over i of (R[i][i] - per_task[i])."""
    return sum(_cell(R, i, i) - per_task[i - 1] for i in range(1, len(R) + 1)) / len(R)


def forgetting(R: Matrix) -> list[float]:
    """Per task F_i = max over i <= t <= T of R[t][i], minus R[T][i]: never negative, 0 for the last task."""
    last = len(R)
    return [max(_cell(R, t, i) for t in range(i, last + 1)) - _cell(R, last, i) for i in range(1, last + 1)]


def sampled_columns(rows: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """The scores of each task that the last increment scored, from R[i][i] down to R[T][i], where there is one.

    `rows` are the rows of R by the task learned, in the order of learning, each {task: score}. Cells right of the
    diagonal do not count.
    """
    last = list(rows.values())[-1] if rows else {}
    columns: dict[str, list[float]] = {}
    for task, row in rows.items():
        if task in last:
            columns[task] = []
        for name, column in columns.items():
            if name in row:
                column.append(row[name])
    return columns


def sampled_acc(columns: Mapping[str, list[float]]) -> float:
    """Mean of R[T][i] over the tasks i scored after increment T: `acc` where those are all."""
    return sum(column[-1] for column in columns.values()) / len(columns)


def sampled_bwt(columns: Mapping[str, list[float]]) -> float | None:
    """Mean of R[T][i] - R[i][i] over the earlier tasks scored after increment T: `bwt` where those are all; None for
    none.
    """
    earlier = list(columns.values())[:-1]  # the last is the one just learned
    return sum(column[-1] - column[0] for column in earlier) / len(earlier) if earlier else None


def sampled_forgetting(columns: Mapping[str, list[float]]) -> list[float]:
    """F_i of the tasks scored after increment T: the fall from the best of their scores to the last one."""
    return [max(column) - column[-1] for column in columns.values()]


def _cell(R: Matrix, t: int, i: int) -> float:
    """R[t][i], counted from 1; ValueError where it was not evaluated."""
    value = R[t - 1][i - 1] if 1 <= t <= len(R) and 1 <= i <= len(R[t - 1]) else None
    if value is None:
        raise ValueError(f"R has no score on task {i} after increment {t}; evaluate it first")
    return value


def render_table(
    tasks: list[str],
    R: Matrix,
    extra_rows: dict[str, dict[str, float]] | None = None,
    row_names: list[str] | None = None,
) -> str:
    """R as text, in points of 100, a row an increment and a column a task, with the mean of each row's scores at its
    end.

    `extra_rows` (name -> task -> score) stand below a rule, for baselines. `row_names` default to the task each
    increment learned, which holds while the increments learn the tasks once each and in order. Cells without a score
    are shown as `-`.
    """
    names = row_names or [f"after {t} {tasks[t - 1]}" for t in range(1, len(R) + 1)]
    learned = [[name, *_cells(row)] for name, row in zip(names, R, strict=True)]
    baselines = [[name, *_cells([scores.get(task) for task in tasks])] for name, scores in (extra_rows or {}).items()]
    header = ["score x 100", *tasks, "mean"]
    widths = [max(len(line[column]) for line in [header, *learned, *baselines]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(header), rule, *map(line, learned)]
    if baselines:
        lines += [rule, *map(line, baselines)]
    return "\n".join(lines)


def _cells(row: list[float | None]) -> list[str]:
    """A row's scores and their mean as text."""
    scores = [value for value in row if value is not None]
    mean = sum(scores) / len(scores) if scores else None
    return ["-" if value is None else f"{100 * value:.1f}" for value in [*row, mean]]

"""Numbers of a tiny run, and cells made by hand."""

from typing import Any

NUMBERS = {
    "train_rows": 16,
    "validation_rows": 8,
    "test_rows": 20,
    "test_rows_stream": 6,
    "epochs": 1,
    "batch_size": 8,
    "max_tokens": 96,
}


def cell(setting: str, order: str = "O1", **changes: Any) -> dict[str, Any]:
    """A finished cell of two tasks, `one` (4 test rows, 2 of them in the stream) and `two` (4), worked out by hand.

    References are a b a b (0 1 0 1). After increment 1, `one` is answered right on both stream rows; at the end it is
    right on rows 1, 2 and 4 of 4, of which rows 1 and 3 are those of the stream: 1 of 2. `two` ends with 2 of 4, and
    before it was learned had 1 of 2 right.
    """
    record = {
        "setting": setting,
        "order": order,
        "tasks": ["one", "two"],
        "deciding": {"seed": 17, "learning_rate": 5e-4, "data": {"one": "d1", "two": "d2"}},
        "kinds": {"one": ["classification", "accuracy"], "two": ["classification", "accuracy"]},
        "labels": {"one": ["a", "b"], "two": ["a", "b"]},
        "references": {"one": "0101", "two": "0101"},
        "stream_rows": {"one": "1010", "two": "0110"},
        "answers": [{"one": "00"}, {"one": "0111", "two": "0000"}],
        "answers_ahead": {"two": "00"},
        "R": [[1.0, None], [0.75, 0.5]],
        "R_validation": [[0.5, None], [0.75, 0.25]],
        "trained_parameters": [1000, 1000],
        "served_bytes": [4_000_000, 8_000_000],
        "wall_seconds": 90.0,
    }
    return {**record, **changes}

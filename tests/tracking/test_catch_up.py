"""A launch tells MLflow of what an earlier one published; what it needs for that may be damaged."""

import pytest

from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.tracking.chain import load_chain
from pipeline.tracking.history import History
from pipeline.tracking.mlflow_log import Tracker

WHOLE = b'{"host":"somewhere","inputs_key":"inputs"}'
DAMAGED = {
    "missing": None,
    "empty": b"",
    "cut": WHOLE[:20],
    "no UTF-8": b"\xff" + WHOLE,
    "no key": b'{"host":"somewhere"}',
    "a list": b"[]",
    "deep": b"[" * 200_000,
}


def test_a_damaged_run_json_is_one_sentence_with_the_remedy_and_costs_nothing(copied, by_hand):
    history = History.of(load_chain(copied))
    path = copied / "increments" / history.newest.folder / "run.json"
    tracker = Tracker(copied, "reviews", TrackingConfig())
    assert tracker.flush()  # nothing is on its way while the folder is looked at
    for content in DAMAGED.values():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        before = {name: data for name, data in by_hand.files_of(copied).items() if not name.startswith("mlflow")}
        with pytest.raises(UserError, match=r"missing or damaged.*restore it from a backup") as refused:
            tracker.catch_up(history)
        assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1
        after = {name: data for name, data in by_hand.files_of(copied).items() if not name.startswith("mlflow")}
        assert after == before and len(load_chain(copied)) == 3
    path.write_bytes(WHOLE)
    tracker.catch_up(history)
    tracker.close()
    assert tracker.waiting == 0

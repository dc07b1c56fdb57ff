"""What `jobs/benchmark.py router` makes of pooled states: figures worked out from states that can be told apart."""

import pytest
import torch

from jobs import benchmark
from pipeline.benchmarks.router.report import as_table
from pipeline.benchmarks.router.run import after_task, against_batch, learn
from pipeline.config import RouterConfig

CONFIG = RouterConfig(layers=1, features=60, regularisation=0.5)


def states(rows: int, axis: int, seed: int) -> torch.Tensor:
    """Rows along one axis of eight, with a little noise."""
    noise = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)) * 0.05
    return noise + 3 * torch.eye(8)[axis]


@pytest.fixture
def pooled():
    """Task a along axis 0, b along axis 1; three of b's four test rows lie where a's are."""
    test_b = torch.cat([states(3, 0, 5), states(1, 1, 6)])
    return {
        "a": {"train": states(20, 0, 1), "validation": states(4, 0, 2), "test": states(4, 0, 3)},
        "b": {"train": states(30, 1, 4), "validation": states(4, 1, 7), "test": test_b},
    }


def test_figures_are_given_as_one_task_after_another_arrives(pooled):
    first, both = learn(CONFIG, pooled)
    assert after_task(first, pooled) == {"task": "a", "tasks": 1, "accuracy": 1.0, "routed": {"a": {"a": 1.0}}}
    found = after_task(both, pooled)
    assert found["routed"] == {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.75, "b": 0.25}}
    assert found["accuracy"] == (1.0 + 0.25) / 2 and (found["task"], found["tasks"]) == ("b", 2)
    assert against_batch(both, pooled) <= 1e-8


def test_the_table_says_what_the_report_says(pooled):
    report = {
        "settings": {"layers": 1, "regularisation": 0.5},
        "chosen_on_validation_from": [{"layers": 1, "regularisation": 0.5, "validation": 0.875}],
        "after_each_task": [after_task(router, pooled) for router in learn(CONFIG, pooled)],
        "tfidf_all_tasks_at_once": 0.5,
        "recursive_against_batch": 1e-12,
        "kept_bytes": 29760,
        "seconds": 1.5,
    }
    text = as_table(report)
    for told in ("87.50", "62.50 %", "75.0", "25.0", "50.00 %", "1.0e-12", "0.0 MB"):
        assert told in text


def test_a_mistake_is_one_message_before_anything_is_loaded(tmp_path, capsys):
    given = ["router", "--backbone", "nowhere", "--data", "nowhere", "--out", str(tmp_path / "router.json")]
    assert benchmark.main([*given, "--tasks", "a", "a"]) == 2
    assert benchmark.main([*given, "--tasks", "a", "b", "--test-rows", "0"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "at least two tasks" in told[0] and "--test-rows is 0" in told[1]

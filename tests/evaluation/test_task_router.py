"""The task router's algebra against normal equations on all rows at once, and what is kept of it (METHODS 3)."""

import numpy as np
import pytest
import torch

from pipeline.config import RouterConfig
from pipeline.evaluation.task_router import TaskRouter, random_signs
from pipeline.experts.bank import Bank

CONFIG = RouterConfig(layers=1, features=150, regularisation=2.5, seed=5)
WIDTH = 24


def states(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) + seed / 10


def phi(x: torch.Tensor) -> np.ndarray:
    """relu(x P) by numpy."""
    return np.maximum(x.double().numpy() @ random_signs(WIDTH, CONFIG.features, CONFIG.seed).numpy(), 0)


def learned(router: TaskRouter, task: str, x: torch.Tensor, pieces: int = 1) -> TaskRouter:
    """The router after a task's rows, which come in pieces."""
    normal, moment = 0, 0
    for part in x.chunk(pieces):
        features = router.features(part)
        normal, moment = normal + features.T @ features, moment + features.sum(dim=0)
    return router.learn(task, normal, moment)


def test_learning_task_after_task_equals_the_normal_equations_on_all_rows_at_once():
    rows = [("a", states(70, 1)), ("b", states(41, 2)), ("a", states(13, 3)), ("c", states(90, 4))]  # a comes again
    router = TaskRouter.empty(CONFIG)
    for pieces, (task, x) in enumerate(rows, start=1):
        router = learned(router, task, x, pieces)
    assert router.tasks == ("a", "b", "c")
    features = np.concatenate([phi(x) for _, x in rows])
    targets = np.concatenate([np.eye(3)[["abc".index(task)] * len(x)] for task, x in rows])
    ridge = CONFIG.regularisation * np.eye(CONFIG.features)
    expected = np.linalg.solve(features.T @ features + ridge, features.T @ targets)
    assert np.abs(router.weights.numpy() - expected).max() <= 1e-8 * np.abs(expected).max()
    asked = states(30, 9)
    scores = phi(asked) @ expected
    assert np.abs(router.scores(asked).numpy() - scores).max() <= 1e-8 * np.abs(scores).max()


def test_the_solution_with_one_feature_worked_out_by_hand():
    # rows of a: 1 and 3, of b: 2; lambda 6: normal 1 + 9 + 4 = 14, weights (1 + 3) / 20 and 2 / 20
    one = TaskRouter.empty(RouterConfig(features=1, regularisation=6.0))
    one = one.learn("a", torch.tensor([[10.0]]).double(), torch.tensor([4.0]).double())
    one = one.learn("b", torch.tensor([[4.0]]).double(), torch.tensor([2.0]).double())
    assert one.weights.tolist() == [[pytest.approx(0.2), pytest.approx(0.1)]]


def test_the_random_signs_are_the_bits_of_the_generator_in_order():
    words = [int(word) for word in np.random.PCG64(5).random_raw(2)]
    bits = [word >> place & 1 for word in words for place in range(64)]
    signs = random_signs(4, 30, 5)
    assert signs.shape == (4, 30) and signs.dtype == torch.double
    assert signs.flatten().tolist() == [(1 if bit else -1) / 2 for bit in bits[:120]]


def test_what_is_kept_grows_with_the_features_and_not_with_the_rows(tmp_path):
    few, many = (learned(TaskRouter.empty(CONFIG), "a", states(rows, 1)) for rows in (3, 300))
    assert [t.shape for t in few.tensors().values()] == [t.shape for t in many.tensors().values()]
    default = TaskRouter.empty(RouterConfig()).tensors()
    assert sum(tensor.numel() * tensor.element_size() for tensor in default.values()) == 32_000_000
    bank = Bank(tmp_path)
    digest = bank.put(many.tensors(), many.note())
    again = TaskRouter.restore(bank.get(digest), bank.metadata(digest))
    assert again.tasks == ("a",) and again.config == CONFIG
    assert torch.equal(again.scores(states(5, 2)), many.scores(states(5, 2)))


def test_only_a_change_of_the_features_makes_the_kept_sums_useless():
    router = TaskRouter.empty(CONFIG)
    for name, value in (("regularisation", 9.0), ("rows", 7)):
        assert router.fits(CONFIG.model_copy(update={name: value}))
    for name, value in (("layers", 2), ("features", 151), ("max_tokens", 9), ("seed", 6)):
        assert not router.fits(CONFIG.model_copy(update={name: value}))

"""The heat map as a file: what is drawn is looked at through its pixels."""

import numpy as np
from matplotlib.image import imread

from pipeline.evaluation.plots import heat_map

TASKS = ["product_reviews", "tweets", "editorials"]
R = [[0.8, None, None], [0.7, 0.9, None], [0.75, 0.6, 1.0]]


def test_heat_map_is_a_readable_png_whose_bytes_repeat(tmp_path):
    heat_map(TASKS, R, tmp_path / "one.png", "moe_cl")
    heat_map(TASKS, R, tmp_path / "two.png", "moe_cl")
    first = (tmp_path / "one.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "two.png").read_bytes()
    height, width = imread(tmp_path / "one.png").shape[:2]
    assert min(height, width) >= 300


def test_heat_map_changes_with_a_score_and_with_a_title(tmp_path):
    pictures = []
    for name, title, value in [("a", "x", 0.8), ("b", "x", 0.2), ("c", "y", 0.8)]:
        heat_map(["one"], [[value]], tmp_path / f"{name}.png", title)
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert len(set(pictures)) == 3


def test_a_higher_score_is_darker_and_a_missing_one_is_grey(tmp_path):
    def share_of(colour, value):
        heat_map(["one"], [[value]], tmp_path / "x.png", "t")
        pixels = (imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
        return float(np.all(pixels == colour, axis=-1).mean())

    grey = (0xE6, 0xE6, 0xE6)
    assert share_of(grey, None) > 0.2 > share_of(grey, 0.5)
    darkest, lightest = (0x10, 0x42, 0x7A), (0xF2, 0xF6, 0xFB)
    assert share_of(darkest, 1.0) > 0.2 > share_of(darkest, 0.0)
    assert share_of(lightest, 0.0) > 0.2 > share_of(lightest, 1.0)


def test_a_matrix_of_many_tasks_is_drawn_without_numbers(tmp_path):
    tasks = [f"task_{n}" for n in range(30)]
    matrix = [[0.5 if i <= t else None for i in range(30)] for t in range(30)]
    heat_map(tasks, matrix, tmp_path / "many.png", "many")
    assert imread(tmp_path / "many.png").shape[1] < 4000

"""The learning-rate factor, worked out by hand."""

import math

import pytest

from pipeline.training.schedule import rate, routed_ratio


def test_without_warmup_it_is_a_cosine_from_one_to_zero():
    half = math.sqrt(0.5)
    expected = [1, (1 + half) / 2, 0.5, (1 - half) / 2]  # cos of 0, 45, 90, 135 degrees
    assert [rate(step, 4, 0.0) for step in range(4)] == pytest.approx(expected, abs=1e-12)


def test_warmup_is_linear_and_its_last_step_has_the_whole_rate():
    # 10 steps, 0.4 of them warm-up: 1/4, 2/4, 3/4, 4/4, then a cosine over the other 6 at 0, 30, ... 150 degrees
    root = math.sqrt(3) / 2
    expected = [0.25, 0.5, 0.75, 1, 1, (1 + root) / 2, 0.75, 0.5, 0.25, (1 - root) / 2]
    assert [rate(step, 10, 0.4) for step in range(10)] == pytest.approx(expected, abs=1e-12)


def test_a_share_of_less_than_a_step_is_one_step_of_warmup():
    assert rate(0, 8, 0.05) == 1.0
    assert rate(1, 8, 0.05) == 1.0
    assert rate(2, 8, 0.05) < 1.0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 30, 100, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.07, 0.1, 0.5, 0.99])
def test_every_step_learns_and_none_more_than_the_whole_rate(num_steps, warmup):
    factors = [rate(step, num_steps, warmup) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == 1.0


@pytest.mark.parametrize(
    ("num_steps", "warmup", "steps"), [(100, 0.07, 7), (100, 0.29, 29), (1000, 0.07, 70), (50, 0.1, 5)]
)
def test_a_whole_share_of_the_steps_is_that_many_steps_of_warmup(num_steps, warmup, steps):
    assert [rate(step, num_steps, warmup) for step in range(steps)] == pytest.approx(
        [(step + 1) / steps for step in range(steps)], abs=1e-12
    )


def test_an_expert_with_a_sixteenth_of_the_tokens_takes_about_a_third_of_the_rate():
    # Hunyuan-Large: 16 experts, top-1, ratio about .31 where B is about .26 Bn; sqrt(B/Bn) = .51, of B/16: .1275
    by_hand = (1 / 0.51 + 0.51) / (1 / 0.1275 + 0.1275)
    assert routed_ratio(1 / 16, 0.2601e6, 1e6) == pytest.approx(by_hand, rel=1e-9) and abs(by_hand - 0.31) < 0.005


def test_without_a_noise_batch_the_ratio_is_the_limit_for_small_batches():
    assert routed_ratio(1 / 4, 500, None) == 0.5
    assert routed_ratio(2 / 8, 1.0, 1e12) == pytest.approx(0.5, rel=1e-6)
    assert routed_ratio(1.0, 500, 800) == 1.0

"""The lengths of responses against an integral that shares nothing with them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1z.cost.lengths import Lengths
from megatron_r1z.errors import ConfigError

BUDGETS = st.integers(10, 8000)


def integral(lengths: Lengths, power: int) -> float:
    """Mean of a response's length to a power: that of the survival times the derivative, by the trapezium rule."""
    points = [lengths.budget * index / 1000 for index in range(1001)]
    values = [power * point ** (power - 1) * math.exp(-point / lengths.scale) for point in points]
    return sum((a + b) / 2 * (q - p) for a, b, p, q in zip(values, values[1:], points, points[1:], strict=False))


@given(BUDGETS, st.floats(0.05, 0.99))
def test_the_mean_is_the_one_that_was_asked_for(budget: int, share: float) -> None:
    lengths = Lengths(7.0, max(1.0, share * budget), budget)
    assert integral(lengths, 1) == pytest.approx(lengths.response, rel=2e-3)


@given(BUDGETS, st.floats(0.05, 0.99), st.floats(1, 3000))
def test_the_mean_square_includes_the_prompt(budget: int, share: float, prompt: float) -> None:
    lengths = Lengths(prompt, max(1.0, share * budget), budget)
    expected = prompt**2 + 2 * prompt * lengths.response + integral(lengths, 2)
    assert lengths.mean_square == pytest.approx(expected, rel=3e-3)


def test_a_mean_at_the_budget_means_that_all_are_cut_off() -> None:
    lengths = Lengths(10.0, 1000.0, 1000)
    assert lengths.mean_square == 1010.0**2
    assert (lengths.survival(999.0), lengths.survival(1000.0)) == (1.0, 0.0)


@pytest.mark.parametrize(("prompt", "response"), [(0.5, 10.0), (10.0, 0.5), (10.0, 101.0), (math.nan, 10.0), (10.0, math.nan)])
def test_lengths_that_cannot_be(prompt: float, response: float) -> None:
    with pytest.raises(ConfigError, match=r"a prompt has at least 1, a response 1 to rollout\.max_response_tokens 100"):
        Lengths(prompt, response, 100)

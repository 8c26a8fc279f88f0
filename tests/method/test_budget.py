"""The sparsity that a budget allows is the largest one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frodctl.errors import UsageError
from frodctl.method.budget import sparsity_for_budget, trainable

WIDTHS = st.lists(st.integers(2, 300), min_size=1, max_size=12)


@given(widths=WIDTHS, share=st.floats(0, 1))
def test_the_sparsity_is_the_largest_that_fits(widths: list[int], share: float) -> None:
    least, most = sum(widths), sum(n * n for n in widths)
    budget = least + share * (most - least)
    sparsity = sparsity_for_budget(widths, budget)
    assert sum(trainable(n, sparsity) for n in widths) <= budget
    if sparsity < 1:
        above = math.nextafter(sparsity, 2)
        assert sum(trainable(n, above) for n in widths) > budget


@given(widths=WIDTHS)
def test_less_than_the_scales_is_refused_with_the_minimum(widths: list[int]) -> None:
    with pytest.raises(UsageError, match=str(sum(widths))):
        sparsity_for_budget(widths, sum(widths) - 1)


def test_all_positions_fit() -> None:
    assert sparsity_for_budget([10, 10], 1000) == 1.0

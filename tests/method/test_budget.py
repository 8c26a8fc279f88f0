"""The sparsities that a budget allows are the largest ones in the proportion asked for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frodctl.errors import UsageError
from frodctl.method.budget import allocate, trainable

LAYERS = st.lists(st.tuples(st.integers(2, 300), st.integers(1, 5)), min_size=1, max_size=8)


def total(layers: list[tuple[int, int]], sparsities: list[float]) -> int:
    return sum(count * trainable(n, s) for (n, count), s in zip(layers, sparsities, strict=True))


@given(layers=LAYERS, share=st.floats(0, 1))
def test_one_sparsity_is_the_largest_that_fits(layers: list[tuple[int, int]], share: float) -> None:
    least, most = sum(n * count for n, count in layers), sum(n * n * count for n, count in layers)
    budget = least + share * (most - least)
    found = allocate(layers, [1.0] * len(layers), budget)
    assert len(set(found)) == 1
    assert total(layers, found) <= budget
    if found[0] < 1:
        assert total(layers, [math.nextafter(found[0], 2)] * len(layers)) > budget


@given(layers=LAYERS, share=st.floats(0, 1), data=st.data())
def test_in_proportion_to_weights(layers: list[tuple[int, int]], share: float, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(layers), max_size=len(layers)))
    least, most = sum(n * count for n, count in layers), sum(n * n * count for n, count in layers)
    budget = least + share * (most - least)
    found = allocate(layers, weights, budget)
    assert all(0 <= sparsity <= 1 for sparsity in found)
    assert total(layers, found) <= budget
    free = [s / w for s, w in zip(found, weights, strict=True) if s < 1]
    if free:
        factor = free[0]
        assert free == pytest.approx([factor] * len(free), rel=1e-12)
        assert all(factor * w >= 1 - 1e-12 for s, w in zip(found, weights, strict=True) if s == 1)
        more = [min(1.0, factor * (1 + 1e-9) * w) for w in weights]
        assert total(layers, more) > budget or factor == 0


@given(layers=LAYERS)
def test_less_than_the_scales_is_refused_with_the_minimum(layers: list[tuple[int, int]]) -> None:
    least = sum(n * count for n, count in layers)
    with pytest.raises(UsageError, match=str(least)):
        allocate(layers, [1.0] * len(layers), least - 1)


def test_one_position_each_does_not_fit() -> None:
    """Then nobody gets one, not those whose weights are large either."""
    layers, weights = [(2, 1)] * 5 + [(133, 5), (277, 1)], [1.0] * 6 + [0.5]
    least = sum(n * count for n, count in layers)
    assert allocate(layers, weights, least + 10.02) == [0] * 7
    assert total(layers, allocate(layers, weights, least + 11)) == least + 11


def test_all_positions_fit() -> None:
    assert allocate([(10, 2)], [1.0], 1000) == [1.0]
    assert allocate([(2, 1)], [1.9], 4) == [1.0]  # though 1.9 (1 / 1.9) < 1


def test_a_category_without_weight_has_its_scales_alone() -> None:
    assert allocate([(10, 1), (20, 1)], [0.0, 3.0], 50)[0] == 0
    assert allocate([(10, 1), (20, 1)], [0.0, 0.0], 1000) == [0, 0]

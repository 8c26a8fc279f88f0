"""V⁻ᵀ: the inverse where there is one, the pseudo-inverse where there is none, and float32 only where it will do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.method.dual import ROUNDED_AFTERWARDS, TO_A_MILLIONTH, Accuracy, Dual, inverse_transpose

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def conditioned(n: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A matrix (n, n) in float64 whose singular values fall evenly from 1 to 1/condition."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q for _ in range(2))
    return left * torch.linspace(1, 1 / condition, n, dtype=torch.float64) @ right.T


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 40), exponent=st.floats(0, 8), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_it_is_the_inverse_transpose_of_what_is_stored(n: int, exponent: float, dtype: torch.dtype, seed: int) -> None:
    V = conditioned(n, 10.0**exponent, seed).to(dtype)
    dual, exact = Dual.of(V), V.double()
    s = torch.linalg.svdvals(exact)
    if not dual.regular or s[-1] < 1e-12 * s[0]:  # rounding can make a V singular
        return
    assert float((dual.D.T @ exact - torch.eye(n)).norm()) <= 1e-14 * n * float(s[0] / s[-1])
    assert 0.5 * float(s[0] / s[-1]) <= dual.condition <= 1.01 * float(s[0] / s[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_basis_has_the_pseudo_inverse_and_is_computed_with_in_float64(dtype: torch.dtype) -> None:
    V = torch.eye(600, dtype=dtype)
    V[3, 3] = 0
    dual = Dual.of(V)
    assert inverse_transpose(V.double()) is None
    assert not dual.regular
    assert dual.condition == float("inf")
    assert torch.allclose(dual.D, V.double())  # a projector is its own pseudo-inverse
    assert {dual.work(accuracy) for accuracy in (ROUNDED_AFTERWARDS, TO_A_MILLIONTH)} == {torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [2.0, 40.0, 400.0])
@pytest.mark.parametrize("n", [24, 48])
def test_float32_does_only_where_the_accuracy_says_so(dtype: torch.dtype, condition: float, n: int) -> None:
    asked = Accuracy(condition=100, width=32, dtypes=(torch.float32, torch.bfloat16))
    found = Dual.of(conditioned(n, condition).to(dtype)).work(asked)
    allowed = dtype in asked.dtypes and condition < asked.condition and n >= asked.width
    assert found == (torch.float32 if allowed else torch.float64)


def test_products_in_float32_are_right_to_a_millionth_where_that_is_asked_for() -> None:
    V = conditioned(64, 50.0).float()
    dual = Dual.of(V)
    assert dual.work(TO_A_MILLIONTH) == torch.float32
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    exact = W.double() @ dual.D
    assert float((W @ dual.D.float() - exact).norm() / exact.norm()) < 2e-6

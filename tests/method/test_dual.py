"""V⁻ᵀ: the inverse where there is one, the pseudo-inverse where there is none, and float32 only where it will do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frodctl.arrays import NAMED, HostArray, dtype_name
from frodctl.method.dual import ROUNDED_AFTERWARDS, TO_A_MILLIONTH, Accuracy, Dual
from frodctl.method.kernels import kernels_of

CPU = kernels_of("cpu")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def conditioned(n: int, condition: float, seed: int = 0) -> HostArray:
    """A matrix (n, n) in float64 whose singular values fall evenly from 1 to 1/condition."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return left * np.linspace(1, 1 / condition, n) @ right.T


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 40), exponent=st.floats(0, 8), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@example(n=10, exponent=0.0, dtype="float64", seed=0)  # orthogonal: Lanczos' method is done after one step
def test_it_is_the_inverse_transpose_of_what_is_stored(n: int, exponent: float, dtype: str, seed: int) -> None:
    V = conditioned(n, 10.0**exponent, seed).astype(NAMED[dtype])
    dual, exact = Dual.of(V, CPU), V.astype(np.float64)
    s = np.linalg.svd(exact, compute_uv=False)
    if not dual.regular or s[-1] < 1e-12 * s[0]:  # rounding can make a V singular
        return
    assert float(np.linalg.norm(dual.D.T @ exact - np.eye(n))) <= 1e-14 * n * float(s[0] / s[-1])
    assert 0.5 * float(s[0] / s[-1]) <= dual.condition <= 1.01 * float(s[0] / s[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_singular_basis_has_the_pseudo_inverse_and_is_computed_with_in_float64(dtype: str) -> None:
    V = np.eye(600).astype(NAMED[dtype])
    V[3, 3] = 0
    dual = Dual.of(V, CPU)
    assert not dual.regular
    assert dual.condition == float("inf")
    np.testing.assert_allclose(dual.D, V.astype(np.float64), atol=1e-8)  # a projector is its own pseudo-inverse
    assert {dual.work(accuracy) for accuracy in (ROUNDED_AFTERWARDS, TO_A_MILLIONTH)} == {"float64"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [2.0, 40.0, 400.0])
@pytest.mark.parametrize("n", [24, 48])
def test_float32_does_only_where_the_accuracy_says_so(dtype: str, condition: float, n: int) -> None:
    asked = Accuracy(condition=100, width=32, dtypes=("float32", "bfloat16"))
    V = conditioned(n, condition).astype(NAMED[dtype])
    allowed = dtype in asked.dtypes and condition < asked.condition and n >= asked.width
    expected = "float32" if allowed else "float64"
    assert Dual.of(V, CPU).work(asked) == expected
    dual = Dual.of(V, CPU, asked)
    assert (dual.work(asked), dtype_name(dual.V), dtype_name(dual.inverse)) == (expected, dtype, expected)
    residual = np.linalg.norm(dual.D.T.astype(np.float64) @ V.astype(np.float64) - np.eye(n))
    assert residual <= np.finfo(expected).eps * n * condition


def test_products_in_float32_are_right_to_a_millionth_where_that_is_asked_for() -> None:
    V = conditioned(64, 50.0).astype(np.float32)
    dual = Dual.of(V, CPU)
    assert dual.work(TO_A_MILLIONTH) == "float32"
    W = np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32)
    exact = W.astype(np.float64) @ dual.D
    assert np.linalg.norm(W @ dual.D.astype(np.float32) - exact) < 2e-6 * np.linalg.norm(exact)

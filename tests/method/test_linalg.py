"""The dense kernels against their definitions, on both sides of every size from which they work by blocks or halves."""

from __future__ import annotations

import pytest
import torch

from frodctl.method.linalg import (
    Scratch,
    add_gram_,
    full_float32,
    inverse_cholesky,
    mirror_,
    rough_norm,
    spectral_norm,
    times_upper,
)

SIZES = [1, 2, 33, 127, 128, 129, 200, 383, 384, 500]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("beta", [0, 1])
def test_a_gram_matrix_is_added(n: int, beta: int) -> None:
    X, before = normal(40, n), normal(n, n, seed=1)
    before = before + before.T
    total = before.clone()
    torch.testing.assert_close(mirror_(add_gram_(total, X, beta=beta)), beta * before + X.T @ X)


@pytest.mark.parametrize("n", SIZES)
def test_that_of_a_lower_triangle(n: int) -> None:
    X = normal(n, n).tril()
    torch.testing.assert_close(mirror_(add_gram_(torch.empty_like(X), X, beta=0, lower=True)), X.T @ X)


@pytest.mark.parametrize("n", SIZES)
def test_the_inverse_of_the_cholesky_factor(n: int) -> None:
    """L⁻¹ A L⁻ᵀ = I for a lower triangle with a positive diagonal, as only L⁻¹ has; A's lower triangle is not read."""
    X = normal(n + 5, n)
    A = X.T @ X
    inverse = inverse_cholesky(A.triu() + torch.full_like(A, torch.nan).tril(-1), torch.full_like(A, torch.nan))
    assert torch.equal(inverse, inverse.tril())
    assert (inverse.diagonal() > 0).all()
    torch.testing.assert_close(inverse @ A @ inverse.T, torch.eye(n, dtype=A.dtype), rtol=0, atol=1e-8)


def test_it_refuses_what_is_not_positive_definite() -> None:
    A = torch.eye(300, dtype=torch.float64)
    A[280, 280] = -1
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_cholesky(A, torch.empty_like(A))


@pytest.mark.parametrize("n", SIZES)
def test_a_product_with_an_upper_triangle(n: int) -> None:
    X, P = normal(7, n), normal(n, n, seed=1).triu()
    torch.testing.assert_close(times_upper(X, P, torch.full_like(X, torch.nan)), X @ P)


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e-20, 1.0, 1e20, 1e40, 1e300])
def test_a_norm_at_any_scale(scale: float) -> None:
    W = normal(30, 20)
    assert rough_norm(W * scale) == pytest.approx(float(W.norm()) * scale, rel=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        if 1e-30 < scale < 1e30:
            assert rough_norm((W * scale).to(dtype)) == pytest.approx(float(W.norm()) * scale, rel=0.02)


def test_the_norm_of_nothing_and_of_what_is_not_finite() -> None:
    assert rough_norm(torch.zeros(3, 4)) == rough_norm(torch.empty(0, 4)) == 0
    assert rough_norm(torch.tensor([[1.0, torch.inf]])) == torch.inf
    assert rough_norm(torch.tensor([[1.0, torch.nan]])) != rough_norm(torch.tensor([[1.0, torch.nan]]))


def test_the_spectral_norm_is_bounded_from_below() -> None:
    for seed in range(20):
        A = normal(40, 40, seed=seed)
        exact = float(torch.linalg.matrix_norm(A, 2))
        assert 0.9 * exact <= spectral_norm(A) <= (1 + 1e-12) * exact


def test_scratch_is_used_again_and_grows() -> None:
    scratch = Scratch(torch.device("cpu"))
    first = scratch.empty("a", (4, 5))
    assert scratch.empty("a", (2, 10)).data_ptr() == first.data_ptr()
    assert scratch.empty("b", (4, 5)).data_ptr() != first.data_ptr()
    assert scratch.empty("a", (40, 5)).shape == (40, 5)
    X = torch.ones(3, 3)
    assert scratch.cast("c", X, torch.float32) is X
    torch.testing.assert_close(scratch.cast("c", X, torch.float64), X.double())


def test_products_are_exact_for_a_while_and_the_callers_choice_is_kept() -> None:
    before = torch.get_float32_matmul_precision()
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before

"""The two forms of the update against float64, in every dtype and for degenerate bases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frodctl.arrays import NAMED, HostArray, epsilon
from frodctl.method.kernels import kernels_of
from frodctl.method.update import CategoryUpdate, Factors

CPU = kernels_of("cpu")


def problem(m: int, n: int, nnz: int, dtype: str, seed: int) -> tuple[HostArray, ...]:
    """W, V, indices, λ' and values: a basis of moderate condition, and λ' near the column norms of W V⁻ᵀ."""
    rng = np.random.default_rng(seed)
    V = (rng.standard_normal((n, n)) / n**0.5 + 2 * np.eye(n)).astype(NAMED[dtype])
    W = rng.standard_normal((m, n)).astype(NAMED[dtype])
    indices = rng.integers(0, n, (2, nnz))
    start = column_norms(projected(W, V))
    scales = (start * (1 + 0.1 * rng.standard_normal(n))).astype(np.float32)
    return W, V, indices, scales, (0.1 * start.mean() * rng.standard_normal(nnz)).astype(np.float32)


def projected(W: HostArray, V: HostArray) -> HostArray:
    """W V⁻ᵀ in float64."""
    found: HostArray = np.linalg.solve(V.astype(np.float64), W.astype(np.float64).T).T
    return found


def column_norms(B: HostArray) -> HostArray:
    return np.linalg.norm(B, axis=0)


def norm(X: HostArray) -> float:
    return float(np.linalg.norm(X.astype(np.float64)))


def sparse(indices: HostArray, values: HostArray, n: int) -> HostArray:
    S = np.zeros((n, n))
    np.add.at(S, tuple(indices), values.astype(np.float64))
    return S


def assembled(blocks: object) -> HostArray:
    """All rows, which must come in order and once."""
    parts = [(rows, block.astype(np.float64)) for rows, block in blocks]  # type: ignore[attr-defined]
    position = 0
    for rows, block in parts:
        assert rows == slice(position, position + len(block))
        position += len(block)
    return np.concatenate([block for _, block in parts])


def expected(
    W: HostArray, V: HostArray, indices: HostArray, scales: HostArray, values: HostArray
) -> tuple[HostArray, HostArray]:
    """W' of the reconstruct form and W' − W of the delta form, in float64."""
    B, n, exact = projected(W, V), len(V), V.astype(np.float64)
    norms = column_norms(B)
    S, S_d = sparse(indices, values, n), sparse(indices, values.astype(V.dtype), n)
    U = B / np.where(norms > 1e-12, norms, np.inf)
    whole = U.astype(np.float32).astype(V.dtype) @ (S_d + np.diag(scales.astype(V.dtype).astype(np.float64))) @ exact.T
    change = U @ (S + np.diag(scales - norms.astype(V.dtype).astype(np.float64))) @ exact.T
    return whole, change


@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 5, 24, 70]),
    n=st.sampled_from([1, 8, 33]),
    nnz=st.integers(0, 40),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    seed=st.integers(0, 2**31),
)
@example(m=70, n=1, nnz=32, dtype="float32", seed=3050)  # λ' and S cancel
def test_both_forms(m: int, n: int, nnz: int, dtype: str, seed: int) -> None:
    W, V, indices, scales, values = problem(m, n, nnz, dtype, seed)
    whole, change = expected(W, V, indices, scales, values)
    update = CategoryUpdate(V, indices, CPU)
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    delta = assembled(update.delta(W, scales, values))
    assert norm(delta - change) <= tolerance * (norm(change) + norm(W))
    found = assembled(update.reconstruct(W, scales, values))
    # an entry of U at a tie may go to its other neighbour; a 16-bit W' would not show it
    flips = 0 if dtype in ("float32", "float64") else 1e-3
    assert norm(found - whole) <= tolerance * (norm(whole) + norm(W)) + flips * norm(whole)


def test_more_rows_than_a_block_and_the_float32_product() -> None:
    """A wide bfloat16 basis is taken in float32; what comes out is right to float32."""
    W, V, indices, scales, values = problem(1500, 520, 300, "bfloat16", 0)
    update = CategoryUpdate(V, indices, CPU)
    assert update.precision == "float32"
    whole, change = expected(W, V, indices, scales, values)
    assert norm(assembled(update.delta(W, scales, values)) - change) <= 1e-5 * norm(change)
    assert norm(assembled(update.reconstruct(W, scales, values)) - whole) <= 2e-4 * norm(whole)


@pytest.mark.parametrize("m", [24, 70, 1500])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("smallest", [1, 1e-6], ids=["", "a direction that the weight hardly uses"])
def test_with_the_scales_given(dtype: str, size: float, m: int, smallest: float) -> None:
    """The change is right to rounding of W in float32, for any size of the change, and of itself."""
    _, V, indices, _, values = problem(m, 33, 60, dtype, 5)
    rng = np.random.default_rng(6)
    B = rng.standard_normal((m, 33))
    B[:, 7] *= smallest
    W = (B @ V.astype(np.float64).T).astype(np.float32)
    B = projected(W, V)
    base = column_norms(B).astype(np.float32)
    scales = (base + size * rng.standard_normal(33) * base.mean()).astype(np.float32)
    S = sparse(indices, values * np.float32(size), 33)
    exact = B / base @ (S + np.diag(scales.astype(np.float64) - base)) @ V.astype(np.float64).T
    found = assembled(CategoryUpdate(V, indices, CPU).delta(W, scales, values * np.float32(size), base))
    assert norm(found - exact) <= 2.0**-23 * norm(W) + 1e-6 * norm(exact)


def test_with_the_scales_given_an_untouched_weight_does_not_move() -> None:
    W, V, indices, _, values = problem(20, 16, 9, "float32", 1)
    scales = np.random.default_rng(2).random(16, np.float32) + 0.5
    update = CategoryUpdate(V, indices, CPU)
    assert not assembled(update.delta(W, scales, np.zeros_like(values), scales)).any()


def test_rows_of_a_null_direction_drop_out_and_its_columns_do_not() -> None:
    W, V, *_ = problem(20, 16, 0, "float32", 2)
    B = projected(W, V)
    B[:, 3] = 0
    W = (B @ V.astype(np.float64).T).astype(np.float32)
    base = column_norms(B).astype(np.float32)
    base[3] = 0
    for indices, moves in (([[3], [5]], False), ([[5], [3]], True)):
        update = CategoryUpdate(V, np.array(indices), CPU)
        change = assembled(update.delta(W, base, np.ones(1, np.float32), base))
        assert bool(np.abs(change).max() > 0.01) == moves


@pytest.mark.parametrize("given", [True, False], ids=["with λ", "without"])
@pytest.mark.parametrize("factor", [1e-6, 1e-14, 1e-20, 1e-30])
@pytest.mark.parametrize("n", [24, 520])
def test_the_change_of_a_weight_far_smaller_than_its_basis(factor: float, given: bool, n: int) -> None:
    """No row drops out, and the change is right to rounding, relative to itself."""
    W, V, indices, _, values = problem(30, n, 40, "bfloat16", 6)
    assert (CategoryUpdate(V, indices, CPU).precision == "float32") == (n > 512)
    W = (W.astype(np.float64) * factor).astype(np.float32)
    B = projected(W, V)
    start = column_norms(B)
    base = start.astype(np.float32 if given else V.dtype)
    scales = base.astype(np.float32) + np.float32(0.1)
    moved = np.diag(scales.astype(np.float64) - base.astype(np.float64))
    change = B / start @ (sparse(indices, values, n) + moved) @ V.astype(np.float64).T
    found = assembled(CategoryUpdate(V, indices, CPU).delta(W, scales, values, base if given else None))
    assert norm(found - change) <= 1e-5 * norm(change)


def test_rows_that_are_rounding_drop_out_of_the_change() -> None:
    """Where λ is not given: direction 3 is no part of W, at any scale."""
    W, V, *_ = problem(20, 16, 0, "float32", 2)
    B = projected(W, V)
    B[:, 3] = 0
    for factor in (1.0, 1e-20):
        W = B @ V.astype(np.float64).T * factor
        for indices, moves in (([[3], [5]], False), ([[5], [3]], True)):
            update = CategoryUpdate(V, np.array(indices), CPU)
            start = update.base_scales(W)
            change = assembled(update.delta(W, start, np.ones(1, np.float32)))
            assert bool(np.abs(change).max() > 0.01) == moves


def test_peft_has_no_columns_of_u_below_1e_12() -> None:
    """So the operator that it trains has none, nor have the factors that its layers are given."""
    W, V, indices, scales, values = problem(24, 16, 9, "float32", 7)
    small = W * np.float32(1e-14)
    assert not assembled(CategoryUpdate(V, indices, CPU).reconstruct(small, scales, values)).any()
    assert not Factors(V, CPU)(small)[0].any()


def test_a_singular_basis_takes_the_pseudo_inverse() -> None:
    W, V, indices, scales, values = problem(20, 16, 9, "float32", 3)
    V[:, 4] = 0
    update = CategoryUpdate(V, indices, CPU)
    pseudo = np.linalg.pinv(V.astype(np.float64), 1e-6)
    np.testing.assert_allclose(update.inverse("float64"), pseudo, rtol=1e-5, atol=1e-8)
    assert np.isfinite(assembled(update.reconstruct(W, scales, values))).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_any_stride(transposed: bool) -> None:
    W, V, indices, scales, values = problem(24, 24, 9, "float32", 4)
    update = CategoryUpdate(V, indices, CPU)
    plain = assembled(update.reconstruct(W, scales, values))
    strided = np.asfortranarray(W) if transposed else np.stack([W, W], axis=1)[:, 1]
    np.testing.assert_array_equal(assembled(update.reconstruct(strided, scales, values)), plain)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("condition", [1, 1e4])
@pytest.mark.parametrize("unused", [False, True])
def test_the_factors(dtype: str, condition: float, unused: bool) -> None:
    """To float32 before U is rounded, whichever way it is computed; U is 0 in a direction that W does not use."""
    W, V, *_ = problem(48, 32, 0, dtype, 4)
    if condition > 1:
        V = (V.astype(np.float64) * np.logspace(0, -np.log10(condition), 32)).astype(V.dtype)
    if unused:
        V = np.eye(32).astype(V.dtype)
        W[:, 3] = 0
    B = projected(W, V)
    norms = column_norms(B)
    U, scales = Factors(V, CPU)(W)
    assert norm(scales - norms) <= 2e-6 * norm(norms)
    expected = B / np.where(norms > 1e-12, norms, np.inf)
    rounding = max(epsilon(dtype), 2e-6)
    assert U.dtype == NAMED[dtype]
    assert norm(U.astype(np.float64) - expected) <= rounding * norm(expected)
    assert not unused or not U[:, 3].any()


def test_the_factors_of_a_singular_basis() -> None:
    V = np.diag(np.array([2, 1, 0], np.float32))
    U, scales = Factors(V, CPU)(np.array([[4, 0, 0], [0, 3, 0]], np.float32))
    np.testing.assert_array_equal(U, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(scales, [2, 3, 0])

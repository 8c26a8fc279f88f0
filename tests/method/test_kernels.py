"""Every routine of both kernels against its definition in float64, with NaN wherever nothing may be read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frodctl.arrays import DTYPES, HostArray, from_torch, to_torch
from frodctl.method.kernels import Kernels, host, kernels_of
from frodctl.method.kernels.device import Device
from frodctl.method.linalg import Scratch, spectral_norm_of_triangle
from tests.devices import KERNELS

SIZES = [1, 2, 33, 127, 128, 129, 300]
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
Matrix = npt.NDArray[np.float64]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]


@pytest.fixture(params=TOLERANCE)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal(shape)


def symmetric(n: int, seed: int = 0) -> Matrix:
    """Positive definite, with a condition of about 10."""
    X = normal(2 * n + 4, n, seed=seed)
    return X.T @ X / (2 * n + 4) + 0.1 * np.eye(n)


def upper(A: Matrix) -> Matrix:
    """A with NaN below the diagonal."""
    return np.triu(A) + np.tril(np.full_like(A, np.nan), -1)


def full(A: HostArray) -> Matrix:
    """The symmetric matrix whose upper triangle is A's."""
    return np.triu(A).astype(np.float64) + np.triu(A, 1).T


def close(found: HostArray, expected: Matrix, dtype: str) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (200, 33, 130), (5, 0, 4)])
def test_gemm(
    kernels: Kernels, dtype: str, shape: tuple[int, int, int], beta: int, transpose_a: bool, transpose_b: bool
) -> None:
    m, k, n = shape
    A, B, C = normal(m, k), normal(k, n, seed=1), normal(m, n, seed=2)
    left, right = (kernels.put(X.T if t else X, dtype) for X, t in ((A, transpose_a), (B, transpose_b)))
    out = kernels.put(C.copy(), dtype)
    found = kernels.gemm(left, right, out, transpose_a=transpose_a, transpose_b=transpose_b, beta=beta)
    close(kernels.get(found), A @ B + beta * C, dtype)
    close(kernels.get(out), A @ B + beta * C, dtype)


def test_csrmm(kernels: Kernels, dtype: str) -> None:
    """M (3, 4) with an empty row and an entry in two parts."""
    starts, columns, entries = np.array([0, 3, 3, 4]), np.array([1, 1, 2, 0]), np.array([1.0, 2.0, -1.0, 5.0])
    X = normal(4, 6)
    found = kernels.get(kernels.csrmm(starts, columns, entries, kernels.put(X, dtype)))
    close(found, np.array([[0, 3, -1, 0], [0, 0, 0, 0], [5, 0, 0, 0]]) @ X, dtype)


@pytest.mark.parametrize("factor", [1.0, 1e-30])
def test_norms(kernels: Kernels, dtype: str, factor: float) -> None:
    X = normal(40, 33)
    for axis in (0, 1):
        found = kernels.norms(kernels.put(X * factor, dtype), axis)
        np.testing.assert_allclose(found / factor, np.linalg.norm(X, axis=axis), rtol=1e-6)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_rounded_into_rows_or_columns_of_a_host_array(kernels: Kernels, stored: str) -> None:
    X = normal(140, 33)
    for out in (np.empty((140, 33), stored), np.empty((33, 140), stored).T):
        kernels.get(kernels.put(X, "float32"), out)
        np.testing.assert_array_equal(out, X.astype(np.float32).astype(stored))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("rows", [False, True])
def test_syrk(kernels: Kernels, dtype: str, n: int, beta: int, rows: bool) -> None:
    X, before = normal(40, n) / 6, symmetric(n, seed=1)
    X = X.T.copy() if rows else X
    out = kernels.put(upper(before) if beta else np.full((n, n), np.nan), dtype)
    kernels.syrk(kernels.put(X, dtype), out, beta=beta, rows=rows)
    close(full(kernels.get(out)), (X @ X.T if rows else X.T @ X) + beta * before, dtype)


@pytest.mark.parametrize("n", SIZES)
def test_axpby(kernels: Kernels, n: int) -> None:
    A, B = symmetric(n), symmetric(n, seed=1)
    out = kernels.put(upper(B), "float64")
    kernels.axpby(0.5, kernels.put(upper(A), "float32"), 2.0, out)
    close(full(kernels.get(out)), 0.5 * A + 2 * B, "float32")
    empty = kernels.put(np.full((n, n), np.nan), "float64")
    close(full(kernels.get(kernels.axpby(-1, kernels.put(A, "float64"), 0, empty))), -A, "float64")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_trmm(kernels: Kernels, dtype: str, n: int, transpose: bool) -> None:
    X, R = normal(20, n), normal(n, n, seed=1)
    found = kernels.put(X.copy(), dtype)
    kernels.trmm(found, kernels.put(upper(R), dtype), transpose=transpose)
    close(kernels.get(found), X @ (np.triu(R).T if transpose else np.triu(R)), dtype)


@pytest.mark.parametrize("n", SIZES)
def test_trsm(kernels: Kernels, dtype: str, n: int) -> None:
    R, X = np.linalg.cholesky(symmetric(n)).T, normal(n, 20)
    found = kernels.trsm(kernels.put(upper(R), dtype), kernels.put(X.copy(), dtype))
    close(kernels.get(found), np.linalg.solve(R.T, X), dtype)


@pytest.mark.parametrize("n", SIZES)
def test_cholesky_factors_and_inverses(kernels: Kernels, dtype: str, n: int) -> None:
    A = symmetric(n)
    R = kernels.put(upper(A), dtype)
    assert kernels.potrf(R)
    factor = np.triu(kernels.get(R)).astype(np.float64)
    assert (factor.diagonal() > 0).all()
    close(factor.T @ factor, A, dtype)
    inverse = kernels.trtri(kernels.copy(R, kernels.empty((n, n), dtype)))
    close(np.triu(kernels.get(inverse)) @ factor, np.eye(n), dtype)
    close(full(kernels.get(kernels.potri(R))) @ A, np.eye(n), dtype)


@pytest.mark.parametrize("n", SIZES)
def test_what_is_not_positive_definite_has_no_factor(kernels: Kernels, dtype: str, n: int) -> None:
    A = np.eye(n)
    A[n // 2, n // 2] = -1
    assert not kernels.potrf(kernels.put(A, dtype))
    A[n // 2, n // 2] = np.nan
    assert not kernels.potrf(kernels.put(A, dtype))


@pytest.mark.parametrize("n", SIZES)
def test_sygst(kernels: Kernels, dtype: str, n: int) -> None:
    A, R = symmetric(n), np.triu(normal(n, n, seed=1)) / np.sqrt(n)
    found = kernels.sygst(kernels.put(upper(A), dtype), kernels.put(upper(R), dtype))
    close(full(kernels.get(found)), R @ A @ R.T, dtype)


@pytest.mark.parametrize("n", [0, *SIZES])
def test_syevd(kernels: Kernels, dtype: str, n: int) -> None:
    A = symmetric(n)
    values, rows = kernels.syevd(kernels.put(upper(A), dtype))
    Z = np.asarray(kernels.get(rows), np.float64)
    assert values.dtype == np.float64
    assert (np.diff(values) >= 0).all()
    close(Z @ Z.T, np.eye(n), dtype)
    close((Z.T * values) @ Z, A, dtype)


@pytest.mark.parametrize("n", [0, *SIZES])
@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_syevr(kernels: Kernels, dtype: str, n: int, share: float) -> None:
    """The largest eigenvalues and their vectors, which are orthonormal."""
    A, count = symmetric(n), math.ceil(share * n)
    values, rows = kernels.syevr(kernels.put(upper(A), dtype), count)
    Z = np.asarray(kernels.get(rows), np.float64)
    assert Z.shape == (count, n)
    close(values, np.linalg.eigvalsh(A)[::-1][:count], dtype)
    close(Z @ Z.T, np.eye(count), dtype)
    close(Z @ A, values[:, None] * Z, dtype)


def test_syevd_of_a_matrix_whose_workspace_has_no_32_bit_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the boundary, moved to where it can be tried: the other library gives the same."""
    A = symmetric(200)
    expected, _ = kernels_of("cpu").syevd(upper(A))
    monkeypatch.setattr(host, "SYEVD_LIMIT", 199)
    values, rows = kernels_of("cpu").syevd(upper(A))
    close(values, expected, "float64")
    close((rows.T * values) @ rows, A, "float64")
    assert 1 + 6 * 32_764 + 2 * 32_764**2 <= 2**31 - 1 < 1 + 6 * 32_767 + 2 * 32_767**2


@pytest.mark.parametrize("shape", [(1, 1), (30, 200), (200, 30)])
def test_svd_and_qr(kernels: Kernels, dtype: str, shape: tuple[int, int]) -> None:
    A = normal(*shape)
    values, rows = kernels.svd(kernels.put(A, dtype))
    close(values, np.linalg.svd(A, compute_uv=False), dtype)
    V = np.asarray(kernels.get(rows), np.float64)
    close((V.T * values**2) @ V, A.T @ A, "float32")
    R = np.asarray(kernels.get(kernels.qr(kernels.put(A, dtype))), np.float64)
    assert (np.triu(R) == R).all()
    close(R.T @ R, A.T @ A, dtype if dtype == "float32" else "float64")


@pytest.mark.parametrize("n", SIZES)
def test_inverse(kernels: Kernels, dtype: str, n: int) -> None:
    A = normal(n, n) + 3 * np.sqrt(n) * np.eye(n)
    inverse = kernels.inverse(kernels.put(A.copy(), dtype))
    assert inverse is not None
    close(np.asarray(kernels.get(inverse), np.float64) @ A, np.eye(n), dtype)
    A[:, 0] = 0
    assert kernels.inverse(kernels.put(A, dtype)) is None


@pytest.mark.parametrize("n", SIZES)
def test_rows_diagonals_and_mirrors(kernels: Kernels, dtype: str, n: int) -> None:
    X, Y = normal(20, n), normal(20, n, seed=1)
    close(kernels.row_dots(kernels.put(X, dtype), kernels.put(Y, dtype)), (X * Y).sum(axis=1), dtype)
    A = symmetric(n)
    close(kernels.get(kernels.mirror(kernels.put(upper(A), dtype))), A, dtype)
    close(kernels.get(kernels.add_diagonal(kernels.put(A.copy(), dtype), 0.5)), A + 0.5 * np.eye(n), dtype)
    close(kernels.get(kernels.transpose(kernels.put(X, dtype))), X.T, dtype)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_every_dtype_come_in_exactly(kernels: Kernels, name: str, transposed: bool) -> None:
    W = normal(150, 70).astype(DTYPES[name])
    W = W.T if transposed else W
    found = kernels.copy(kernels.put(W), kernels.empty(W.shape, "float64"))
    assert (kernels.get(found) == W.astype(np.float64)).all()


@pytest.mark.parametrize("name", ["BF16", "F32"])
def test_arrays_that_come_ahead_of_each_other(kernels: Kernels, name: str) -> None:
    """All are read into the same memory, in turn."""
    arrays = [normal(70, 50, seed=i).astype(DTYPES[name]) for i in range(5)]

    def read() -> Iterator[HostArray]:
        memory = kernels.buffer(arrays[0].nbytes).view(DTYPES[name])
        for i, X in enumerate(arrays):
            memory[:] = X.ravel()
            yield memory.reshape(70, 50).T if i % 2 else memory.reshape(70, 50)

    for i, X in enumerate(kernels.ahead(read())):
        expected = arrays[i].T if i % 2 else arrays[i]
        assert (kernels.get(kernels.put(X, "float32")) == expected.astype(np.float32)).all()


@given(
    name=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    exponent=st.integers(-150, 150),
    rows=st.integers(0, 40),
    kernels=st.sampled_from(list(KERNELS.values())),
)
def test_the_norm_of_any_matrix(name: str, exponent: int, rows: int, kernels: Kernels) -> None:
    with np.errstate(over="ignore"):
        W = (normal(rows, 30) * 10.0**exponent).astype(DTYPES[name])
    exact = np.linalg.norm(W.astype(np.longdouble))
    found = kernels.norm(kernels.put(W))
    assert found == pytest.approx(float(exact), rel=1e-3) or (not np.isfinite(W).all() and not np.isfinite(found))


def test_a_norm_says_what_is_not_finite(kernels: Kernels) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        W = normal(20, 30)
        W[3, 5] = bad
        assert not np.isfinite(kernels.norm(kernels.put(W, "float32")))


@pytest.mark.parametrize("n", [1, 2, 20, 500])
def test_the_spectral_norm_of_a_triangle(kernels: Kernels, n: int) -> None:
    R = np.linalg.cholesky(symmetric(n)).T
    exact = np.linalg.norm(R, 2)
    found = spectral_norm_of_triangle(kernels, kernels.put(upper(R), "float64"))
    assert 0.95 * exact <= found <= exact * (1 + 1e-9)


def test_scratch_is_used_again(kernels: Kernels) -> None:
    scratch = Scratch(kernels)
    first = scratch.empty("a", (4, 5), "float32")
    first[:] = 1
    assert (kernels.get(scratch.empty("a", (2, 3), "float32")) == 1).all()
    assert tuple(scratch.empty("a", (9, 9), "float32").shape) == (9, 9)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"U16", "U32", "U64"}))
def test_arrays_and_tensors_of_every_dtype_are_the_same_memory(name: str) -> None:
    array = np.arange(24, dtype=np.uint8).view(DTYPES[name]) if name != "C64" else np.zeros(3, np.complex64)
    if name == "BOOL":
        array = np.array([True, False])
    tensor = to_torch(array)
    assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name or name == "BOOL"
    assert tensor.data_ptr() == array.ctypes.data
    back = from_torch(tensor)
    assert back.dtype == array.dtype
    assert back.ctypes.data == array.ctypes.data


def test_callers_settings_for_speed_do_not_reach_the_products() -> None:
    A, B = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    kernels = Device("cpu")
    expected = kernels.gemm(A, B, torch.empty(64, 64))
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        found = kernels.gemm(A, B, torch.empty(64, 64))
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n", SIZES)
def test_eigvalsh_and_svdvals(kernels: Kernels, dtype: str, n: int) -> None:
    A, X = symmetric(n), normal(n + 3, n)
    close(kernels.eigvalsh(kernels.put(A, dtype)), np.linalg.eigvalsh(A), dtype)
    close(kernels.svdvals(kernels.put(X, dtype)), np.linalg.svd(X)[1], dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (5, 0, 4)])
def test_matmul(kernels: Kernels, dtype: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    A, B = normal(m, k), normal(k, n, seed=1)
    X, Y = kernels.put(A, dtype), kernels.put(B, dtype)
    close(kernels.get(kernels.matmul(X, Y)), A @ B, dtype)
    out = kernels.empty((k, k), dtype)
    assert kernels.matmul(X.T, X, out=out) is out
    close(kernels.get(out), A.T @ A, dtype)

"""What a profile counts, by shapes, for both kernels; and that its steps make up the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frodctl.method.kernels import Kernels, kernels_of
from frodctl.method.profile import REST, UNPROFILED, Profile, Step
from frodctl.pipeline import in_order
from tests.devices import KERNELS

M, N, K = 60, 40, 30


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]


def normal(*shape: int, dtype: str = "float64") -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def positive(n: int) -> Any:
    X = normal(2 * n, n)
    return X.T @ X


#: A call of each routine, by matrices that are put on the device first; and its operations.
CALLS: dict[str, tuple[Callable[..., Any], list[Any], float]] = {
    "gemm": (lambda k, A, B: k.gemm(A, B, k.empty((M, K), "float64")), [normal(M, N), normal(N, K)], 2 * M * N * K),
    "gemm AᵀBᵀ": (
        lambda k, A, B: k.gemm(A, B, k.empty((M, K), "float64"), transpose_a=True, transpose_b=True),
        [normal(N, M), normal(K, N)],
        2 * M * N * K,
    ),
    "matmul": (lambda k, A, B: k.matmul(A, B), [normal(M, N), normal(N, K)], 2 * M * N * K),
    "matmul XᵀX": (lambda k, X: k.matmul(X.T, X), [normal(M, N)], M * N**2),
    "matmul XXᵀ": (lambda k, X: k.matmul(X, X.T), [normal(M, N)], M**2 * N),
    "matmul of squares": (lambda k, A, B: k.matmul(A, B), [normal(N, N), normal(N, N)], 2 * N**3),
    "syrk": (lambda k, X: k.syrk(X, k.empty((N, N), "float64")), [normal(M, N)], M * N**2),
    "syrk of rows": (lambda k, X: k.syrk(X, k.empty((M, M), "float64"), rows=True), [normal(M, N)], M**2 * N),
    "trmm": (lambda k, X, R: k.trmm(X, R), [normal(M, N), normal(N, N)], M * N**2),
    "trsm": (lambda k, R, X: k.trsm(R, X), [positive(M), normal(M, N)], M**2 * N),
    "potrf": (lambda k, A: k.potrf(A), [positive(N)], N**3 / 3),
    "potri": (lambda k, R: k.potri(R), [positive(N)], 2 * N**3 / 3),
    "trtri": (lambda k, R: k.trtri(R), [positive(N)], N**3 / 3),
    "sygst": (lambda k, A, R: k.sygst(A, R), [positive(N), normal(N, N)], N**3),
    "syevd": (lambda k, A: k.syevd(A), [positive(N)], 9 * N**3),
    "syevr": (lambda k, A: k.syevr(A, 7), [positive(N)], 4 * N**3 / 3 + 2 * N**2 * 7),
    "eigvalsh": (lambda k, A: k.eigvalsh(A), [positive(N)], 4 * N**3 / 3),
    "inverse": (lambda k, A: k.inverse(A), [positive(N)], 8 * N**3 / 3),
    "svdvals": (lambda k, A: k.svdvals(A), [normal(M, N)], 4 * M * N**2 - 4 * N**3 / 3),
    "svd": (lambda k, A: k.svd(A), [normal(M, N)], 6 * M * N**2 + 20 * N**3),
    "qr": (lambda k, A: k.qr(A), [normal(M, N)], 2 * M * N**2 - 2 * N**3 / 3),
}


def steps_of(profile: Profile) -> dict[str, Step]:
    return {step.name: step for step in profile.finish()}


@pytest.mark.parametrize("name", CALLS)
def test_operations_by_shapes(name: str, kernels: Kernels) -> None:
    call, matrices, flops = CALLS[name]
    profile = Profile()
    measured = profile.kernels(kernels)
    call(measured, *[kernels.put(X.copy()) for X in matrices])
    step = steps_of(profile)[name.split()[0]]
    assert (step.calls, step.dtype, step.workers) == (1, "float64", False)
    assert step.flops == pytest.approx(flops)
    assert step.gemm_share is not None
    assert 0 < step.gemm_share < 20


def test_sparse_products_by_their_entries(kernels: Kernels) -> None:
    profile = Profile()
    starts, columns = np.arange(0, N + 1) * 2, np.tile([3, 5], N)
    profile.kernels(kernels).csrmm(starts, columns, np.ones(2 * N), kernels.put(normal(M, K)))
    assert steps_of(profile)["csrmm"].flops == 2 * 2 * N * K


def test_bytes_of_what_moves_numbers(kernels: Kernels) -> None:
    profile = Profile()
    measured = profile.kernels(kernels)
    X = kernels.put(normal(N, N, dtype="float32"))
    out = kernels.zeros((N, N), "float64")
    measured.copy(X, out)
    measured.axpby(2, X, 1, out)
    measured.mirror(out)
    found = steps_of(profile)
    assert found["copy"].nbytes == (4 + 8) * N**2
    assert found["axpby"].nbytes == (4 + 2 * 8) * N**2 / 2
    assert found["mirror"].nbytes == 8 * N**2
    assert not any(step.flops for step in found.values())


def test_results_are_the_kernels_own(kernels: Kernels) -> None:
    A = kernels.put(positive(N))
    measured = Profile().kernels(kernels)
    assert measured.name == kernels.name
    assert measured.identity() == kernels.identity()
    np.testing.assert_array_equal(measured.row_dots(A, A), kernels.row_dots(A, A))
    out = kernels.empty((N, N), "float64")
    assert measured.gemm(A, A, out) is out


def test_steps_within_steps_are_counted_once_and_make_up_the_time() -> None:
    began = time.perf_counter()
    profile = Profile()
    kernels = profile.kernels(kernels_of("cpu"))
    X = normal(1000, 1000)
    while time.perf_counter() - began < 1:
        with profile.step("outer"):
            kernels.gemm(X, X, kernels.empty((1000, 1000), "float64"))
            with profile.step("inner"):
                X.sum()
    steps = profile.finish()
    wall = time.perf_counter() - began
    total = sum(step.seconds for step in steps if not step.workers)
    rest = steps[-1]
    assert rest.name == REST
    assert total == pytest.approx(wall, rel=0.05)
    assert rest.seconds < 0.05 * wall
    assert all(step.seconds >= 0 for step in steps)


def test_other_threads_are_told_apart() -> None:
    profile = Profile()
    kernels = profile.kernels(kernels_of("cpu"))

    def task() -> None:
        with profile.step("task"):
            kernels.eigvalsh(positive(N))

    for _ in in_order([task] * 5, count=2):
        pass
    task()
    calls = {(step.name, step.workers): step.calls for step in profile.finish()}
    assert calls["task", True] == calls["eigvalsh", True] == 5
    assert calls["task", False] == calls["eigvalsh", False] == 1


def test_a_step_that_fails_is_counted() -> None:
    profile = Profile()
    with pytest.raises(ZeroDivisionError), profile.step("outer"), profile.step("inner"):
        raise ZeroDivisionError
    assert {"outer", "inner"} <= set(steps_of(profile))


def test_items_are_waited_for_and_not_the_time_between() -> None:
    profile = Profile()
    seen = []
    for item in profile.waiting("waiting", iter([1, 2])):
        with profile.step("using"):
            seen.append(item)
    assert seen == [1, 2]
    assert steps_of(profile)["waiting"].calls == 3  # the last finds that there are no more
    assert steps_of(profile)["using"].calls == 2


def test_nothing_is_measured_unasked() -> None:
    kernels = kernels_of("cpu")
    items = iter([1])
    assert UNPROFILED.kernels(kernels) is kernels
    assert UNPROFILED.waiting("waiting", items) is items
    assert UNPROFILED.finish() is None

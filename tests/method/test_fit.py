"""Fitted updates against numpy's least squares with the whole matrix of the problem."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from frodctl.method.fit import CategoryFit, best_positions, conjugate_gradients
from frodctl.method.kernels import Kernels
from tests.devices import KERNELS

N = 12
Matrix = npt.NDArray[np.float64]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]


def problem(m: int) -> tuple[Matrix, Matrix, Matrix, Matrix, npt.NDArray[np.int64]]:
    """V, W (m, N), λ with a null direction, ΔW, and positions."""
    rng = np.random.default_rng(m)
    V, W, change = rng.standard_normal((N, N)), rng.standard_normal((m, N)), rng.standard_normal((m, N))
    scales = np.linalg.norm(W @ np.linalg.inv(V).T, axis=0)
    scales[3] = 0
    positions = np.argwhere(~np.eye(N, dtype=bool))[rng.permutation(N * N - N)[:20]].T
    return V, W, scales, change, positions


@pytest.mark.parametrize("m", [5, 12, 30])
def test_the_least_squares_solution(kernels: Kernels, m: int) -> None:
    V, W, scales, change, positions = problem(m)
    fit = CategoryFit(V, kernels)
    U = fit.directions(kernels.put(W), scales)
    inverses = np.divide(1, scales, out=np.zeros(N), where=scales > 0)
    exact = W @ np.linalg.inv(V).T * inverses
    np.testing.assert_allclose(kernels.get(U), exact, rtol=1e-9, atol=1e-12)
    found = fit.fit(U, kernels.put(change), positions)
    places = np.concatenate([positions, np.stack([np.arange(N)] * 2)], axis=1)
    design = np.stack([np.outer(exact[:, r], V[:, c]).reshape(-1) for r, c in places.T], axis=1)
    expected = np.linalg.lstsq(design, change.reshape(-1))[0]
    np.testing.assert_allclose(np.concatenate([found.values, found.delta]), expected, rtol=1e-5, atol=1e-6)
    assert found.delta[3] == 0
    assert found.residual <= 1e-8
    update = kernels.get(fit.update(U, found.delta, found.values, positions))
    np.testing.assert_allclose(update.reshape(-1), design @ expected, rtol=1e-6, atol=1e-6)


def test_what_an_entry_explains(kernels: Kernels) -> None:
    """As much as ‖ΔW‖² falls by it alone."""
    V, W, scales, change, _ = problem(9)
    fit = CategoryFit(V, kernels)
    U = fit.directions(kernels.put(W), scales)
    found = fit.explained(U, kernels.put(change))
    for r, c in ((0, 0), (4, 7), (11, 2)):
        direction = np.outer(kernels.get(U)[:, r], V[:, c])
        best = (change * direction).sum() / (direction**2).sum() * direction
        fall = np.linalg.norm(change) ** 2 - np.linalg.norm(change - best) ** 2
        assert found[r, c] == pytest.approx(fall, rel=1e-9)
    assert not found[3].any()


def test_the_best_positions_are_off_the_diagonal() -> None:
    explained = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(best_positions(explained, 3), [[3, 3, 3], [0, 1, 2]])
    assert best_positions(explained, 0).shape == (2, 0)
    assert best_positions(explained, 12).shape == (2, 12)


def test_nothing_to_solve() -> None:
    x, residual, steps = conjugate_gradients(lambda x: x, np.zeros(3), lambda x: x)
    assert (x.tolist(), residual, steps) == ([0, 0, 0], 0.0, 0)

"""Truncations against numpy's SVD, of spectra of which a Gram matrix alone would lose the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from frodctl.method.fidelity import Fidelity, together
from frodctl.method.kernels import Kernels
from frodctl.method.lowrank import energies, energy_rank, fidelity, truncated
from tests.devices import KERNELS

SHAPES = [(90, 60), (60, 90), (64, 64), (1, 5), (5, 1)]
Matrix = npt.NDArray[np.float64]

K = np.arange(1, 65)
SPECTRA = {
    "flat": np.ones(64),
    "slow": 1 / K,
    "fast": 10.0 ** (-K / 4),
    "a gap at 16": np.where(K <= 16, 1.0, 1e-6),
    "a gap at 16, both sides spread": np.where(K <= 16, 0.7**K, 1e-5 * 0.9**K),
    "steps": 10.0 ** -(3 * (K // 12)),
    "rank 16": np.where(K <= 16, 1 / K, 0.0),
    "tiny": 1e-20 / K,
    "huge": 1e20 / K,
}


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return KERNELS[request.param]


def matrix(shape: tuple[int, int], spectrum: Matrix) -> Matrix:
    """A random matrix with the first of these singular values."""
    rng = np.random.default_rng(0)
    k = min(shape)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in shape)
    return (U * spectrum[:k]) @ V.T


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 40, 64, 70])
def test_the_distance_is_the_least_there_is(kernels: Kernels, name: str, rank: int) -> None:
    for shape in SHAPES:
        X = matrix(shape, SPECTRA[name])
        B, A = (kernels.get(factor) for factor in truncated(kernels.put(X.copy()), rank, kernels))
        assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
        least = float(np.linalg.norm(np.linalg.svd(X, compute_uv=False)[rank:]))
        assert np.linalg.norm(X - B @ A) <= (1 + 1e-6) * least + 1e-8 * np.linalg.norm(X), shape


def test_the_factors_share_the_singular_values(kernels: Kernels) -> None:
    for shape in SHAPES:
        X = matrix(shape, SPECTRA["slow"])
        B, A = (kernels.get(factor) for factor in truncated(kernels.put(X), 9, kernels))
        count = min(9, *shape)
        roots = np.sqrt(SPECTRA["slow"][:count])
        np.testing.assert_allclose(np.linalg.norm(B, axis=0)[:count], roots, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(A, axis=1)[:count], roots, rtol=1e-9)
        assert not B[:, count:].any()
        assert not A[count:].any()


def test_nothing_of_nothing(kernels: Kernels) -> None:
    X = kernels.zeros((6, 4), "float64")
    B, A = truncated(X, 3, kernels)
    assert not kernels.get(B).any()
    assert not kernels.get(A).any()
    assert fidelity(X, B, A, kernels) == Fidelity(0.0, None, None)
    assert energy_rank(energies(X, kernels), 0.9) == 1


def test_energies(kernels: Kernels) -> None:
    for shape in SHAPES:
        X = matrix(shape, SPECTRA["slow"])
        found = energies(kernels.put(X), kernels)
        exact = np.linalg.svd(X, compute_uv=False) ** 2
        np.testing.assert_allclose(found, exact, rtol=1e-9)
        for share in (0.5, 0.9, 0.999, 1.0):
            rank = energy_rank(found, share)
            assert exact[:rank].sum() >= (share - 1e-11) * exact.sum()
            assert exact[: rank - 1].sum() < share * exact.sum()


def test_fidelities(kernels: Kernels) -> None:
    """Of a product, of two matrices, and of several together as of one that has them all."""
    rng = np.random.default_rng(1)
    X, B, A = rng.standard_normal((9, 7)), rng.standard_normal((9, 2)), rng.standard_normal((2, 7))
    Y = B @ A
    found = fidelity(kernels.put(X.copy()), kernels.put(B), kernels.put(A), kernels)
    expected = (np.linalg.norm(X), (X * Y).sum() / (X * X).sum(), np.linalg.norm(Y - X) / np.linalg.norm(X))
    for one in (found, Fidelity.of(X, Y), together([Fidelity.of(X[:4], Y[:4]), Fidelity.of(X[4:], Y[4:])])):
        assert (one.norm, one.kept, one.distance) == pytest.approx(expected, rel=1e-12)
    assert Fidelity.of(0 * X, Y) == Fidelity(0.0, None, None)

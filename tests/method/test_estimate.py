"""The estimates: within their own error bars over many seeds, and bars that are of use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from frodctl.arrays import NAMED, HostArray
from frodctl.method.estimate import Estimates, Figure, Products, estimate, frobenius_norm
from frodctl.method.kernels import Kernels
from frodctl.method.kernels.device import Device
from frodctl.method.kernels.host import Host
from frodctl.method.spectra import NotFinite, Spectrum, singular_values, summarize
from tests.method.test_spectra import gaussian, with_spectrum

SEEDS = 200
RANDOMISED = (
    *("spectral_norm", "nuclear_norm", "stable_rank", "effective_rank"),
    *("energy_rank_90", "energy_rank_95", "energy_rank_99"),
)


def spectrum(kind: str, n: int) -> HostArray:
    i = np.arange(n)
    return {
        "flat": np.ones(n),
        "geometric": 10.0 ** (-2 * i / (n - 1)),
        "power law": (i + 1.0) ** -0.7,
        "rank-deficient": (1 - i / n) * (i < n // 3),
        "rank-deficient flat": 1.0 * (i < n // 3),
        "outlier": np.where(i == 0, 30, 1 - i / n),
    }[kind]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For products of this size a second thread costs more than it brings."""
    with threadpool_limits(1):
        yield


def run(W: HostArray, seed: int = 0, **options: int) -> Estimates:
    return estimate(Products.of(W), frobenius_norm(W), np.random.default_rng(seed), **options)


def exact(W: HostArray) -> Spectrum:
    return summarize(singular_values(W), (W.shape[0], W.shape[1]))


def holds(figure: Figure, truth: float) -> bool:
    return abs(figure.value - truth) <= figure.error + 1e-12 * abs(truth)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["flat", "geometric", "power law", "rank-deficient", "outlier"])
def test_the_truth_lies_within_the_errors(kind: str) -> None:
    """In 95 % of the seeds, each figure; with errors that stem from probes and from truncation alike."""
    W = with_spectrum(spectrum(kind, 90), 120, 90)
    truth = exact(W)
    found = [run(W, seed, steps=16, probes=6, probe_steps=10) for seed in range(SEEDS)]
    hits = {name: sum(holds(getattr(e, name), getattr(truth, name)) for e in found) for name in RANDOMISED}
    assert min(hits.values()) >= 0.95 * SEEDS, hits


@pytest.mark.parametrize("kind", ["flat", "geometric", "power law", "rank-deficient", "outlier"])
def test_the_errors_are_small_at_the_default_settings(kind: str) -> None:
    W = with_spectrum(spectrum(kind, 512), 600, 512)
    truth, found = exact(W), run(W)
    for name in RANDOMISED:
        assert holds(getattr(found, name), getattr(truth, name)), name
        assert getattr(found, name).error <= 0.1 * getattr(truth, name), name
    assert found.frobenius_norm == Figure(pytest.approx(truth.frobenius_norm, rel=1e-12))
    assert found.marchenko_pastur_edge == Figure(pytest.approx(truth.marchenko_pastur_edge, rel=1e-12))


@pytest.mark.parametrize("kind", ["flat", "rank-deficient flat"])
def test_a_spectrum_of_one_value_is_found_exactly(kind: str) -> None:
    """But that rounding decides an energy rank where the share falls on a whole number of values."""
    W = with_spectrum(3 * spectrum(kind, 100), 130, 100)
    truth, found = exact(W), run(W, steps=8, probes=3, probe_steps=6)
    for name in RANDOMISED:
        assert getattr(found, name).value == pytest.approx(getattr(truth, name), rel=1e-9), name
        assert getattr(found, name).error <= 1e-5 * getattr(truth, name) + name.startswith("energy"), name


@pytest.mark.parametrize("shape", [(20, 20), (7, 30), (30, 7), (1, 9), (9, 1), (1, 1)])
def test_as_many_steps_as_columns_find_everything(shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    truth, found = exact(W), run(W)
    for name in RANDOMISED:
        assert getattr(found, name).value == pytest.approx(getattr(truth, name), rel=1e-6), name


def test_probes_and_steps_narrow_the_errors() -> None:
    W = with_spectrum(spectrum("geometric", 150), 150, 150)
    few = run(W, steps=4, probes=4, probe_steps=40).nuclear_norm.error
    many = run(W, steps=4, probes=64, probe_steps=40).nuclear_norm.error
    assert many == pytest.approx(few / 4, rel=0.4)
    short = run(W, steps=4, probes=64, probe_steps=4).nuclear_norm.error
    assert short > 2 * many
    assert run(W, steps=40).spectral_norm.error < run(W, steps=20).spectral_norm.error / 2


def test_the_spread_over_seeds_is_the_predicted_one() -> None:
    """Three standard deviations and little else where truncation is negligible: the error is no overstatement."""
    W = with_spectrum(spectrum("rank-deficient", 60), 60, 60)
    found = [run(W, seed, steps=2, probes=6, probe_steps=40).nuclear_norm for seed in range(100)]
    spread = float(np.std([figure.value for figure in found], ddof=1))
    error = sum(figure.error for figure in found) / len(found)
    assert 2 < error / spread < 4


def test_only_products_are_used() -> None:
    W = with_spectrum(spectrum("power law", 60), 60, 80)
    counts = {"forward": 0, "adjoint": 0}

    def forward(X: HostArray) -> HostArray:
        counts["forward"] += X.shape[1]
        return W @ X

    def adjoint(Y: HostArray) -> HostArray:
        counts["adjoint"] += Y.shape[1]
        return W.T @ Y

    found = estimate(
        Products((60, 80), forward, adjoint),
        frobenius_norm(W),
        np.random.default_rng(3),
        steps=10,
        probes=4,
        probe_steps=8,
    )
    assert counts == {"forward": 10 + 4 * 8, "adjoint": 10 + 4 * 8}
    assert found.nuclear_norm.value == pytest.approx(
        run(W, 3, steps=10, probes=4, probe_steps=8).nuclear_norm.value, rel=1e-9
    )


def test_the_seed_decides() -> None:
    W = with_spectrum(spectrum("power law", 80), 80, 80)
    options = {"steps": 10, "probes": 3, "probe_steps": 8}
    assert run(W, 1, **options) == run(W, 1, **options)
    assert run(W, 1, **options).nuclear_norm != run(W, 2, **options).nuclear_norm


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**20), st.integers(-300, 300))
def test_scale_and_transpose(m: int, n: int, seed: int, exponent: int) -> None:
    W = gaussian(m, n, seed)
    options = {"steps": 5, "probes": 2, "probe_steps": 4}
    found, scaled, turned = (run(X, 0, **options) for X in (W, W * 2.0**exponent, np.ascontiguousarray(W.T)))
    for name in RANDOMISED:
        factor = 2.0**exponent if name.endswith("norm") else 1
        assert getattr(scaled, name).value == pytest.approx(getattr(found, name).value * factor, rel=1e-9), name
        if m != n:
            assert getattr(turned, name).value == pytest.approx(getattr(found, name).value, rel=1e-6), name


@pytest.mark.parametrize("kernels", [Host(), Device("cpu")])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_products_of_low_precision(in_blocks: bool, kernels: Kernels, monkeypatch) -> None:
    W = gaussian(50, 30).astype(NAMED["bfloat16"])
    X, Y = gaussian(30, 3), gaussian(50, 3)
    monkeypatch.setattr("frodctl.method.estimate._BLOCK", 7 * 30)
    products = Products.of(W, kernels, in_blocks=in_blocks)
    np.testing.assert_allclose(products.forward(X), W.astype(np.float64) @ X, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(products.adjoint(Y), W.astype(np.float64).T @ Y, rtol=1e-7, atol=1e-7)
    assert frobenius_norm(W) == pytest.approx(np.linalg.norm(W.astype(np.float64)))


def test_a_zero_matrix() -> None:
    found = run(np.zeros((6, 4), np.float32))
    assert found.nuclear_norm == Figure(0.0)
    assert found.estimated == ()
    assert found.effective_rank is None


def test_nan_and_inf_are_refused() -> None:
    W = np.ones((5, 4), np.float32)
    W[1, 2] = math.nan
    with pytest.raises(NotFinite):
        frobenius_norm(W)
    with pytest.raises(NotFinite):
        estimate(Products.of(W), math.nan, np.random.default_rng(0))
    with pytest.raises(NotFinite, match="product"):
        estimate(Products.of(W), 4.0, np.random.default_rng(0))


def test_as_dict_has_the_names_of_the_exact_one() -> None:
    W = gaussian(60, 50)
    found = run(W, steps=6, probes=2, probe_steps=5)
    as_dict = found.as_dict()
    assert set(as_dict) - {"errors"} == set(exact(W).as_dict())
    assert set(as_dict["errors"]) == set(found.estimated) == set(RANDOMISED)
    assert all(as_dict[name] is not None and as_dict["errors"][name] > 0 for name in RANDOMISED)
    undefined = {name for name, value in as_dict.items() if value is None}
    assert undefined == {
        *("numerical_rank", "condition_number", "above_edge"),
        *("power_law_alpha", "power_law_distance", "power_law_xmin"),
    }
    json.dumps(as_dict, allow_nan=False)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_float64_matrices_whose_squares_leave_float64(scale: float) -> None:
    W = gaussian(40, 30)
    plain, scaled = run(W), run(W * scale)
    assert scaled.spectral_norm.value == pytest.approx(plain.spectral_norm.value * scale, rel=1e-9)
    assert scaled.frobenius_norm.value == pytest.approx(plain.frobenius_norm.value * scale, rel=1e-12)

"""The exact spectra: known ones, numpy's SVD, and the powerlaw package as references."""

from __future__ import annotations

import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import powerlaw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.arrays import NAMED, HostArray
from frodctl.method import spectra
from frodctl.method.kernels import kernels_of
from frodctl.method.kernels.device import Device
from frodctl.method.linalg import Scratch
from frodctl.method.spectra import (
    GRAM_CONDITION_LIMIT,
    NotFinite,
    fit_power_law,
    singular_values,
    summarize,
)

SHAPES = [(40, 40), (24, 60), (60, 24), (1, 30), (30, 1), (1, 1)]


def orthonormal(rows: int, columns: int, seed: int) -> HostArray:
    return np.linalg.qr(gaussian(rows, columns, seed))[0]


def with_spectrum(sigma: HostArray, m: int, n: int, seed: int = 0) -> HostArray:
    """Q₁ diag(sigma) Q₂ᵀ of shape (m, n)."""
    k = min(m, n)
    return (orthonormal(m, k, seed) * sigma) @ orthonormal(n, k, seed + 1).T


def gaussian(m: int, n: int, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal((m, n))


def reference(W: HostArray) -> np.ndarray:
    return np.linalg.svd(W.astype(np.float64), compute_uv=False)


def figures_of(sigma: np.ndarray, m: int, n: int) -> dict[str, float]:
    """The figures by their definitions, in numpy."""
    energy = np.cumsum(sigma**2) / np.sum(sigma**2)
    p = sigma[sigma > 0] / sigma.sum()
    scale = np.sqrt(np.sum(sigma**2) / (m * n))
    edge = scale * (np.sqrt(m) + np.sqrt(n))
    return {
        "spectral_norm": sigma[0],
        "frobenius_norm": np.sqrt(np.sum(sigma**2)),
        "nuclear_norm": sigma.sum(),
        "stable_rank": np.sum(sigma**2) / sigma[0] ** 2,
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "numerical_rank": np.sum(sigma > sigma[0] * max(m, n) * 2.0**-23),
        "energy_rank_90": 1 + np.argmax(energy >= 0.90),
        "energy_rank_95": 1 + np.argmax(energy >= 0.95),
        "energy_rank_99": 1 + np.argmax(energy >= 0.99),
        "marchenko_pastur_edge": edge,
        "above_edge": np.sum(sigma > edge),
    }


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_values_and_figures_agree_with_numpy(m: int, n: int, dtype: str) -> None:
    W = gaussian(m, n, seed=m + n).astype(NAMED[dtype])
    before = W.copy()
    sigma = singular_values(W)
    expected = reference(W)
    assert sigma.dtype == np.float64
    assert np.array_equal(W, before)
    np.testing.assert_allclose(sigma, expected, rtol=1e-6)
    found = summarize(sigma, (m, n)).as_dict()
    for name, value in figures_of(expected, m, n).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["condition_number"] == pytest.approx(expected[0] / expected[-1], rel=0.01)


@pytest.mark.parametrize("exponent", [-2, -3.9, -4.1, -6, -9, -12])
def test_a_known_spectrum_comes_back(exponent: float) -> None:
    sigma = np.logspace(0, exponent, 50)
    W = with_spectrum(sigma, 70, 50)
    found = singular_values(W)
    # Q₁ diag Q₂ is itself rounded: each σ may move by a few ε σ₁
    np.testing.assert_allclose(found, sigma, rtol=1e-6, atol=1e-14)
    figures = summarize(found, (70, 50))
    assert figures.condition_number == pytest.approx(10.0**-exponent, rel=0.01)
    for name, value in figures_of(sigma, 70, 50).items():
        assert getattr(figures, name) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("kind", ["gaussian", "outlier", "geometric", "biased"])
@pytest.mark.parametrize(("m", "n"), [(150, 150), (400, 100), (100, 400)])
def test_up_to_the_limit_the_gram_matrix_is_exact_enough(kind: str, m: int, n: int, monkeypatch) -> None:
    k = min(m, n)
    last = 1.05 / GRAM_CONDITION_LIMIT
    if kind == "gaussian":
        s = reference(gaussian(k, k))
        sigma = last + (s - s[-1]) / (s[0] - s[-1]) * (1 - last)
    elif kind == "geometric":
        sigma = np.logspace(0, math.log10(last), k)
    else:
        sigma = np.full(k, last)
        sigma[0] = 1
    W = with_spectrum(sigma, m, n)
    if kind == "biased":  # σ₁ along (1, …, 1) on both sides: the sums in the Gram matrix are all of one sign
        left, right = (np.linalg.qr(np.hstack([np.ones((r, 1)), gaussian(r, k - 1)]))[0] for r in (m, n))
        W = (left * sigma) @ right.T
    expected = reference(W)
    assert expected[0] / expected[-1] > 0.9 * GRAM_CONDITION_LIMIT
    monkeypatch.setattr(np.linalg, "svd", None)  # it is not called
    np.testing.assert_allclose(singular_values(W), expected, rtol=4e-7)


@pytest.mark.parametrize("exponent", [-4.02, -5, -7.5, -8.5, -16])
def test_beyond_the_limit_the_svd_takes_over(exponent: float, monkeypatch) -> None:
    W = with_spectrum(np.logspace(0, exponent, 60), 60, 60)
    calls = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda X, **options: calls.append(1) or svd(X, **options))
    singular_values(W)
    assert calls == [1]


def test_the_gram_matrix_alone_would_be_wrong() -> None:
    W = with_spectrum(np.logspace(0, -7, 60), 60, 60)
    squares = spectra._gram_eigenvalues(W, 1.0, Scratch(kernels_of("cpu")))
    expected = reference(W)
    assert not np.allclose(np.sqrt(squares.clip(min=0)), expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(singular_values(W), expected, rtol=1e-6)


def test_a_rank_deficient_matrix_is_singular() -> None:
    W = gaussian(50, 7) @ gaussian(7, 40, seed=1)
    expected = reference(W)
    found = summarize(singular_values(W), (50, 40))
    assert found.numerical_rank == 7
    assert found.condition_number == math.inf
    for name, value in figures_of(expected, 50, 40).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    assert found.power_law_alpha == fit_power_law(np.square(singular_values(W)[:7])).alpha  # none of it from rounding
    assert found.as_dict()["condition_number"] is None
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("shape", [(5, 3), (0, 4), (4, 0), (1, 1)])
def test_a_zero_matrix_has_norms_and_no_ranks(shape: tuple[int, int]) -> None:
    sigma = singular_values(np.zeros(shape, np.float32))
    assert sigma.tolist() == [0.0] * min(shape)
    found = summarize(sigma, shape)
    assert (found.spectral_norm, found.frobenius_norm, found.nuclear_norm, found.numerical_rank) == (0, 0, 0, 0)
    undefined = {name for name, value in found.as_dict().items() if value is None}
    assert undefined == {
        *("stable_rank", "effective_rank", "condition_number"),
        *("energy_rank_90", "energy_rank_95", "energy_rank_99"),
        *("power_law_alpha", "power_law_distance", "power_law_xmin"),
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_nan_and_inf_are_refused(bad: float, dtype: str) -> None:
    W = np.ones((4, 5), NAMED[dtype])
    W[2, 3] = bad
    with pytest.raises(NotFinite, match="NaN or Inf"):
        singular_values(W)
    with pytest.raises(NotFinite):
        summarize(np.array([bad, 1.0]), (2, 2))
    assert issubclass(NotFinite, ValueError)


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="not 1 dimensions"):
        singular_values(np.ones(3))


@pytest.mark.parametrize("exponent", [-1074, -600, 600, 1000])
def test_no_square_over_or_underflows(exponent: int) -> None:
    W = np.array([[3.0, 0, 0], [0, 4.0, 0], [0, 0, 5.0]], np.float64) * 2.0**exponent
    found = summarize(singular_values(W), (3, 3))
    assert found.spectral_norm == pytest.approx(5 * 2.0**exponent)
    assert found.nuclear_norm == pytest.approx(12 * 2.0**exponent)
    assert found.effective_rank == pytest.approx(math.exp(-sum(x / 12 * math.log(x / 12) for x in (3, 4, 5))))


def test_a_view_that_is_not_contiguous() -> None:
    W = gaussian(30, 50)[::2, 3:40].T
    np.testing.assert_allclose(singular_values(W), reference(W), rtol=1e-6)


def test_flat_spectrum_holds_its_energy_evenly() -> None:
    found = summarize(singular_values(3 * orthonormal(100, 100, 0)), (100, 100))
    assert (found.energy_rank_90, found.energy_rank_95, found.energy_rank_99) == (90, 95, 99)
    assert found.stable_rank == pytest.approx(100)
    assert found.effective_rank == pytest.approx(100)
    assert found.condition_number == pytest.approx(1)
    assert found.marchenko_pastur_edge == pytest.approx(6)
    assert found.above_edge == 0
    assert found.power_law_alpha is None  # one value 100 times over, but for rounding


@pytest.mark.parametrize(("m", "n"), [(60, 90), (300, 20), (40, 40)])
@pytest.mark.parametrize("exponent", [-2, -7])
def test_a_device_has_the_same_values(m: int, n: int, exponent: float, monkeypatch) -> None:
    """torch's arithmetic, here on the CPU; in several blocks."""
    monkeypatch.setattr(spectra, "_BLOCK", 700)
    W = with_spectrum(np.logspace(0, exponent, min(m, n)), m, n)
    found = singular_values(W, Scratch(Device("cpu")))
    np.testing.assert_allclose(found, singular_values(W), rtol=1e-6)


def test_threads_with_scratch_give_the_same_values() -> None:
    matrices = [
        gaussian(m, n, seed=i).astype(np.float32) for i, (m, n) in enumerate([(90, 60), (30, 80), (64, 64)] * 6)
    ]
    expected = [singular_values(W) for W in matrices]

    def some(part: int) -> list[HostArray]:
        scratch = Scratch(kernels_of("cpu"))
        return [singular_values(W, scratch) for W in matrices[part::2]]

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(some, range(2)))
    for part, half in enumerate(halves):
        for found, value in zip(half, expected[part::2], strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-10, atol=0)


def package_fit(values: HostArray, **options: object) -> tuple[float, float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = powerlaw.Fit(values, verbose=False, **options)
    assert not fit.noise_flag
    return fit.alpha, fit.D, fit.xmin


def pareto(alpha: float, count: int, seed: int) -> HostArray:
    u = np.random.default_rng(seed).random(count)
    return (1 - u) ** (-1 / (alpha - 1))


SAMPLES = {
    "pareto 1.3": pareto(1.3, 200, 0),
    "pareto 2.2": pareto(2.2, 300, 1),
    "pareto 2.9": 1e-8 * pareto(2.9, 250, 2),
    "gaussian square": reference(gaussian(150, 150)) ** 2,
    "gaussian tall": reference(gaussian(400, 120)) ** 2,
    "geometric": 0.93 ** np.arange(150),
    "lognormal": np.exp(2 * gaussian(1, 200)[0]),
    "ties": np.floor(8 * pareto(2.0, 300, 3)) / 8,
    "the two largest are no candidates": np.array([1, 50, 51, 52, 200], np.float64),
    "zeros": np.append(np.zeros(30), pareto(2.0, 100, 4)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_fit_is_that_of_powerlaw(name: str) -> None:
    found = fit_power_law(SAMPLES[name], alpha_max=3)
    assert (found.alpha, found.distance, found.xmin) == pytest.approx(package_fit(SAMPLES[name]), rel=1e-8)


@pytest.mark.parametrize("name", SAMPLES)
def test_without_a_bound_it_is_that_of_powerlaw_without_one(name: str) -> None:
    found = fit_power_law(SAMPLES[name])
    expected = package_fit(SAMPLES[name], parameter_ranges={"alpha": [0, None]})
    assert (found.alpha, found.distance, found.xmin) == pytest.approx(expected, rel=1e-8)


def test_the_bound_matters() -> None:
    """Of a Gaussian matrix's eigenvalues the best tail is steeper than powerlaw 2.0 accepts."""
    steep = fit_power_law(SAMPLES["gaussian tall"])
    bounded = fit_power_law(SAMPLES["gaussian tall"], alpha_max=3)
    assert bounded.alpha < 3 < steep.alpha
    assert steep.distance < bounded.distance


def test_the_summary_fits_the_eigenvalues() -> None:
    sigma = np.sort(np.sqrt(SAMPLES["pareto 2.2"]))[::-1]
    found = summarize(sigma, (300, 300))
    expected = package_fit(np.square(sigma), parameter_ranges={"alpha": [0, None]})
    assert (found.power_law_alpha, found.power_law_distance, found.power_law_xmin) == pytest.approx(expected, rel=1e-8)


def test_blocks_do_not_change_the_fit(monkeypatch) -> None:
    whole = fit_power_law(SAMPLES["ties"])
    monkeypatch.setattr(spectra, "_FIT_BLOCK", 700)
    assert fit_power_law(SAMPLES["ties"]) == whole


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [3.0, 2.0, 1.0], [2.0] * 50, [1.0, 1.0, 2.0, 2.0, 3.0], [0.0] * 9 + [1.0, 2.0, 3.0], [0.0, -1.0]],
)
def test_too_few_distinct_values_have_no_power_law(values: list[float]) -> None:
    assert fit_power_law(np.array(values, np.float64)) is None


def test_a_tail_steeper_than_the_bound_has_no_power_law() -> None:
    assert fit_power_law(np.linspace(1, 1.01, 40)) is None


INVARIANT = sorted(
    {"stable_rank", "effective_rank", "numerical_rank", "energy_rank_90", "energy_rank_95", "energy_rank_99"}
    | {"above_edge", "power_law_alpha", "power_law_distance"}
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 2**20), st.integers(-60, 60))
def test_scale_transpose_and_permutation(m: int, n: int, seed: int, exponent: int) -> None:
    W = gaussian(m, n, seed)
    sigma = singular_values(W)
    figures = summarize(sigma, (m, n)).as_dict()
    scaled = singular_values(W * 2.0**exponent)
    np.testing.assert_allclose(scaled, sigma * 2.0**exponent, rtol=1e-12, atol=0)
    of_scaled = summarize(scaled, (m, n)).as_dict()
    assert {name: of_scaled[name] for name in INVARIANT} == pytest.approx({name: figures[name] for name in INVARIANT})
    for name in ("spectral_norm", "frobenius_norm", "nuclear_norm", "marchenko_pastur_edge"):
        assert of_scaled[name] == pytest.approx(figures[name] * 2.0**exponent)
    generator = np.random.default_rng(seed)
    rows, columns = generator.permutation(m), generator.permutation(n)
    np.testing.assert_allclose(singular_values(W.T), sigma, rtol=1e-6, atol=0)
    np.testing.assert_allclose(singular_values(W[rows][:, columns]), sigma, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(2.0**-20, 2.0**20), min_size=1, max_size=20), st.integers(0, 10))
def test_bounds_between_the_figures(values: list[float], longer: int) -> None:
    sigma = np.array(sorted(values, reverse=True), np.float64)
    k = len(values)
    found = summarize(sigma, (k, k + longer))
    slack = 1 + 1e-12
    assert found.spectral_norm <= found.frobenius_norm * slack <= found.nuclear_norm * slack**2
    assert found.stable_rank * slack >= 1
    assert found.stable_rank <= (found.nuclear_norm / found.spectral_norm) ** 2 * slack
    assert 1 <= found.effective_rank * slack <= k * slack**2
    assert 1 <= found.energy_rank_90 <= found.energy_rank_95 <= found.energy_rank_99 <= k
    assert found.nuclear_norm <= math.sqrt(k) * found.frobenius_norm * slack
    assert found.condition_number == pytest.approx(max(values) / min(values))

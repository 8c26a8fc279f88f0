"""The exact spectrum of one matrix: its singular values in float64, and the figures that follow from them.

The values come from the Gram matrix of the smaller side, which is two to four times as fast as an SVD, wherever
that loses nothing: squaring the matrix squares its condition number, so badly conditioned ones get the SVD.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.kernels import kernels_of
from frodctl.method.linalg import Scratch

if TYPE_CHECKING:
    import numpy.typing as npt

    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Vector

#: Condition number, seen from the Gram matrix, up to which its eigenvalues are used; beyond it the SVD is.
#:
#: The computed eigenvalues of WᵀW are off by at most cε σ₁² (ε = 2⁻⁵², all of them alike), so a singular value by
#: cε κ²/2 of itself if it is σ₁/κ. The largest c measured over Gaussian, flat, geometric, power-law, biased and
#: badly scaled matrices up to 1536 × 576 is 34 (about 1.4 √n, and below 5 for the small values that matter); at
#: κ = 10⁴ that makes 4e-7, and typically 5e-8.
GRAM_CONDITION_LIMIT = 1e4

#: The exponents that the power-law fit accepts; a steeper tail has values that are all but equal. The paper has no
#: bound. (powerlaw 2.0 looks no further than 3 unless it is told to, and so takes a worse-fitting tail on most weights
#: of language models.)
ALPHA_MAX = 100.0

_EPSILON = 2.0**-52
_SINGLE_EPSILON = 2.0**-23
_BLOCK = 1 << 20  # elements of W that are converted at a time
_FIT_BLOCK = 1 << 16  # elements of the fit's largest temporary, which stays in the cache


class NotFinite(ValueError):
    """The matrix has NaN or Inf among its elements. The caller knows its name."""


def singular_values(W: HostArray, scratch: Scratch | None = None) -> Vector:
    """All singular values of W, each within 1e-6 of itself or within rounding (ε σ₁) of the exact one.

    Safe to call from several threads at a time, each with a scratch of its own.

    Parameters
    ----------
    W : HostArray
        (m, n) of a real floating-point dtype. It is not changed.
    scratch : Scratch, optional
        Memory that is used again for float64 blocks of W and its Gram matrix, up to 24k² bytes or so, k = min(m, n),
        on the device that computes; the CPU without one. Only where the SVD is needed is all of W copied.

    Returns
    -------
    Vector
        (k,) float64, in descending order, none negative.

    Raises
    ------
    NotFinite
        If W has NaN or Inf among its elements.
    ValueError
        If W is not a matrix.
    """
    if W.ndim != 2:
        raise ValueError(f"a matrix is needed, not {W.ndim} dimensions")
    W = W if W.flags.c_contiguous else W.T
    k = min(W.shape)
    peak = _peak(W) if k else 0.0
    if peak == 0:
        return np.zeros(k)
    scratch = scratch or Scratch(kernels_of("cpu"))
    scale = math.ldexp(1.0, max(math.frexp(peak)[1] - 1, -1022))
    squares = _gram_eigenvalues(W, 1 / scale, scratch)
    if squares[-1] * GRAM_CONDITION_LIMIT**2 > squares[0]:
        return np.sqrt(squares) * scale
    kernels = scratch.kernels
    X = kernels.copy(W, kernels.empty(W.shape, "float64"))
    X *= 1 / scale
    return kernels.svdvals(X) * scale


def _peak(W: HostArray) -> float:
    """The largest magnitude, by the extremes, which carry a NaN along."""
    peak = 0.0
    rows = max(1, _BLOCK // W.shape[1])
    for begin in range(0, len(W), rows):
        block = W[begin : begin + rows]
        block = block if block.dtype in (np.float32, np.float64) else block.astype(np.float32)
        least, most = float(block.min()), float(block.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise NotFinite("the matrix has NaN or Inf among its elements")
        peak = max(peak, -least, most)
    return peak


def _gram_eigenvalues(W: HostArray, factor: float, scratch: Scratch) -> Vector:
    """The eigenvalues of (cW)ᵀ(cW) or (cW)(cW)ᵀ, c the power of two ``factor``, in descending order."""
    kernels = scratch.kernels
    m, n = W.shape
    k = min(m, n)
    step = max(k, _BLOCK // k)
    gram = scratch.empty("spectra.gram", (k, k))
    for begin in range(0, max(m, n), step):
        block = W[begin : begin + step] if m >= n else W[:, begin : begin + step]
        X = kernels.copy(block, scratch.empty("spectra.block", block.shape))
        X *= factor  # exact, in (−2, 2)
        pair: tuple[Array, Array] = (X.T, X) if m >= n else (X, X.T)
        if begin == 0:
            kernels.matmul(*pair, out=gram)
        else:
            gram += kernels.matmul(*pair, out=scratch.empty("spectra.part", (k, k)))
    return kernels.eigvalsh(gram)[::-1]


@dataclass(frozen=True)
class PowerLaw:
    """p(x) ∝ x^−alpha for x ≥ xmin; ``distance`` is that of Kolmogorov and Smirnov, over those x."""

    alpha: float
    distance: float
    xmin: float


def fit_power_law(values: HostArray, alpha_max: float = ALPHA_MAX) -> PowerLaw | None:
    """The power law of a sample's tail, by the method of Clauset, Shalizi and Newman.

    For each candidate xmin, α = 1 + n / Σ ln(x/xmin) over the n values from xmin on (their Eq. 3.1, the maximum
    of the likelihood of a continuous power law); of these the one at the least Kolmogorov–Smirnov distance. The
    conventions are those of the package powerlaw 2.0: every distinct value but the two largest is a candidate,
    and the empirical distribution counts the values strictly below x.

    Parameters
    ----------
    values : HostArray
        (n,) of any order. Those that are not positive are left out.
    alpha_max : float
        Candidates whose α is not below it are passed over.

    Returns
    -------
    PowerLaw or None
        None where fewer than four values are distinct, or no candidate's α is below ``alpha_max``.

    References
    ----------
    A. Clauset, C. R. Shalizi, M. E. J. Newman: Power-law distributions in empirical data. SIAM Review 51 (2009).
    """
    x, counts = np.unique(values[values > 0].astype(np.float64), return_counts=True)
    if len(x) < 4:
        return None
    with np.errstate(all="ignore"):  # of values that are all but equal, and of powers below xmin
        logs = np.log(x / x[-1])  # to the largest, so that sums over the tail lose nothing
        tail = _sums_from(counts.astype(np.float64))
        spread = _sums_from(counts * logs) - tail * logs
        alpha = 1 + tail[:-2] / spread[:-2]
        candidates = np.flatnonzero(alpha < alpha_max)
        if not len(candidates):
            return None
        distances = _distances(logs, tail, alpha, candidates)
    best = int(distances.argmin())
    chosen = int(candidates[best])
    return PowerLaw(float(alpha[chosen]), float(distances[best]), float(x[chosen]))


def _sums_from(values: Vector) -> Vector:
    """Σ_{j≥i} of the values (n,)."""
    return np.cumsum(values[::-1])[::-1]


def _distances(logs: Vector, tail: Vector, alpha: Vector, candidates: npt.NDArray[np.intp]) -> Vector:
    """max |1 − (x/xmin)^(1−α) − S(x)| for each candidate, S(x) being the share of the tail that is below x.

    ``candidates`` are ascending; (n,) logs and counts of the values from each on.
    """
    rows = max(1, _FIT_BLOCK // len(logs))
    parts = []
    for begin in range(0, len(candidates), rows):
        group = candidates[begin : begin + rows]
        first, mine = group[0], group[:, None]
        beyond = logs[first:] - logs[mine]
        beyond *= 1 - alpha[mine]
        np.exp(beyond, out=beyond)
        beyond -= tail[first:] / tail[mine]  # 1 − S is the share from x on
        np.abs(beyond, out=beyond)
        beyond[np.arange(first, len(logs)) < mine] = 0
        parts.append(beyond.max(axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Spectrum:
    """Figures of a spectrum. Norms have the unit of the elements; None says that a figure is undefined.

    Attributes
    ----------
    spectral_norm, frobenius_norm, nuclear_norm : float
        σ₁, √Σσ², Σσ.
    stable_rank : float or None
        ‖W‖_F² / ‖W‖₂².
    effective_rank : float or None
        exp(−Σ p ln p) with p = σ / Σσ (Roy and Vetterli, EUSIPCO 2007).
    numerical_rank : int
        Number of σ above σ₁ max(m, n) 2⁻²³, float32's precision.
    condition_number : float or None
        σ₁ / σ_min; inf if σ_min is not above σ₁ max(m, n) 2⁻⁵², which is where float64 sees a singular matrix.
    energy_rank_90, energy_rank_95, energy_rank_99 : int or None
        The least number of singular values that hold this share, in per cent, of Σσ².
    marchenko_pastur_edge : float
        s(√m + √n) with s² = ‖W‖_F² / (mn): about σ₁ if the elements were independent (Marchenko and Pastur 1967).
    above_edge : int
        Number of σ above that edge.
    power_law_alpha, power_law_distance, power_law_xmin : float or None
        `fit_power_law` of the eigenvalues σ², those from rounding left out; xmin has the unit of σ².
    """

    spectral_norm: float
    frobenius_norm: float
    nuclear_norm: float
    stable_rank: float | None
    effective_rank: float | None
    numerical_rank: int
    condition_number: float | None
    energy_rank_90: int | None
    energy_rank_95: int | None
    energy_rank_99: int | None
    marchenko_pastur_edge: float
    above_edge: int
    power_law_alpha: float | None
    power_law_distance: float | None
    power_law_xmin: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """The figures by name, for JSON: an infinite one becomes None, as JSON has no word for it."""
        return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(self).items()}


def summarize(sigma: HostArray, shape: tuple[int, int], alpha_max: float = ALPHA_MAX) -> Spectrum:
    """The figures of a matrix, from its singular values and shape alone.

    Parameters
    ----------
    sigma : HostArray
        (min(m, n),), not negative, in descending order, as `singular_values` gives them.
    shape : tuple of int
        (m, n).
    alpha_max : float
        As in `fit_power_law`.

    Returns
    -------
    Spectrum

    Raises
    ------
    NotFinite
        If a singular value is NaN or Inf.
    """
    m, n = shape
    sigma = sigma.astype(np.float64, copy=False)
    if not np.isfinite(sigma).all():
        raise NotFinite("a singular value is NaN or Inf")
    top = float(sigma[0]) if len(sigma) else 0.0
    if top == 0:
        return Spectrum(0.0, 0.0, 0.0, None, None, 0, None, None, None, None, 0.0, 0, None, None, None)
    s = sigma / top
    energy = np.cumsum(np.square(s))
    total = float(energy[-1])
    edge = math.sqrt(total) * (1 / math.sqrt(m) + 1 / math.sqrt(n))
    share = s[s > 0] / s.sum()
    resolved = int((s > max(m, n) * _EPSILON).sum())
    ranks = [_count_to(energy, percent * total / 100) for percent in (90, 95, 99)]
    fit = _fit_squares(sigma[:resolved], top, alpha_max)
    return Spectrum(
        spectral_norm=top,
        frobenius_norm=top * math.sqrt(total),
        nuclear_norm=top * float(s.sum()),
        stable_rank=total,
        effective_rank=math.exp(-float((share * np.log(share)).sum())),
        numerical_rank=int((s > max(m, n) * _SINGLE_EPSILON).sum()),
        condition_number=1 / float(s[-1]) if resolved == len(s) else math.inf,
        energy_rank_90=ranks[0],
        energy_rank_95=ranks[1],
        energy_rank_99=ranks[2],
        marchenko_pastur_edge=top * edge,
        above_edge=int((s > edge).sum()),
        power_law_alpha=fit.alpha if fit else None,
        power_law_distance=fit.distance if fit else None,
        power_law_xmin=fit.xmin if fit else None,
    )


def _count_to(running: Vector, amount: float) -> int:
    """The least k whose running sum reaches ``amount``, up to rounding."""
    return int(np.searchsorted(running, amount * (1 - 1e-12))) + 1


def _fit_squares(sigma: Vector, top: float, alpha_max: float) -> PowerLaw | None:
    """`fit_power_law` of σ², scaled by a power of two on the way so that no square overflows."""
    scale = math.ldexp(1.0, max(math.frexp(top)[1] - 1, -1022))
    fit = fit_power_law(np.square(sigma / scale), alpha_max)
    if fit is None:
        return None
    xmin = fit.xmin * scale * scale
    return PowerLaw(fit.alpha, fit.distance, xmin) if 0 < xmin < math.inf else None

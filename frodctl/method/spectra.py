"""The exact spectrum of one matrix: its singular values in float64, and the figures that follow from them.

The values come from the Gram matrix of the smaller side, which is two to four times as fast as an SVD, wherever
that loses nothing: squaring the matrix squares its condition number, so badly conditioned ones get the SVD.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from frodctl.method.linalg import Scratch, add_gram_

if TYPE_CHECKING:
    from frodctl.arrays import Array

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
_FIT_BLOCK = 1 << 19  # elements of the fit's largest temporary


class NotFinite(ValueError):
    """The matrix has NaN or Inf among its elements. The caller knows its name."""


def singular_values(W: Array, scratch: Scratch | None = None) -> Array:
    """All singular values of W, each within 1e-6 of itself or within rounding (ε σ₁) of the exact one.

    Safe to call from several threads at a time, each with a scratch of its own.

    Parameters
    ----------
    W : Array
        (m, n) of a real floating-point dtype, on any device. It is not changed.
    scratch : Scratch, optional
        Memory on W's device that is used again for float64 rows of W and its Gram matrix, up to 16k² bytes or so,
        k = min(m, n). Only where the SVD is needed is all of W copied.

    Returns
    -------
    Array
        (k,) float64 on W's device, in descending order, none negative.

    Raises
    ------
    NotFinite
        If W has NaN or Inf among its elements.
    ValueError
        If W is not a matrix.
    """
    if W.ndim != 2:
        raise ValueError(f"a matrix is needed, not {W.ndim} dimensions")
    k = min(W.shape)
    peak = _peak(W.detach()) if k else 0.0
    if peak == 0:
        return torch.zeros(k, dtype=torch.float64, device=W.device)
    scale = math.ldexp(1.0, max(math.frexp(peak)[1] - 1, -1022))
    tall = W.detach() if W.shape[0] >= W.shape[1] else W.detach().T
    squares = _gram_eigenvalues(tall, 1 / scale, scratch or Scratch(W.device))
    if bool(squares[-1] * GRAM_CONDITION_LIMIT**2 > squares[0]):
        return squares.sqrt_().mul_(scale)
    sigma: Array = torch.linalg.svdvals(tall.to(torch.float64) * (1 / scale))
    return sigma.mul_(scale)


def _peak(W: Array) -> float:
    """The largest magnitude, by the extremes: they carry a NaN along, and torch finds them at full speed."""
    least, most = torch.aminmax(W)
    peak = max(-float(least), float(most))
    if not (math.isfinite(peak) and math.isfinite(float(least))):
        raise NotFinite("the matrix has NaN or Inf among its elements")
    return peak


def _gram_eigenvalues(W: Array, factor: float, scratch: Scratch) -> Array:
    """The eigenvalues of (cW)ᵀ(cW), c the power of two ``factor``, in descending order. W (m, n) is tall."""
    m, n = W.shape
    gram = scratch.empty("spectra.gram", (n, n))
    rows = max(n, _BLOCK // n)
    for begin in range(0, m, rows):
        block = W[begin : begin + rows]
        X = scratch.empty("spectra.rows", tuple(block.shape)).copy_(block).mul_(factor)  # exact, in (−2, 2)
        add_gram_(gram, X, beta=int(begin > 0))
    squares: Array = torch.linalg.eigvalsh(gram, UPLO="U")
    return squares.flip(0)


@dataclass(frozen=True)
class PowerLaw:
    """p(x) ∝ x^−alpha for x ≥ xmin; ``distance`` is that of Kolmogorov and Smirnov, over those x."""

    alpha: float
    distance: float
    xmin: float


def fit_power_law(values: Array, alpha_max: float = ALPHA_MAX) -> PowerLaw | None:
    """The power law of a sample's tail, by the method of Clauset, Shalizi and Newman.

    For each candidate xmin, α = 1 + n / Σ ln(x/xmin) over the n values from xmin on (their Eq. 3.1, the maximum
    of the likelihood of a continuous power law); of these the one at the least Kolmogorov–Smirnov distance. The
    conventions are those of the package powerlaw 2.0: every distinct value but the two largest is a candidate,
    and the empirical distribution counts the values strictly below x.

    Parameters
    ----------
    values : Array
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
    values = values.detach().to("cpu", torch.float64)
    x, counts = torch.unique(values[values > 0], return_counts=True)
    if len(x) < 4:
        return None
    logs = (x / x[-1]).log_()  # to the largest, so that sums over the tail lose nothing
    counts = counts.to(torch.float64)
    tail = counts.flip(0).cumsum(0).flip(0)
    spread = (counts * logs).flip(0).cumsum(0).flip(0) - tail * logs
    alpha = (1 + tail / spread)[:-2]
    candidates = torch.nonzero(alpha < alpha_max).flatten()
    if not len(candidates):
        return None
    distances = _distances(logs, tail, alpha, candidates)
    best = int(distances.argmin())
    chosen = int(candidates[best])
    return PowerLaw(float(alpha[chosen]), float(distances[best]), float(x[chosen]))


def _distances(logs: Array, tail: Array, alpha: Array, candidates: Array) -> Array:
    """max |1 − (x/xmin)^(1−α) − S(x)| for each candidate, S(x) being the share of the tail that is below x.

    ``candidates`` are ascending; (n,) logs and counts of the values from each on.
    """
    rows = max(1, _FIT_BLOCK // len(logs))
    parts = []
    for group in torch.split(candidates, rows):
        first = int(group[0])
        mine = group[:, None]
        beyond = torch.sub(logs[None, first:], logs[mine]).mul_(1 - alpha[mine]).exp_()
        beyond.addcdiv_(tail[None, first:], tail[mine], value=-1)  # 1 − S is the share from x on
        below = torch.arange(first, len(logs))[None, :] < mine
        parts.append(beyond.masked_fill_(below, 0).abs_().amax(dim=1))
    return torch.cat(parts)


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


def summarize(sigma: Array, shape: tuple[int, int], alpha_max: float = ALPHA_MAX) -> Spectrum:
    """The figures of a matrix, from its singular values and shape alone.

    Parameters
    ----------
    sigma : Array
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
    sigma = sigma.detach().to("cpu", torch.float64)
    if not bool(sigma.isfinite().all()):
        raise NotFinite("a singular value is NaN or Inf")
    top = float(sigma[0]) if len(sigma) else 0.0
    if top == 0:
        return Spectrum(0.0, 0.0, 0.0, None, None, 0, None, None, None, None, 0.0, 0, None, None, None)
    s = sigma / top
    energy = s.square().cumsum(0)
    total = float(energy[-1])
    edge = math.sqrt(total) * (1 / math.sqrt(m) + 1 / math.sqrt(n))
    share = s / s.sum()
    resolved = int((s > max(m, n) * _EPSILON).sum())
    ranks = [_count_to(energy, percent * total / 100) for percent in (90, 95, 99)]
    fit = _fit_squares(sigma[:resolved], top, alpha_max)
    return Spectrum(
        spectral_norm=top,
        frobenius_norm=top * math.sqrt(total),
        nuclear_norm=top * float(s.sum()),
        stable_rank=total,
        effective_rank=math.exp(-float(torch.xlogy(share, share).sum())),
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


def _count_to(running: Array, amount: float) -> int:
    """The least k whose running sum reaches ``amount``, up to rounding."""
    return int(torch.searchsorted(running, amount * (1 - 1e-12))) + 1


def _fit_squares(sigma: Array, top: float, alpha_max: float) -> PowerLaw | None:
    """`fit_power_law` of σ², scaled by a power of two on the way so that no square overflows."""
    scale = math.ldexp(1.0, max(math.frexp(top)[1] - 1, -1022))
    fit = fit_power_law((sigma / scale).square(), alpha_max)
    if fit is None:
        return None
    xmin = fit.xmin * scale * scale
    return PowerLaw(fit.alpha, fit.distance, xmin) if 0 < xmin < math.inf else None

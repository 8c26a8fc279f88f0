"""Figures of a spectrum that is too large to compute: randomised, from products with W and Wᵀ, with error bars.

Golub–Kahan bidiagonalisation from one random start finds the spectral norm, and the singular triplets that have
converged on the way are taken as they are. What they leave of the spectrum is seen through stochastic Lanczos
quadrature (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017): from a random v the bidiagonal matrix of
k steps gives the nodes and weights of the k-point Gauss rule for Σ (v·vᵢ)² f(σᵢ²), whose average over probes v,
times the dimension, estimates Σ f(σᵢ²). As Σ 1 and Σ σ² are known, the average is calibrated to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.kernels import kernels_of
from frodctl.method.linalg import element_blocks
from frodctl.method.spectra import NotFinite

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Kernels

#: Half-widths are this many standard deviations of the average over the probes, plus the truncation.
DEVIATIONS = 3.0

#: A singular triplet has converged if ‖Wᵀu − σv‖ is at most this share of σ₁.
CONVERGED = 1e-7

#: Probability that the spectral norm is missed by more than its error.
MISSED = 0.01

_BREAKDOWN = 1e-13  # of ‖W‖_F: what is left of a vector then is rounding
_BLOCK = 1 << 20  # elements of W converted at a time


@dataclass(frozen=True)
class Products:
    """A matrix W (m, n) that is known by its products.

    ``forward`` takes X (n, p) to WX (m, p), ``adjoint`` Y (m, p) to WᵀY (n, p), all of them float64 on the host.
    """

    shape: tuple[int, int]
    forward: Callable[[HostArray], HostArray]
    adjoint: Callable[[HostArray], HostArray]

    @classmethod
    def of(cls, W: HostArray, kernels: Kernels | None = None, *, in_blocks: bool = False) -> Products:
        """The products of a matrix in memory, of any real dtype, computed on a device; the CPU if none is given.

        They keep a float64 copy of it, of 8mn bytes; ``in_blocks`` converts some rows at a time instead, for every
        product anew, which takes three times as long.
        """
        kernels = kernels or kernels_of("cpu")
        on_device = kernels.put(W, None if in_blocks else "float64")
        blocks = element_blocks(W.shape, _BLOCK) if in_blocks else [slice(None)]

        def part(rows: slice) -> Array:
            return kernels.put(on_device[rows], "float64")

        def forward(X: HostArray) -> HostArray:
            right = kernels.put(X)
            return np.concatenate([kernels.get(kernels.matmul(part(rows), right)) for rows in blocks])

        def adjoint(Y: HostArray) -> HostArray:
            left = kernels.put(Y)
            total = kernels.zeros((W.shape[1], Y.shape[1]), "float64")
            for rows in blocks:
                total += kernels.matmul(part(rows).T, left[rows])
            return kernels.get(total)

        return cls((W.shape[0], W.shape[1]), forward, adjoint)

    @property
    def tall(self) -> Products:
        """W or Wᵀ, whichever has no more columns than rows: the singular values are the same."""
        m, n = self.shape
        return self if m >= n else Products((n, m), self.adjoint, self.forward)


def frobenius_norm(W: HostArray) -> float:
    """√Σ wᵢⱼ² in float64, some rows of W (m, n) at a time. Raises `NotFinite` if that is NaN or Inf."""
    total = _root_of_squares(W, 1.0)
    if W.dtype == np.float64 and not 1e-140 < total < 1e140:  # squares leave float64
        peak = float(np.abs(W).max()) if W.size else 0.0
        total = peak * _root_of_squares(W, peak) if 0 < peak < math.inf else peak
    if not math.isfinite(total):
        raise NotFinite("the matrix has NaN or Inf among its elements")
    return total


def _root_of_squares(W: HostArray, unit: float) -> float:
    total = 0.0
    for rows in element_blocks(W.shape, _BLOCK):
        part = W[rows].astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            part /= unit
            total += float(np.einsum("ij,ij->", part, part))
    return math.sqrt(total)


@dataclass(frozen=True)
class Figure:
    """An estimate and its half-width: the true figure lies within value ± error with 95 % probability or more.

    An error of 0 says that the value is exact.
    """

    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Estimates:
    """Figures of a spectrum as in `frodctl.method.spectra.Spectrum`; None where they are not to be had.

    The energy ranks are whole numbers. The condition number, the numerical rank, the count above the edge and
    the power law hang on single singular values within the spectrum, and are always None.
    """

    spectral_norm: Figure
    frobenius_norm: Figure
    nuclear_norm: Figure
    stable_rank: Figure | None
    effective_rank: Figure | None
    energy_rank_90: Figure | None
    energy_rank_95: Figure | None
    energy_rank_99: Figure | None
    marchenko_pastur_edge: Figure
    numerical_rank: None = None
    condition_number: None = None
    above_edge: None = None
    power_law_alpha: None = None
    power_law_distance: None = None
    power_law_xmin: None = None

    def figures(self) -> dict[str, Figure]:
        """Those that are to be had, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def estimated(self) -> tuple[str, ...]:
        """The names of the figures that are not exact."""
        return tuple(name for name, figure in self.figures().items() if figure.error > 0)

    def as_dict(self) -> dict[str, float | dict[str, float] | None]:
        """The values by the names that `Spectrum.as_dict` has, and ``errors``: the half-widths of those estimated."""
        found = self.figures()
        result: dict[str, float | dict[str, float] | None] = {
            f.name: found[f.name].value if f.name in found else None for f in fields(self)
        }
        return result | {"errors": {name: found[name].error for name in self.estimated}}


def estimate(
    products: Products,
    frobenius: float,
    generator: np.random.Generator,
    *,
    steps: int = 64,
    probes: int = 16,
    probe_steps: int = 40,
) -> Estimates:
    """Estimate the figures of W (m, n) from ``steps`` + ``probes`` × ``probe_steps`` products with W and with Wᵀ.

    The same generator state gives the same figures. Memory: 8 (m + n) probes × probe_steps bytes, twice.

    Parameters
    ----------
    products : Products
        W.
    frobenius : float
        ‖W‖_F, exact; see `frobenius_norm`.
    generator : numpy.random.Generator
    steps : int
        Of the bidiagonalisation that finds the spectral norm and the leading singular triplets.
    probes : int
        Random vectors for the rest of the spectrum; the statistical part of the errors falls as 1/√probes.
    probe_steps : int
        Of the bidiagonalisation from each of them, at least 2; the systematic part of the errors falls with it.

    Returns
    -------
    Estimates

    Raises
    ------
    NotFinite
        If ``frobenius`` or a product is NaN or Inf.
    """
    if not math.isfinite(frobenius):
        raise NotFinite("the matrix has NaN or Inf among its elements")
    m, n = products.shape
    if frobenius == 0:
        zero = Figure(0.0)
        return Estimates(zero, zero, zero, None, None, None, None, None, zero)
    W = _Scaled(products.tall, frobenius)
    lead = _leading(W, min(steps, W.columns), generator)
    rest = max(0.0, 1 - float(np.square(lead.sigma).sum()))
    dimension = W.columns - len(lead.sigma)
    nodes = None
    if dimension > 0 and rest > 1e-14:
        nodes = _quadrature(W, lead, probes, min(probe_steps, dimension), generator)
    top = max(lead.top, 0.0 if nodes is None else math.sqrt(float(nodes[0][0].max())))
    rules = _rules(np.square(lead.sigma), nodes, dimension, rest)
    spectral = _spectral_norm(top, lead.missing)
    return Estimates(
        spectral_norm=_times(spectral, frobenius),
        frobenius_norm=Figure(frobenius),
        nuclear_norm=_times(_nuclear_norm(rules, probes), frobenius),
        stable_rank=Figure(top**-2, _rounding(top**-2) + top**-2 - (top + spectral.error) ** -2),
        effective_rank=_effective_rank(rules, probes),
        energy_rank_90=_energy_rank(rules, 0.90, probes, W.columns),
        energy_rank_95=_energy_rank(rules, 0.95, probes, W.columns),
        energy_rank_99=_energy_rank(rules, 0.99, probes, W.columns),
        marchenko_pastur_edge=Figure(frobenius * (1 / math.sqrt(m) + 1 / math.sqrt(n))),
    )


class _Scaled:
    """W / ‖W‖_F for vectors in rows, of (probes, length)."""

    def __init__(self, products: Products, frobenius: float) -> None:
        self.rows, self.columns = products.shape
        self._products = products
        self._scale = 1 / frobenius

    def forward(self, X: HostArray) -> HostArray:
        return self._checked(self._products.forward(np.ascontiguousarray(X.T)))

    def adjoint(self, Y: HostArray) -> HostArray:
        return self._checked(self._products.adjoint(np.ascontiguousarray(Y.T)))

    def _checked(self, product: HostArray) -> HostArray:
        if not np.isfinite(product).all():
            raise NotFinite("a product with the matrix is NaN or Inf")
        return product.T * self._scale


@dataclass(frozen=True)
class _Bidiagonal:
    """WV = UB and WᵀU = VBᵀ + β_k v eₖᵀ for each probe, B upper bidiagonal.

    ``B`` is (p, k, k + 1), its last column βₖeₖ; ``U`` (p, k, m) and ``V`` (p, k, n) hold the vectors in rows.
    """

    U: HostArray
    V: HostArray
    B: HostArray


@dataclass(frozen=True)
class _Leading:
    """Converged singular triplets σᵢ, uᵢ, vᵢ (vectors in rows), the largest Ritz value, and what it may lack.

    ``missing`` bounds (σ₁² − top²) / σ₁² with probability 1 − `MISSED`.
    """

    sigma: HostArray
    U: HostArray
    V: HostArray
    top: float
    missing: float


def _bidiagonalize(W: _Scaled, start: HostArray, steps: int, lead: _Leading | None = None) -> _Bidiagonal:
    """Golub–Kahan bidiagonalisation with full reorthogonalisation, from each row of ``start`` (p, n).

    With ``lead`` it is that of W without those triplets. Where a Krylov space is exhausted, zeros follow.
    """
    probes = len(start)
    U = np.zeros((probes, steps, W.rows))
    V = np.zeros((probes, steps, W.columns))
    B = np.zeros((probes, steps, steps + 1))
    v, _ = _next(start, V[:, :0], lead.V if lead else None)
    for j in range(steps):
        V[:, j] = v
        u, B[:, j, j] = _next(W.forward(v), U[:, :j], lead.U if lead else None)
        U[:, j] = u
        v, B[:, j, j + 1] = _next(W.adjoint(u), V[:, : j + 1], lead.V if lead else None)
    return _Bidiagonal(U, V, B)


def _next(x: HostArray, basis: HostArray, lead: HostArray | None) -> tuple[HostArray, HostArray]:
    """x (p, n) made orthogonal to each probe's basis (p, j, n) and to the rows of lead, twice; and its length."""
    for _ in range(2):
        if lead is not None:
            x = x - (x @ lead.T) @ lead
        x = x - ((x[:, None] @ basis.transpose(0, 2, 1)) @ basis)[:, 0]
    length = np.linalg.norm(x, axis=1)
    length[length <= _BREAKDOWN] = 0
    return x / np.where(length > 0, length, math.inf)[:, None], length


def _leading(W: _Scaled, steps: int, generator: np.random.Generator) -> _Leading:
    found = _bidiagonalize(W, generator.standard_normal((1, W.columns)), steps)
    B = found.B[0, :, :steps]
    P, sigma, Qt = np.linalg.svd(B)
    beyond = found.B[0, -1, -1]
    top = float(sigma[0])
    good = (beyond * np.abs(P[-1]) <= CONVERGED * top) & (sigma > CONVERGED * top)
    exhausted = bool(beyond == 0) or bool((B.diagonal() == 0).any())
    return _Leading(
        sigma[good], P.T[good] @ found.U[0], Qt[good] @ found.V[0], top, 0.0 if exhausted else _missing(W, steps)
    )


def _missing(W: _Scaled, steps: int) -> float:
    """The relative error of the largest eigenvalue of WᵀW that `steps` steps exceed with probability `MISSED`.

    Whatever the spectrum: J. Kuczyński, H. Woźniakowski: Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start. SIAM J. Matrix Anal. Appl. 13 (1992), Theorem 4.2.
    """
    return min(1.0, (math.log(1.648 * math.sqrt(W.columns) / MISSED) / (2 * steps - 1)) ** 2)


def _quadrature(
    W: _Scaled, lead: _Leading, probes: int, steps: int, generator: np.random.Generator
) -> list[tuple[HostArray, HostArray, HostArray]]:
    """Nodes σ², weights and widths for what ``lead`` leaves of the spectrum: (p, ·), a probe's weights sum to 1.

    First the Gauss rule, then that of Gauss and Radau with one node at 0.
    """
    start = generator.standard_normal((probes, W.columns))
    B = _bidiagonalize(W, start, steps, lead).B
    rules = []
    for matrix in (B[:, :, :steps], B):
        _, sigma, Vt = np.linalg.svd(matrix)
        nodes = np.zeros(Vt.shape[:2])
        nodes[:, :steps] = np.square(sigma)
        rules.append((nodes, np.square(Vt[:, :, 0]), _widths(nodes) * (B[:, -1, -1:] > 0)))
    return rules


def _widths(nodes: HostArray) -> HostArray:
    """Half the distance between the neighbours of each node, of (p, k) in descending order; 0 lies beyond the last."""
    around = np.concatenate([nodes[:, :1], nodes, np.zeros_like(nodes[:, :1])], axis=1)
    return np.asarray((around[:, :-2] - around[:, 2:]) / 2)


@dataclass(frozen=True)
class _Rule:
    """Σ f(σᵢ²) ≈ weights · f(nodes), the leading ``exact`` nodes being exact. In units of ‖W‖_F².

    ``widths`` is the part of the spectrum's range that each node stands for, 0 where it is an eigenvalue.
    """

    nodes: HostArray
    weights: HostArray
    exact: int
    widths: HostArray

    def sum(self, f: HostArray) -> float:
        return float(self.weights @ f)

    def deviation(self, f: HostArray, probes: int) -> float:
        """The standard deviation of `sum` that comes from the choice of the probes.

        D vᵀAv for v uniform on the sphere in D dimensions has the variance 2D/(D + 2) Σ(aᵢ − ā)², and what the
        calibration takes away is the part of f that is linear in the node.
        """
        x, w, f = self.nodes[self.exact :], self.weights[self.exact :].clip(min=0), f[self.exact :]
        size = float(w.sum())
        if size == 0:
            return 0.0
        x = x - w @ x / size
        f = f - w @ f / size
        spread = float(w @ np.square(x))
        if spread > 0:
            f = f - (w @ (x * f) / spread) * x
        return math.sqrt(2 * size / (size + 2) * float(w @ np.square(f)) / probes)

    def blur(self, level: float) -> float:
        """What Σ(x − level)₊ may be off by because nodes stand for a range: a quarter of width × weight around it."""
        around = np.abs(self.nodes - level) <= self.widths / 2
        return float((self.weights * self.widths)[around].clip(min=0).sum()) / 4


def _rules(
    exact: HostArray, found: list[tuple[HostArray, HostArray, HostArray]] | None, dimension: int, rest: float
) -> tuple[_Rule, _Rule]:
    """The two quadrature rules for the whole spectrum, calibrated to Σ 1 and Σ σ²."""
    ones = np.ones_like(exact)
    if found is None:
        nodes, weights = np.append(exact, 0.0), np.append(ones, dimension)
        whole = _Rule(nodes, weights, len(exact), np.zeros_like(nodes))
        return whole, whole
    rules = []
    for nodes, weights, widths in found:
        x, w = nodes.flatten(), weights.flatten() / len(nodes)
        mean = float(w @ x)
        spread = float(w @ np.square(x - mean))
        if spread > 1e-12 * mean**2:
            w = w * (1 + (rest / dimension - mean) / spread * (x - mean))
        widths = np.concatenate([0 * exact, widths.flatten()])
        rules.append(_Rule(np.concatenate([exact, x]), np.concatenate([ones, dimension * w]), len(exact), widths))
    return rules[0], rules[1]


def _rounding(value: float) -> float:
    return 1e-6 * abs(value)


def _times(figure: Figure, factor: float) -> Figure:
    return Figure(figure.value * factor, figure.error * factor)


def _spectral_norm(top: float, missing: float) -> Figure:
    highest = min(1.0, top / math.sqrt(1 - missing)) if missing < 1 else 1.0
    return Figure(top, max(0.0, highest - top) + _rounding(top))


def _nuclear_norm(rules: tuple[_Rule, _Rule], probes: int) -> Figure:
    """Even derivatives of √x are negative and odd ones positive: Gauss overestimates, Gauss–Radau underestimates."""
    high, low = (rule.sum(np.sqrt(rule.nodes)) for rule in rules)
    value = (high + low) / 2
    deviation = rules[0].deviation(np.sqrt(rules[0].nodes), probes)
    return Figure(value, DEVIATIONS * deviation + abs(high - low) / 2 + _rounding(value))


def _effective_rank(rules: tuple[_Rule, _Rule], probes: int) -> Figure:
    """exp(H), H = ln S − L/S, with S = Σσ and L = Σσ ln σ; the two rules enclose S, and as σ ≤ 1 also L."""
    S, L = ([rule.sum(f(np.sqrt(rule.nodes))) for rule in rules] for f in (np.copy, _xlogx))
    s, el = sum(S) / 2, sum(L) / 2
    sigma = np.sqrt(rules[0].nodes)
    influence = (sigma * (1 + el / s) - _xlogx(sigma)) / s
    error = DEVIATIONS * rules[0].deviation(influence, probes)
    error += abs(L[0] - L[1]) / 2 / s + abs(S[0] - S[1]) / 2 * abs(1 / s + el / s**2)
    value = math.exp(math.log(s) - el / s)
    return Figure(value, value * math.expm1(error) + _rounding(value))


def _xlogx(x: HostArray) -> HostArray:
    return x * np.log(np.where(x > 0, x, 1))


def _energy_rank(rules: tuple[_Rule, _Rule], share: float, probes: int, most: int) -> Figure:
    """The least k with Σ_{i≤k} σᵢ² ≥ share: the next whole number from max over t of (share − Σ(σᵢ² − t)₊) / t.

    That is the dual of: least Σcᵢ with Σcᵢσᵢ² ≥ share, 0 ≤ cᵢ ≤ 1. Its maximum is at a node, and there the sum
    is of a function without a jump, which the rules integrate far better than they count.
    """
    found = [_fractional_rank(rule, share) for rule in rules]
    rank = (found[0][0] + found[1][0]) / 2
    level = found[0][1]
    influence = (rules[0].nodes - level).clip(min=0) / level
    error = DEVIATIONS * rules[0].deviation(influence, probes) + abs(found[0][0] - found[1][0]) + _rounding(rank)
    error += rules[0].blur(level) / level
    value = math.ceil(rank - 1e-9 * rank)
    lowest, highest = max(1, math.ceil(rank - error)), min(most, math.ceil(rank + error))
    return Figure(value, max(highest - value, value - lowest))


def _fractional_rank(rule: _Rule, share: float) -> tuple[float, float]:
    """The maximum, and the t where it is."""
    order = np.argsort(-rule.nodes, kind="stable")
    order = order[rule.nodes[order] > 1e-30]
    x, w = rule.nodes[order], rule.weights[order]
    above = np.cumsum(w * x) - x * np.cumsum(w)
    ranks = (share - above) / x
    best = int(ranks.argmax())
    return float(ranks[best]), float(x[best])

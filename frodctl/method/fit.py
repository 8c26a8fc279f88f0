"""The FRoD update that comes nearest to a given change of a weight: where S should be, and its values and the scales'.

With U = W V⁻ᵀ diag(λ)⁻¹ as in `frodctl.method.update`, an update is U M Vᵀ for M = diag(δ) + S. Without any pattern
M = U⁺ ΔW V⁻ᵀ is the least there is, and M[r, c]² ‖v_c‖² what an entry of it contributes. With one the entries are a
least-squares problem: U (M's residual) V is 0 at every position. Its normal equations are solved by conjugate
gradients, whose products are those of n × n matrices: the matrix of the equations itself is never there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.dual import Dual
from frodctl.method.update import CsrPattern, csr_pattern

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Kernels, Vector

#: Eigenvalues of a Gram matrix of U's that are no larger, relative to the largest, belong to no direction of U.
_NULL = 1e-12
#: Where the iteration ends: at this size of the normal equations' residual, relative to their right-hand side, or after
#: so many steps.
_TOLERANCE = 1e-10
_STEPS = 1000


@dataclass(frozen=True)
class Fit:
    """An update's numbers."""

    delta: Vector  #: λ' − λ, (n,)
    values: Vector  #: of S at the positions, (nnz,)
    residual: float  #: of the normal equations, relative to their right-hand side
    steps: int  #: of the iteration


class CategoryFit:
    """Fits updates over one V.

    Parameters
    ----------
    V : HostArray, (n, n), floating point
        The shared basis as stored.
    kernels : Kernels
        Where to compute, in float64.
    """

    def __init__(self, V: HostArray, kernels: Kernels) -> None:
        self.n = len(V)
        self.kernels = kernels
        dual = Dual.of(V, kernels)
        self.V, self.inverse = dual.V, dual.inverse
        self.gram = kernels.mirror(kernels.syrk(self.V, kernels.empty((self.n, self.n), "float64")))  # VᵀV
        self.squares = kernels.norms(self.V, axis=0) ** 2  #: ‖v_c‖², (n,)

    def directions(self, W: Array, scales: HostArray) -> Array:
        """U (m, n) of W (m, n) with the scales λ (n,) that the basis has of it; 0 where λ is."""
        scales = scales.astype(np.float64)
        inverses = np.divide(1, scales, out=np.zeros(self.n), where=scales > 0)
        U = self.kernels.gemm(W, self.inverse, self.kernels.empty(tuple(W.shape), "float64"), transpose_b=True)
        U *= self.kernels.put(inverses)
        return U

    def contributions(self, U: Array, change: Array) -> HostArray:
        """What each entry of U⁺ ΔW V⁻ᵀ contributes to ΔW (m, n): (n, n), its square times ‖v_c‖²."""
        kernels, n = self.kernels, self.n
        Y = kernels.gemm(change, self.inverse, kernels.empty(tuple(change.shape), "float64"), transpose_b=True)
        wide = U.shape[0] < n
        if wide:
            Y = kernels.gemm(self._pseudo_inverse(U, rows=True), Y, kernels.empty(tuple(Y.shape), "float64"))
        M = kernels.gemm(U, Y, kernels.empty((n, n), "float64"), transpose_a=True)
        if not wide:
            M = kernels.gemm(self._pseudo_inverse(U, rows=False), M, kernels.empty((n, n), "float64"))
        found: HostArray = kernels.get(M) ** 2
        return found * self.squares

    def fit(self, U: Array, change: Array, indices: HostArray) -> Fit:
        """The numbers at the positions (2, nnz) and on the diagonal with which U M Vᵀ is nearest to ΔW (m, n)."""
        kernels, n = self.kernels, self.n
        H = kernels.mirror(kernels.syrk(U, kernels.empty((n, n), "float64")))
        right = kernels.gemm(change, self.V, kernels.empty((U.shape[0], n), "float64"))
        right = kernels.gemm(U, right, kernels.empty((n, n), "float64"), transpose_a=True)
        pattern = csr_pattern(indices, n)
        weights = np.diagonal(kernels.get(H))[pattern.rows] * self.squares[pattern.columns]
        work = kernels.empty((n, n), "float64")

        def normal(x: Vector) -> Vector:
            return _at(
                kernels.gemm(H, kernels.csrmm(pattern.starts, pattern.columns, x, self.gram), work), pattern, kernels
            )

        x, residual, steps = conjugate_gradients(normal, _at(right, pattern, kernels), weights)
        entries = np.empty(len(x))
        entries[pattern.order] = x
        return Fit(entries[-n:], entries[:-n], residual, steps)

    def update(self, U: Array, delta: HostArray, values: HostArray, indices: HostArray) -> Array:
        """U (diag(δ) + S) Vᵀ (m, n)."""
        kernels, pattern = self.kernels, csr_pattern(indices, self.n)
        entries = np.concatenate([values, delta]).astype(np.float64)[pattern.order]
        K = kernels.csrmm(pattern.starts, pattern.columns, entries, kernels.transpose(self.V))
        return kernels.gemm(U, K, kernels.empty((U.shape[0], self.n), "float64"))

    def _pseudo_inverse(self, U: Array, *, rows: bool) -> Array:
        """(UᵀU)⁺ (n, n), or with ``rows`` (UUᵀ)⁺ (m, m)."""
        kernels, k = self.kernels, U.shape[0 if rows else 1]
        values, Z = kernels.syevd(kernels.syrk(U, kernels.empty((k, k), "float64"), rows=rows))
        there = values > _NULL * values[-1]
        inverses = np.divide(1, values, out=np.zeros(k), where=there)
        return kernels.gemm(Z * kernels.put(inverses)[:, None], Z, kernels.empty((k, k), "float64"), transpose_a=True)


def best_positions(contributions: HostArray, count: int) -> HostArray:
    """The positions (2, count) off the diagonal of the largest of these (n, n), in ascending order; int64."""
    n = len(contributions)
    ranked = contributions.copy()
    np.fill_diagonal(ranked, -1.0)
    flat = ranked.reshape(-1)
    chosen = np.sort(np.argpartition(flat, n * n - count)[n * n - count :]) if count else np.zeros(0, np.int64)
    return np.stack([chosen // n, chosen % n]).astype(np.int64)


def conjugate_gradients(apply: Callable[[Vector], Vector], right: Vector, weights: Vector) -> tuple[Vector, float, int]:
    """The least-squares solution x (k,) of a positive semidefinite system, preconditioned by its diagonal.

    Parameters
    ----------
    apply : callable
        The product with the matrix.
    right : Vector
        (k,)
    weights : Vector
        (k,), the matrix's diagonal; unknowns whose weight is 0 stay 0.

    Returns
    -------
    x : Vector
    residual : float
        ‖right − Ax‖/‖right‖, both in the preconditioner's norm; 0 where ``right`` is 0.
    steps : int
    """
    inverses = np.divide(1, weights, out=np.zeros_like(weights), where=weights > 0)
    x, r = np.zeros_like(right), right.copy()
    z = inverses * r
    p, rz = z, float(np.einsum("i,i->", r, z))
    whole, steps = rz, 0
    while rz > _TOLERANCE**2 * whole and steps < _STEPS:
        q = apply(p)
        curvature = float(np.einsum("i,i->", p, q))
        if not curvature > 0:
            break
        x += rz / curvature * p
        r -= rz / curvature * q
        z = inverses * r
        rz, before = float(np.einsum("i,i->", r, z)), rz
        p = z + rz / before * p
        steps += 1
    return x, float(np.sqrt(rz / whole)) if whole else 0.0, steps


def _at(X: Array, pattern: CsrPattern, kernels: Kernels) -> Vector:
    """What X (n, n) has at the positions, in the pattern's order."""
    found: Vector = kernels.get(X)[pattern.rows, pattern.columns]
    return found

"""The FRoD update that comes nearest to a given change of a weight: where S should be, and its values and the scales'.

With U = W V⁻ᵀ diag(λ)⁻¹ as in `frodctl.method.update`, an update is U M Vᵀ for M = diag(δ) + S, and its entries are a
least-squares problem: with R = ΔW − U M Vᵀ, UᵀRV is to be 0 at every position. These normal equations are solved by
conjugate gradients, whose products are those of n × n matrices: the matrix of the equations itself is never there.
Positions are chosen by what an entry would explain alone. (The entries of U⁺ ΔW V⁻ᵀ, the M without any pattern, tell
less: of random changes those that are largest there explain six tenths as much once they are refitted.)
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
        self.V, self.inverse = kernels.put(dual.V, "float64"), dual.inverse
        self.gram = kernels.mirror(kernels.syrk(self.V, kernels.empty((self.n, self.n), "float64")))  # VᵀV
        self.squares = kernels.norms(self.V, axis=0) ** 2  #: ‖v_c‖², (n,)

    def directions(self, W: Array, scales: HostArray) -> Array:
        """U (m, n) of W (m, n) with the scales λ (n,) that the basis has of it; 0 where λ is."""
        scales = scales.astype(np.float64)
        inverses = np.divide(1, scales, out=np.zeros(self.n), where=scales > 0)
        U = self.kernels.gemm(W, self.inverse, self.kernels.empty(tuple(W.shape), "float64"), transpose_b=True)
        U *= self.kernels.put(inverses)
        return U

    def explained(self, U: Array, change: Array) -> HostArray:
        """How much of ‖ΔW‖² (m, n) each entry of M explains by itself: ⟨ΔW, u_r v_cᵀ⟩²/‖v_c‖², (n, n)."""
        kernels, n = self.kernels, self.n
        right = kernels.gemm(change, self.V, kernels.empty(tuple(change.shape), "float64"))
        found: HostArray = kernels.get(kernels.gemm(U, right, kernels.empty((n, n), "float64"), transpose_a=True))
        return found**2 / self.squares

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


def best_positions(explained: HostArray, count: int) -> HostArray:
    """The positions (2, count) off the diagonal of the largest of these (n, n), in ascending order; int64."""
    n = len(explained)
    ranked = explained.copy()
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

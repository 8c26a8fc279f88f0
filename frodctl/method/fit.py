"""The FRoD update that comes nearest to a given change of a weight: where S should be, and its values and the scales'.

With U = W V⁻ᵀ diag(λ)⁻¹ as in `frodctl.method.update`, an update is U M Vᵀ for M = diag(δ) + S, and its entries are a
least-squares problem: with R = ΔW − U M Vᵀ, UᵀRV is to be 0 at every position. These normal equations are solved by
conjugate gradients, whose products are those of matrices as large as the weight, or n × n: the matrix of the equations,
H[r, r'] G[c, c'] for H = UᵀU and G = VᵀV, is never there. Its blocks of one column c, G[c, c] H at the column's rows,
precondition it: what U has in common between its columns is far more than what V has.
Positions are chosen by what an entry would explain alone. (The entries of U⁺ ΔW V⁻ᵀ, the M without any pattern, tell
less: of random changes those that are largest there explain six tenths as much once they are refitted.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.dual import Dual
from frodctl.method.update import csr_pattern

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Kernels, Vector

#: Where the iteration ends: at this size of the normal equations' residual, relative to their right-hand side, or after
#: so many steps. Of what an update made the numbers come back as exactly, within a small factor.
_TOLERANCE = 1e-8
_STEPS = 1000
#: Blocks of the preconditioner have no more elements than so many (n, n) matrices.
_BLOCK_MATRICES = 4
_RIDGE = 1e-8  #: added to their diagonals, of 1: U may have fewer rows than a column of M has positions
_ROWS = 1024  # gathered at a time: they stay in the cache


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
        pattern = csr_pattern(indices[::-1], n)  # by the columns of M
        columns, rows = pattern.rows, pattern.columns
        left = kernels.transpose(U) if U.shape[0] < n else H
        work = kernels.empty(tuple(left.shape), "float64")

        def normal(x: Vector) -> Vector:
            product = kernels.csrmm(pattern.starts, pattern.columns, x, left)
            product = kernels.gemm(self.gram, product, work)  # (UMVᵀV)ᵀ, or (HMVᵀV)ᵀ
            if left is H:
                return _at(product, columns, rows, kernels)
            return _products(left, rows, product, columns, kernels)

        blocks = ColumnBlocks(kernels.get(H), self.squares, columns, rows)
        x, residual, steps = conjugate_gradients(normal, _at(right, rows, columns, kernels), blocks.solve)
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


class ColumnBlocks:
    """The inverses of the normal equations' blocks of one column of M each, or of parts of the longest columns.

    Parameters
    ----------
    H : HostArray, (n, n)
        UᵀU, whose diagonal is 1, or 0 where the scales are.
    squares : Vector, (n,)
        The diagonal of VᵀV.
    columns, rows : HostArray, (k,), int64
        The positions, by columns.
    """

    def __init__(self, H: HostArray, squares: Vector, columns: HostArray, rows: HostArray) -> None:
        counts = np.bincount(columns, minlength=len(H))
        most = _longest_block(counts, _BLOCK_MATRICES * H.size)
        parts = (np.arange(len(rows)) - (np.cumsum(counts) - counts)[columns]) // most  # of the columns
        first = np.flatnonzero(np.diff(columns * len(H) + parts, prepend=-1))
        lengths = np.diff(first, append=len(rows))
        self._groups = []
        for length in np.unique(lengths):  # the blocks of a length together
            places = first[lengths == length][:, None] + np.arange(length)
            blocks = H[rows[places][:, :, None], rows[places][:, None, :]]
            blocks[:, np.arange(length), np.arange(length)] += _RIDGE
            scales = squares[columns[places[:, 0]]]
            self._groups.append((places, np.linalg.inv(blocks) / np.where(scales > 0, scales, np.inf)[:, None, None]))

    def solve(self, r: Vector) -> Vector:
        """The blocks' inverses times r (k,)."""
        z = np.empty_like(r)
        for places, inverses in self._groups:
            z[places] = np.matmul(inverses, r[places][:, :, None])[:, :, 0]
        return z


def _longest_block(counts: HostArray, elements: int) -> int:
    """How many positions a block has at most, so that columns of so many take no more elements together."""
    most = int(counts.max())
    while most > 1 and (counts // most * most**2 + (counts % most) ** 2).sum() > elements:
        most //= 2
    return most


def conjugate_gradients(
    apply: Callable[[Vector], Vector], right: Vector, precondition: Callable[[Vector], Vector]
) -> tuple[Vector, float, int]:
    """The least-squares solution x (k,) of a positive semidefinite system.

    Parameters
    ----------
    apply : callable
        The product with the matrix.
    right : Vector
        (k,)
    precondition : callable
        The product with a positive semidefinite matrix, near the inverse.

    Returns
    -------
    x : Vector
    residual : float
        ‖right − Ax‖/‖right‖, which the iteration brings below 1e-8 where rounding lets it; 0 where ``right`` is 0.
    steps : int
    """
    x, r = np.zeros_like(right), right.copy()
    p, rz, steps = np.zeros_like(right), 1.0, 0
    whole = _norm(right)
    while _norm(r) > _TOLERANCE * whole and steps < _STEPS:
        z = precondition(r)
        before, rz = rz, _dot(r, z)
        p = z + rz / before * p
        q = apply(p)
        curvature = _dot(p, q)
        if not curvature > 0:
            break
        x += rz / curvature * p
        r -= rz / curvature * q
        steps += 1
    return x, _norm(r) / whole if whole else 0.0, steps


def _dot(x: Vector, y: Vector) -> float:
    return float(np.einsum("i,i->", x, y))


def _norm(x: Vector) -> float:
    return float(np.sqrt(_dot(x, x)))


def _at(X: Array, rows: HostArray, columns: HostArray, kernels: Kernels) -> Vector:
    """What X (n, n) has at the positions (k,)."""
    found: Vector = kernels.get(X)[rows, columns]
    return found


def _products(X: Array, rows: HostArray, Y: Array, others: HostArray, kernels: Kernels) -> Vector:
    """The dot products of rows of X with rows of Y, by their numbers (k,)."""
    blocks = (slice(start, start + _ROWS) for start in range(0, len(rows), _ROWS))
    return np.concatenate([kernels.row_dots(X[rows[block]], Y[others[block]]) for block in blocks])

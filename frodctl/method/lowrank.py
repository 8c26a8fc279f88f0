"""The best approximation of a matrix by one of low rank.

The leading singular vectors are eigenvectors of the Gram matrix of the smaller side, which costs a fraction of an SVD.
But it has the singular values squared: those far below the largest drown in its rounding, and their vectors with them.
So only those in sight of the largest are taken from it, and further ones from the Gram matrix of what these leave of
the matrix, level by level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.fidelity import Fidelity

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Kernels, Vector

#: Singular values that are taken from one Gram matrix, relative to its largest. Its rounding, about ε σ₁², lets the
#: distance grow by no more than ε r/2 over the square of this share: 1e-8 at r = 100.
_IN_SIGHT = 1e-3
#: What is no larger, relative to the whole, would be lost in rounding factors to float32.
_NEGLIGIBLE = 1e-9


def truncated(X: Array, rank: int, kernels: Kernels) -> tuple[Array, Array]:
    """Factors B (m, r) and A (r, n) of the best approximation of X by a matrix of rank r.

    ‖X − BA‖_F is within 1e-6 of the least there is, or 1e-8 of ‖X‖_F.

    Parameters
    ----------
    X : Array, (m, n), float64
        On the kernels' device. It is not changed.
    rank : int
        r, positive. What it has over min(m, n), or over the rank that X has to rounding, is zeros.
    kernels : Kernels
        Where to compute.

    Returns
    -------
    B, A : Array, (m, r) and (r, n), float64
        A column of B and the row of A that goes with it have the same norm, √σ; σ descends.
    """
    m, n = X.shape
    Q = _directions(X, rank, kernels)
    count = len(Q)
    B, A = kernels.zeros((m, rank), "float64"), kernels.zeros((rank, n), "float64")
    if m >= n:
        Y = kernels.gemm(X, Q, kernels.empty((m, count), "float64"), transpose_b=True)
        roots = kernels.put(np.sqrt(kernels.norms(Y, axis=0)))
        B[:, :count] = Y / roots
        A[:count] = Q * roots[:, None]
    else:
        Y = kernels.gemm(Q, X, kernels.empty((count, n), "float64"))
        roots = kernels.put(np.sqrt(kernels.norms(Y, axis=1)))
        B[:, :count] = Q.T * roots
        A[:count] = Y / roots[:, None]
    return B, A


def fidelity(X: Array, B: Array, A: Array, kernels: Kernels) -> Fidelity:
    """How near BA comes to X (m, n), which is overwritten; all float64 on the kernels' device."""
    XX = float(kernels.row_dots(X, X).sum())
    overlaps = kernels.gemm(B, X, kernels.empty(tuple(A.shape), "float64"), transpose_a=True)
    XY = float(kernels.row_dots(overlaps, A).sum())
    D = kernels.gemm(B * -1.0, A, X, beta=1)
    return Fidelity.from_terms(XX, XY, float(kernels.row_dots(D, D).sum()))


def energies(X: Array, kernels: Kernels) -> Vector:
    """The squares of the singular values of X (m, n), float64: (min(m, n),), descending, to rounding of the largest."""
    gram = _gram(X, kernels)
    return np.maximum(kernels.eigvalsh(kernels.mirror(gram))[::-1], 0) if len(gram) else np.zeros(0)


def energy_rank(energies: Vector, share: float) -> int:
    """How many of the largest hold this share of the sum, which lies between 0 and 1; 1 at least."""
    running = np.cumsum(energies)
    if not len(running) or running[-1] == 0:
        return 1
    return int(np.searchsorted(running, share * running[-1] * (1 - 1e-12))) + 1


def _directions(X: Array, rank: int, kernels: Kernels) -> Array:
    """Orthonormal rows that span the leading singular vectors of X's smaller side: as many as are wanted and there."""
    wide, count = X.shape[0] < X.shape[1], min(*X.shape, rank)
    Q = kernels.empty((count, min(X.shape)), "float64")
    found, least, rest = 0, 0.0, X
    while found < count:
        squares, vectors = kernels.syevr(_gram(rest, kernels), count - found)
        least = least or _NEGLIGIBLE**2 * squares[0]
        if not squares[0] > least:
            break
        seen = int((squares > _IN_SIGHT**2 * squares[0]).sum())
        new = vectors[:seen] if rest is X else _without(vectors[:seen], Q[:found], kernels)
        Q[found : found + seen] = new
        found += seen
        if found < count:
            rest = _without(rest, new, kernels, columns=wide)
    return Q[:found]


def _gram(X: Array, kernels: Kernels) -> Array:
    """XᵀX, or XXᵀ where that is smaller."""
    k = min(X.shape)
    return kernels.syrk(X, kernels.empty((k, k), "float64"), rows=X.shape[0] < X.shape[1])


def _without(X: Array, Q: Array, kernels: Kernels, *, columns: bool = False) -> Array:
    """X (m, n) without what its rows, or its columns, have along Q's rows, which are orthonormal."""
    (m, n), count = X.shape, len(Q)
    rest = kernels.copy(X, kernels.empty((m, n), "float64"))
    if columns:
        along = kernels.gemm(Q, X, kernels.empty((count, n), "float64"))
        return kernels.gemm(Q * -1.0, along, rest, transpose_a=True, beta=1)
    along = kernels.gemm(X, Q, kernels.empty((m, count), "float64"), transpose_b=True)
    return kernels.gemm(along * -1.0, Q, rest, beta=1)

"""The kernels on the CPU, by numpy and scipy.

scipy's wrappers take column-major matrices, so they are given the transposes, which is the same memory: the upper
triangle of a row-major matrix is the lower one of its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
from scipy import sparse
from scipy.linalg import blas, lapack
from threadpoolctl import threadpool_info

from frodctl.method.linalg import element_blocks

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Vector

    Matrix = np.ndarray[Any, np.dtype[Any]]

#: Above this n the length of syevd's workspace, 1 + 6n + 2n², is no 32-bit integer.
SYEVD_LIMIT = 32_764
_BLOCK = 1 << 16  # elements that are converted at a time: they stay in the cache
_TILE = 128  # rows and columns that are transposed, or added, at a time


class Host:
    """See `Kernels`."""

    name = "cpu"

    def identity(self) -> list[str]:
        pools = [f"{pool['internal_api']} {pool['num_threads']}" for pool in threadpool_info()]
        return ["cpu", f"numpy {np.__version__}", f"scipy {scipy.__version__}", *sorted(pools)]

    def synchronize(self) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, dtype)

    def buffer(self, nbytes: int) -> Matrix:
        return np.empty(nbytes, np.uint8)

    def ahead(self, arrays: Iterator[Matrix]) -> Iterator[Matrix]:
        return arrays

    @np.errstate(all="ignore")  # what is undefined may be NaN
    def put(self, X: Array, dtype: str | None = None) -> Array:
        return X if dtype is None else np.ascontiguousarray(X, dtype)

    def get(self, X: Array, out: Matrix | None = None) -> Any:
        return X if out is None else self.copy(X, out)

    @np.errstate(all="ignore")  # what is undefined may be NaN
    def copy(self, X: Matrix, out: Matrix) -> Matrix:
        if X.flags.c_contiguous or X.ndim != 2:
            np.copyto(out, X, casting="unsafe")
            return out
        for i in range(0, X.shape[0], _TILE):
            for j in range(0, X.shape[1], _TILE):
                out[i : i + _TILE, j : j + _TILE] = X[i : i + _TILE, j : j + _TILE]
        return out

    def gemm(
        self,
        A: Matrix,
        B: Matrix,
        out: Matrix,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        beta: float = 0,
    ) -> Matrix:
        if not A.size or not B.size:
            out *= out.dtype.type(beta)
            return out
        gemm = _of(blas, "gemm", out)
        return _into(
            out, gemm(1.0, B.T, A.T, beta=beta, c=out.T, trans_a=transpose_b, trans_b=transpose_a, overwrite_c=1)
        )

    def matmul(self, A: Matrix, B: Matrix, out: Matrix | None = None) -> Matrix:
        return np.matmul(A, B, out=out)

    @np.errstate(over="ignore")
    def csrmm(self, starts: Matrix, columns: Matrix, entries: Matrix, X: Matrix) -> Matrix:
        shape = len(starts) - 1, len(X)
        return np.asarray(sparse.csr_array((entries.astype(X.dtype), columns, starts), shape=shape) @ X)

    def syrk(self, X: Matrix, out: Matrix, *, beta: float = 0, rows: bool = False) -> Matrix:
        if not X.size:
            out *= out.dtype.type(beta)
            return out
        return _into(out, _of(blas, "syrk", out)(1.0, X.T, beta=beta, c=out.T, trans=rows, lower=1, overwrite_c=1))

    @np.errstate(all="ignore")  # what is undefined may be NaN
    def axpby(self, a: float, X: Matrix, b: float, out: Matrix) -> Matrix:
        for begin in range(0, len(X), _TILE):
            rows = slice(begin, begin + _TILE)
            mine, theirs = out[rows, begin:], X[rows, begin:]
            if b == 0:
                np.multiply(theirs, a, out=mine, casting="unsafe") if a != 1 else np.copyto(mine, theirs)
                continue
            if b != 1:
                mine *= b
            mine += theirs if a == 1 else theirs * out.dtype.type(a)
        return out

    def trmm(self, X: Matrix, R: Matrix, *, transpose: bool = False) -> Matrix:
        if not X.size:
            return X
        return _into(X, _of(blas, "trmm", X)(1.0, R.T, X.T, lower=1, trans_a=transpose, overwrite_b=1))

    def trsm(self, R: Matrix, X: Matrix) -> Matrix:
        if not X.size:
            return X
        return _into(X, _of(blas, "trsm", X)(1.0, R.T, X.T, side=1, lower=1, trans_a=1, overwrite_b=1))

    def potrf(self, A: Matrix) -> bool:
        if not len(A):
            return True
        found, info = _of(lapack, "potrf", A)(A.T, lower=1, clean=0, overwrite_a=1)
        _into(A, found)
        return bool(info == 0 and np.isfinite(A.diagonal()).all())

    def potri(self, R: Matrix) -> Matrix:
        if not len(R):
            return R
        return _into(R, _of(lapack, "potri", R)(R.T, lower=1, overwrite_c=1)[0])

    def trtri(self, R: Matrix) -> Matrix:
        if not len(R):
            return R
        return _into(R, _of(lapack, "trtri", R)(R.T, lower=1, overwrite_c=1)[0])

    def sygst(self, A: Matrix, R: Matrix) -> Matrix:
        return _into(A, _of(lapack, "sygst", A)(A.T, R.T, itype=2, lower=1, overwrite_a=1)[0])

    def syevd(self, A: Matrix) -> tuple[Vector, Matrix]:
        if not len(A):
            return np.empty(0), A
        if len(A) > SYEVD_LIMIT:  # numpy's LAPACK has 64-bit integers
            values, vectors = np.linalg.eigh(A, UPLO="U")
            return values.astype(np.float64), vectors.T
        values, vectors, info = _of(lapack, "syevd", A)(A.T, lower=1, overwrite_a=1)
        if info:
            raise np.linalg.LinAlgError("the eigenvalues did not converge")
        return values.astype(np.float64), vectors.T

    def syevr(self, A: Matrix, count: int) -> tuple[Vector, Matrix]:
        n = len(A)
        if 0 < count < n:
            options = {"range": "I", "lower": 1, "il": n - count + 1, "iu": n}
            values, vectors, found, _, info = _of(lapack, "syevr", A)(A.T, **options)
            if info == 0 and found == count:
                return values[:count][::-1].astype(np.float64), np.ascontiguousarray(vectors.T[:count][::-1])
        values, vectors = self.syevd(A)  # also where some of many equal ones were not told apart
        return values[::-1][:count].copy(), np.ascontiguousarray(vectors[::-1][:count])

    def eigvalsh(self, A: Matrix) -> Vector:
        return np.linalg.eigvalsh(A.T).astype(np.float64, copy=False)

    def svdvals(self, A: Matrix) -> Vector:
        return np.linalg.svd(A, compute_uv=False).astype(np.float64, copy=False)

    def svd(self, A: Matrix) -> tuple[Vector, Matrix]:
        _, values, rows = np.linalg.svd(A, full_matrices=False)
        return values.astype(np.float64), rows

    def qr(self, A: Matrix) -> Matrix:
        return np.asarray(np.linalg.qr(A, mode="r"))

    def inverse(self, A: Matrix) -> Matrix | None:
        # of the transpose by LU, in memory that is A's: solving for I is 4 times as fast as getri
        lu, pivots, info = _of(lapack, "getrf", A)(A.T, overwrite_a=1)
        if info:
            return None
        eye = np.zeros_like(A)
        np.fill_diagonal(eye, 1)
        found, _ = _of(lapack, "getrs", A)(lu, pivots, eye.T, overwrite_b=1)
        return found.T if np.isfinite(found).all() else None

    def row_dots(self, X: Matrix, Y: Matrix) -> Vector:
        dots: Vector = np.einsum("ij,ij->i", X, Y).astype(np.float64)
        return dots

    def norms(self, X: Matrix, axis: int) -> Vector:
        squares: Vector = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", X, X, dtype=np.float64)
        return np.sqrt(squares)

    def norm(self, X: Matrix) -> float:
        squares = 0.0
        for rows in element_blocks(X.shape, _BLOCK):
            part: Matrix = X[rows].astype("float64" if X.dtype == np.float64 else "float32").ravel()
            squares += float(np.einsum("i,i->", part, part))
        if 1e-30 < squares < 1e30:
            return math.sqrt(squares)
        peak = float(np.abs(X).max()) if X.size else 0.0
        if not 0 < peak < math.inf:
            return peak
        return peak * float(np.linalg.norm(X.astype(np.float64) / peak))

    def add_diagonal(self, A: Matrix, x: float) -> Matrix:
        A.reshape(-1)[:: len(A) + 1] += A.dtype.type(x)
        return A

    def mirror(self, A: Matrix) -> Matrix:
        for begin in range(0, len(A), _TILE):
            end = begin + _TILE
            for j in range(end, len(A), _TILE):
                A[j : j + _TILE, begin:end] = A[begin:end, j : j + _TILE].T
            corner = A[begin:end, begin:end]
            corner[:] = np.triu(corner) + np.triu(corner, 1).T
        return A

    def transpose(self, A: Matrix) -> Matrix:
        return self.copy(A.T, np.empty(A.shape[::-1], A.dtype))


def _of(library: Any, routine: str, X: Matrix) -> Any:
    """The routine for X's dtype."""
    return getattr(library, ("d" if X.dtype == np.float64 else "s") + routine)


def _into(out: Matrix, found: Matrix) -> Matrix:
    """``out``, which scipy has overwritten; or copied, where its memory was not column by column."""
    if found.ctypes.data != out.ctypes.data:
        out.T[:] = found
    return out

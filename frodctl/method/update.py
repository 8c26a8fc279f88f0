"""The fine-tuned weight, from the base weight, the shared basis and what was trained.

With B = W V⁻ᵀ, λ_k = ‖B[:, k]‖, U[:, k] = B[:, k]/λ_k and M = diag(λ') + S there are two forms::

    reconstruct   W' = U (diag(λ') + S) Vᵀ
    delta         W' = W + U (diag(λ' − λ) + S) Vᵀ

which are equal but for rounding: PEFT trains the first, with U, λ' and S rounded to the model's dtype; frodctl
the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from frodctl.arrays import NAMED, dtype_name, epsilon
from frodctl.method.cost import UPDATE_ROWS
from frodctl.method.dual import ROUNDED_AFTERWARDS, TO_A_MILLIONTH, Dual
from frodctl.method.linalg import Scratch, row_blocks

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Kernels, Vector

#: U is 0 in directions where ‖B[:, k]‖ is no more, as peft 0.21 has it: whatever W's scale.
_PEFT_NULL = 1e-12
#: `Factors` multiplies in float32 where no λ is smaller, relative to the largest.
_FACTORS_SHARE = 1e-2

#: W' − W is computed in float32 where its error, cond(V) ‖diag(λ)⁻¹M‖₂ ε ‖W‖ at most, is rounding of W itself.
_AMPLIFICATION = 4

#: Consecutive rows of a weight, and their values. Valid until the next.
Blocks: TypeAlias = "Iterator[tuple[slice, Array]]"


class CsrPattern(NamedTuple):
    """The positions of S and, after them, of the diagonal, in the order of compressed sparse rows; int64."""

    rows: HostArray  #: of each entry, (nnz + n,)
    starts: HostArray  #: where each row starts, (n + 1,)
    columns: HostArray  #: of each entry, (nnz + n,)
    order: HostArray  #: each entry's place before, (nnz + n,)


class Core(NamedTuple):
    """diag(row_scales) M, or its transpose, in compressed sparse rows."""

    starts: HostArray
    columns: HostArray
    entries: Vector


class CategoryUpdate:
    """V of one category and its sparse pattern, made ready to update the category's weights one by one.

    Parameters
    ----------
    V : HostArray, (n, n), floating point
        The shared basis as stored. Its dtype is the one that PEFT's operator is rounded to.
    indices : HostArray, (2, nnz), int64
        Rows and columns of S. A position that is given twice counts twice.
    kernels : Kernels
        Where to compute.
    held_in : {"float32", "bfloat16", "float16"}, optional
        What V and V⁻ᵀ are rounded to, each once, where a layer was trained with such copies of them: then that is
        the operator which was trained.
    """

    def __init__(self, V: HostArray, indices: HostArray, kernels: Kernels, held_in: str | None = None) -> None:
        self.n = len(V)
        self.dtype = dtype_name(V)
        self.kernels = kernels
        self.scratch = Scratch(kernels)
        self.work = "float64" if self.dtype == "float64" else "float32"
        # copies that were trained with are those of the exact inverse
        dual = Dual.of(V, kernels, None if held_in else ROUNDED_AFTERWARDS)
        self.precision = dual.work(ROUNDED_AFTERWARDS)  #: of the products W V⁻ᵀ
        self._condition = dual.condition
        self.Vt = kernels.copy(kernels.put(dual.V, held_in).T, kernels.empty((self.n, self.n), self.work))
        copies = kernels.put(kernels.put(dual.inverse, held_in), "float32") if held_in else dual.inverse
        self._inverses = {dtype_name(copies): copies}
        self.indices = indices
        self.patterns: dict[bool, CsrPattern] = {}  #: of M, and of Mᵀ

    def reconstruct(self, W: HostArray, scales: HostArray, values: HostArray) -> Blocks:
        """W' = U (diag(λ') + S) Vᵀ as PEFT trains it: W, U, λ' and S rounded to V's dtype, W' not yet rounded.

        Parameters
        ----------
        W : HostArray, (m, n), floating point
        scales : HostArray, (n,)
            λ'.
        values : HostArray, (nnz,)
            The values of S at the pattern's positions.

        Yields
        ------
        rows, block : slice and Array, float32 (float64 for a float64 V)
            Rows of W', from the first to the last.
        """
        stored = NAMED[self.dtype]
        tall = _is_tall(W)
        B, norms = self._project(W, self.dtype)
        self._round_to_units(B, _reciprocal(norms, _PEFT_NULL), tall)
        return self._times_core(B, self._core(scales.astype(stored), values.astype(stored), None, tall), tall)

    def delta(self, W: HostArray, scales: HostArray, values: HostArray, base_scales: HostArray | None = None) -> Blocks:
        """W' − W = W V⁻ᵀ diag(λ)⁻¹ (diag(λ' − λ) + S) Vᵀ, not rounded to a 16-bit dtype anywhere.

        Parameters
        ----------
        W : HostArray, (m, n), floating point
        scales, values : HostArray, (n,) and (nnz,)
            λ' and S, as in `reconstruct`.
        base_scales : HostArray, (n,), optional
            λ; rows where it is 0 drop out. By default the column norms of W V⁻ᵀ, for λ' − λ those norms rounded to V's
            dtype, where PEFT begins, and rows drop out where they are rounding of W V⁻ᵀ.

        Yields
        ------
        rows, block : slice and Array, float32 (float64 for a float64 V)
            Rows of W' − W, from the first to the last.
        """
        tall, dtype = _is_tall(W), dtype_name(W)
        if base_scales is None:
            B, norms = self._project(W, dtype)
            start, inverses = norms.astype(NAMED[self.dtype]), _reciprocal(norms, self._rounding(W))
        else:
            start, inverses = base_scales, _reciprocal(base_scales.astype(np.float64), 0)
        M = self._core(scales.astype(np.float64) - start.astype(np.float64), values, inverses, tall)
        if base_scales is not None:
            in_float32 = self.work == "float32" and self._amplifies_little(M)
            inverse = self.inverse("float32" if in_float32 else self.precision)
            if tall and in_float32:
                return self._times_square(W, M, inverse)
            B = self._product(W, dtype, inverse)
        return self._times_core(B, M, tall)

    def base_scales(self, W: HostArray) -> HostArray:
        """λ (n,) where PEFT begins: the column norms of W V⁻ᵀ, W and they rounded to V's dtype; float32."""
        return self._project(W, self.dtype)[1].astype(NAMED[self.dtype]).astype(np.float32)

    def _project(self, W: HostArray, dtype: str) -> tuple[Array, Vector]:
        """B of `_product`, and the norms (n,) of W V⁻ᵀ's columns."""
        B = self._product(W, dtype, self.inverse(self.precision))
        return B, self.kernels.norms(B, axis=0 if _is_tall(W) else 1)

    def _product(self, W: HostArray, dtype: str, inverse: Array) -> Array:
        """B = W V⁻ᵀ (m, n) for W rounded to ``dtype``, in the inverse's.

        Where W is not tall it is Bᵀ: M times that costs less than M times Vᵀ.
        """
        kernels, (m, n), work = self.kernels, W.shape, dtype_name(inverse)
        if not _is_tall(W):
            B = self.scratch.empty("B", (n, m), work)
            return kernels.gemm(inverse, self._cast(W, dtype, work), B, transpose_b=True)
        B = self.scratch.empty("B", (m, n), work)
        for rows in row_blocks(m, UPDATE_ROWS):
            kernels.gemm(self._cast(W[rows], dtype, work), inverse, B[rows], transpose_b=True)
        return B

    def _cast(self, W: HostArray, dtype: str, work: str) -> Array:
        """W rounded to ``dtype``, on the device and ready to be multiplied."""
        kernels, shape = self.kernels, W.shape
        rounded = W if dtype_name(W) == dtype else kernels.copy(W, self.scratch.empty("rounded", shape, dtype))
        return kernels.copy(rounded, self.scratch.empty("factor", shape, work))

    def _amplifies_little(self, M: Core) -> bool:
        """Whether rounding in W V⁻ᵀ M Vᵀ, M with its rows scaled, is no more than that of W."""
        sizes = np.abs(M.entries)
        rows = np.add.reduceat(sizes, M.starts[:-1]).max()  # none is empty: it has its diagonal
        columns = np.bincount(M.columns, sizes).max()
        return bool(self._condition * np.sqrt(rows * columns) <= _AMPLIFICATION)  # ‖M‖₂² ≤ ‖M‖₁ ‖M‖_∞

    def inverse(self, dtype: str) -> Array:
        """V⁻¹, kept in each dtype in which it is needed."""
        if dtype not in self._inverses:
            self._inverses[dtype] = self.kernels.put(next(iter(self._inverses.values())), dtype)
        return self._inverses[dtype]

    def _round_to_units(self, B: Array, inverses: Vector, tall: bool) -> None:
        """Turn B into U, rounded to V's dtype."""
        factors = self.kernels.put(inverses if tall else inverses[:, None], self.precision)
        for rows in row_blocks(len(B), UPDATE_ROWS):
            unit = B[rows]
            unit *= factors if tall else factors[rows]
            for dtype in ("float32", self.dtype, self.precision):  # float32 first and then V's dtype, as PEFT does
                if dtype_name(unit) != dtype:
                    out = B[rows] if dtype == self.precision else self.scratch.empty(dtype, tuple(unit.shape), dtype)
                    unit = self.kernels.copy(unit, out)

    def _rounding(self, W: HostArray) -> Vector:
        """What the column norms (n,) of W V⁻ᵀ are at most where they should be 0."""
        rounding = epsilon(self.precision) * self.kernels.norm(W)
        return self.kernels.norms(self.inverse(self.precision), axis=1) * rounding

    def _core(self, diagonal: HostArray, values: HostArray, row_scales: Vector | None, tall: bool) -> Core:
        """diag(row_scales) (diag(diagonal) + S); its transpose where W is not tall."""
        rows, starts, columns, order = self._pattern(tall)
        if not len(values):  # nothing off the diagonal was trained
            values = np.zeros(self.indices.shape[1])
        entries = np.concatenate([values.astype(np.float64), diagonal.astype(np.float64)])[order]
        if row_scales is not None:
            entries *= row_scales[rows if tall else columns]
        return Core(starts, columns, entries)

    def _times_square(self, W: HostArray, M: Core, inverse: Array) -> Blocks:
        """Rows of W (V⁻ᵀ M Vᵀ): for a tall W that is less work than (W V⁻ᵀ)(M Vᵀ)."""
        kernels = self.kernels
        K = kernels.csrmm(*M, self.Vt)
        E = kernels.gemm(inverse, K, self.scratch.empty("E", (self.n, self.n), self.work), transpose_a=True)
        for rows in row_blocks(len(W), UPDATE_ROWS):
            X = self._cast(W[rows], dtype_name(W), self.work)
            yield rows, kernels.gemm(X, E, self.scratch.empty("product", tuple(X.shape), self.work))

    def _times_core(self, B: Array, M: Core, tall: bool) -> Blocks:
        """Rows of B M Vᵀ; B and M are transposed where W is not tall."""
        kernels = self.kernels
        if not tall:
            Y = kernels.csrmm(*M, self._in_work(B))
            product = self.scratch.empty("product", (B.shape[1], self.n), self.work)
            yield slice(0, len(product)), kernels.gemm(Y, self.Vt, product, transpose_a=True)
            return
        K = kernels.csrmm(*M, self.Vt)
        for block in row_blocks(len(B), UPDATE_ROWS):
            X = self._in_work(B[block])
            yield block, kernels.gemm(X, K, self.scratch.empty("product", tuple(X.shape), self.work))

    def _in_work(self, B: Array) -> Array:
        if dtype_name(B) == self.work:
            return B
        return self.kernels.copy(B, self.scratch.empty("factor", tuple(B.shape), self.work))

    def _pattern(self, tall: bool) -> CsrPattern:
        if tall not in self.patterns:
            self.patterns[tall] = csr_pattern(self.indices if tall else self.indices[::-1], self.n)
        return self.patterns[tall]


class Factors:
    """U and λ of one weight after another, with V inverted once.

    The product W V⁻ᵀ is taken in float32 where that gives U to about 1e-6: where V is well conditioned and the weight
    has a share in each of its directions. Else in float64.

    Parameters
    ----------
    V : Array, (n, n), floating point
    kernels : Kernels
        Where to compute.
    """

    def __init__(self, V: Array, kernels: Kernels) -> None:
        self.kernels = kernels
        dual = Dual.of(V, kernels)
        self.inverse = dual.inverse
        self._rounded = kernels.put(dual.inverse, "float32") if dual.work(TO_A_MILLIONTH) == "float32" else None

    def __call__(self, W: Array) -> tuple[Array, Array]:
        """U (m, n) in the dtype of W (m, n), 0 where λ ≤ 1e-12 as in PEFT, and λ (n,) in float32."""
        U, norms = self._exact(W)
        return self.kernels.put(U, dtype_name(W)), self.kernels.put(norms, "float32")

    def _exact(self, W: Array) -> tuple[Array, Vector]:
        """U (m, n) in float32, not rounded yet, and λ (n,)."""
        kernels = self.kernels
        if self._rounded is not None:
            B = self._product(W, self._rounded)
            norms = kernels.norms(B, axis=0)
            if norms.min() > max(_PEFT_NULL, _FACTORS_SHARE * norms.max()):
                B /= kernels.put(norms, "float32")
                return B, norms
        B = self._product(W, self.inverse)
        norms = kernels.norms(B, axis=0)
        B *= kernels.put(_reciprocal(norms, _PEFT_NULL))
        return kernels.put(B, "float32"), norms

    def _product(self, W: Array, inverse: Array) -> Array:
        kernels, dtype = self.kernels, dtype_name(inverse)
        X = kernels.copy(W, kernels.empty(tuple(W.shape), dtype))
        return kernels.gemm(X, inverse, kernels.empty(tuple(W.shape), dtype), transpose_b=True)


def csr_pattern(indices: HostArray, n: int) -> CsrPattern:
    """The positions of S (2, nnz) and, after them, of the diagonal, in the order of compressed sparse rows."""
    rows, columns = np.concatenate([indices, np.broadcast_to(np.arange(n), (2, n))], axis=1)
    order = np.argsort(rows * n + columns, kind="stable")
    rows, columns = rows[order], columns[order]
    starts = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n), out=starts[1:])
    return CsrPattern(rows, starts, columns, order)


def _is_tall(W: HostArray) -> bool:
    m, n = W.shape
    return bool(m > n)


def _reciprocal(x: Vector, threshold: float | Vector) -> Vector:
    return np.divide(1, x, out=np.zeros_like(x), where=x > threshold)

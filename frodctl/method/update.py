"""The fine-tuned weight, from the base weight, the shared basis and what was trained.

With B = W V⁻ᵀ, λ_k = ‖B[:, k]‖, U[:, k] = B[:, k]/λ_k and M = diag(λ') + S there are two forms::

    reconstruct   W' = U (diag(λ') + S) Vᵀ
    delta         W' = W + U (diag(λ' − λ) + S) Vᵀ

which are equal but for rounding: PEFT trains the first, with U, λ' and S rounded to the model's dtype; frodctl
the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch

from frodctl.method.dual import ROUNDED_AFTERWARDS, TO_A_MILLIONTH, Dual
from frodctl.method.linalg import Scratch, full_float32, rough_norm

if TYPE_CHECKING:
    from frodctl.arrays import Array, DType

#: U is 0 in directions where ‖B[:, k]‖ is no more, as peft 0.21 has it: whatever W's scale.
_PEFT_NULL = 1e-12
#: `Factors` multiplies in float32 where no λ is smaller, relative to the largest.
_FACTORS_SHARE = 1e-2

#: Rows of the result that are computed at a time.
_BLOCK_ROWS = 1024

#: Consecutive rows of a weight, and their values. Valid until the next.
Blocks: TypeAlias = "Iterator[tuple[slice, Array]]"


class CategoryUpdate:
    """V of one category and its sparse pattern, made ready to update the category's weights one by one.

    Parameters
    ----------
    V : Array, (n, n), floating point
        The shared basis as stored. Its dtype is the one that PEFT's operator is rounded to.
    indices : Array, (2, nnz), int64
        Rows and columns of S. A position that is given twice counts twice.
    device : torch.device
        Where to compute.
    held_in : DType, optional
        What V and V⁻ᵀ are rounded to, each once, where a layer was trained with such copies of them: then that is
        the operator which was trained.
    """

    def __init__(self, V: Array, indices: Array, device: torch.device, held_in: DType | None = None) -> None:
        self.n = len(V)
        self.dtype = V.dtype
        self.scratch = Scratch(device)
        self.work = torch.float64 if V.dtype == torch.float64 else torch.float32
        dual = Dual.of(V, device)
        exact, D = (dual.V, dual.D) if held_in is None else (dual.V.to(held_in), dual.D.to(held_in))
        self.Vt = exact.to(self.work).T.contiguous()
        self.D = D.to(dual.work(ROUNDED_AFTERWARDS))
        self.rows, self._row_starts, self._columns, self._order = csr_pattern(indices.to(device), self.n)

    def reconstruct(self, W: Array, scales: Array, values: Array) -> Blocks:
        """W' = U (diag(λ') + S) Vᵀ as PEFT trains it: W, U, λ' and S rounded to V's dtype, W' not yet rounded.

        Parameters
        ----------
        W : Array, (m, n), floating point
        scales : Array, (n,)
            λ'.
        values : Array, (nnz,)
            The values of S at the pattern's positions.

        Yields
        ------
        rows, block : slice and Array, float32 (float64 for a float64 V)
            Rows of W', from the first to the last.
        """
        B, norms = self._project(W, self.dtype)
        K = self._core(scales.to(self.dtype), values.to(self.dtype), None)
        columns = _reciprocal(norms, _PEFT_NULL).to(B)
        for rows in _row_blocks(len(W)):
            # float32 first and then V's dtype, as PEFT rounds U
            U = self.scratch.cast("unit", B[rows].mul_(columns), torch.float32)
            U = self.scratch.cast("rounded", U, self.dtype)
            yield rows, self._product(U, K)

    def delta(self, W: Array, scales: Array, values: Array, base_scales: Array | None = None) -> Blocks:
        """W' − W = W V⁻ᵀ diag(λ)⁻¹ (diag(λ' − λ) + S) Vᵀ, not rounded to a 16-bit dtype anywhere.

        Parameters
        ----------
        W : Array, (m, n), floating point
        scales, values : Array, (n,) and (nnz,)
            λ' and S, as in `reconstruct`.
        base_scales : Array, (n,), optional
            λ; rows where it is 0 drop out. By default the column norms of W V⁻ᵀ, for λ' − λ those norms rounded to V's
            dtype, where PEFT begins, and rows drop out where they are rounding of W V⁻ᵀ.

        Yields
        ------
        rows, block : slice and Array, float32 (float64 for a float64 V)
            Rows of W' − W, from the first to the last.
        """
        B, norms = self._project(W, W.dtype)
        start = norms.to(self.dtype) if base_scales is None else base_scales
        divisors = norms if base_scales is None else base_scales.to(norms)
        rounding = self._rounding(W) if base_scales is None else norms.new_zeros(())
        change = scales.to(norms) - start.to(norms)
        K = self._core(change, values, _reciprocal(divisors, rounding))
        for rows in _row_blocks(len(W)):
            yield rows, self._product(B[rows], K)

    def base_scales(self, W: Array) -> Array:
        """λ (n,) where PEFT begins: the column norms of W V⁻ᵀ, W and they rounded to V's dtype; float32."""
        return self._project(W, self.dtype)[1].to(self.dtype).float().cpu()

    def _project(self, W: Array, dtype: DType) -> tuple[Array, Array]:
        """B = W V⁻ᵀ (m, n) for W rounded to ``dtype``, and B's column norms (n,) in float64."""
        B = self.scratch.empty("B", (len(W), self.n), self.D.dtype)
        for rows in _row_blocks(len(W)):
            X = self.scratch.cast("rows", W[rows].to(dtype), self.D.dtype).to(B.device)
            with full_float32():
                torch.mm(X, self.D, out=B[rows])
        return B, torch.linalg.vector_norm(B, dim=0, dtype=torch.float64)  # float32's squares underflow from 1e-19 on

    def _rounding(self, W: Array) -> Array:
        """What the column norms (n,) of W V⁻ᵀ are at most where they should be 0, float64."""
        lengths: Array = torch.linalg.vector_norm(self.D.double(), dim=0)
        return lengths * (torch.finfo(self.D.dtype).eps * rough_norm(W))

    def _core(self, diagonal: Array, values: Array, row_scales: Array | None) -> Array:
        """(diag(diagonal) + S) Vᵀ (n, n), its rows scaled."""
        if not len(values):  # nothing off the diagonal was trained
            values = self.Vt.new_zeros(len(self._order) - self.n)
        entries = torch.cat([values.to(self.Vt), diagonal.to(self.Vt)])[self._order]
        if row_scales is not None:
            entries *= row_scales.to(entries)[self.rows]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            M = torch.sparse_csr_tensor(
                self._row_starts, self._columns, entries, (self.n, self.n), check_invariants=False
            )
        K = self.scratch.empty("K", (self.n, self.n), self.work)
        return torch.addmm(K, M, self.Vt, beta=0, out=K)

    def _product(self, X: Array, K: Array) -> Array:
        X = self.scratch.cast("factor", X, self.work)
        out = self.scratch.empty("product", (len(X), self.n), self.work)
        with full_float32():
            return torch.mm(X, K, out=out)


class Factors:
    """U and λ of one weight after another, with V inverted once.

    The product W V⁻ᵀ is taken in float32 where that gives U to about 1e-6: where V is well conditioned and the weight
    has a share in each of its directions. Else in float64.

    Parameters
    ----------
    V : Array, (n, n), floating point
    device : torch.device
        Where to compute.
    """

    def __init__(self, V: Array, device: torch.device) -> None:
        dual = Dual.of(V, device)
        self.D = dual.D
        self._rounded = self.D.float() if dual.work(TO_A_MILLIONTH) == torch.float32 else None

    def __call__(self, W: Array) -> tuple[Array, Array]:
        """U (m, n) in the dtype of W (m, n), 0 where λ ≤ 1e-12 as in PEFT, and λ (n,) in float32."""
        W = W.detach().to(self.D.device)
        if self._rounded is not None:
            with full_float32():
                B = W.float() @ self._rounded
            norms = torch.linalg.vector_norm(B, dim=0)
            if norms.min() > max(_PEFT_NULL, _FACTORS_SHARE * norms.max()):
                return B.div_(norms).to(W.dtype), norms
        B = W.double() @ self.D
        norms = torch.linalg.vector_norm(B, dim=0)
        return B.mul_(_reciprocal(norms, _PEFT_NULL)).float().to(W.dtype), norms.float()


def _row_blocks(m: int) -> list[slice]:
    return [slice(begin, min(begin + _BLOCK_ROWS, m)) for begin in range(0, m, _BLOCK_ROWS)]


def csr_pattern(indices: Array, n: int) -> tuple[Array, Array, Array, Array]:
    """The positions of S and, after them, of the diagonal, in the order of compressed sparse rows.

    Returns the row of each entry, where each row starts, the column of each entry, and the order itself.
    """
    diagonal = torch.arange(n, device=indices.device)
    rows, columns = torch.cat([indices, diagonal.expand(2, n)], dim=1)
    order = torch.argsort(rows * n + columns, stable=True)
    rows, columns = rows[order], columns[order]
    starts = torch.zeros(n + 1, dtype=torch.int64, device=indices.device)
    starts[1:] = torch.cumsum(torch.bincount(rows, minlength=n), 0)
    return rows, starts, columns, order


def _reciprocal(x: Array, threshold: float | Array) -> Array:
    return torch.where(x > threshold, 1 / x, 0)

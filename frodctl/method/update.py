"""The fine-tuned weight, from the base weight, the shared basis and what was trained.

With B = W V⁻ᵀ, λ_k = ‖B[:, k]‖, U[:, k] = B[:, k]/λ_k and M = diag(λ') + S there are two forms::

    reconstruct   W' = U (diag(λ') + S) Vᵀ
    delta         W' = W + U (diag(λ' − λ) + S) Vᵀ

which are equal but for rounding: PEFT trains the first, with U, λ' and S rounded to the model's dtype; frodctl
the second.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from frodctl.method.linalg import Scratch, full_float32, spectral_norm

#: U is 0 in directions where ‖B[:, k]‖ is no more (as in peft 0.21).
_NULL = 1e-12
#: The product W V⁻ᵀ is taken in float32 for a bfloat16 V no narrower and no worse conditioned than this. There about
#: one entry of U in 4,000 is then rounded to the other neighbour, which only a small matrix would feel.
_FLOAT32_WIDTH = 512
_FLOAT32_CONDITION = 16


class CategoryUpdate:
    """V of one category and its sparse pattern, made ready to update the category's weights one by one.

    Parameters
    ----------
    V : Tensor, (n, n), floating point
        The shared basis as stored. Its dtype is the one that PEFT's operator is rounded to.
    indices : Tensor, (2, nnz), int64
        Rows and columns of S. A position that is given twice counts twice.
    scratch : Scratch
        Memory for the products, which may be shared with other categories; it says the device.
    """

    def __init__(self, V: Tensor, indices: Tensor, scratch: Scratch) -> None:
        self.n = len(V)
        self.dtype = V.dtype
        self.scratch = scratch
        self.work = torch.float64 if V.dtype == torch.float64 else torch.float32
        exact = V.to(scratch.device, torch.float64)
        dual, condition = dual_basis(exact)
        in_float32 = V.dtype == torch.bfloat16 and self.n >= _FLOAT32_WIDTH and condition <= _FLOAT32_CONDITION
        self.D = dual.to(torch.float32 if in_float32 else torch.float64)
        self.Vt = exact.to(self.work).T.contiguous()
        self.rows, self._row_starts, self._columns, self._order = csr_pattern(indices.to(scratch.device), self.n)

    def reconstruct(self, W: Tensor, scales: Tensor, values: Tensor) -> Tensor:
        """W' = U (diag(λ') + S) Vᵀ as PEFT trains it: W, U, λ' and S rounded to V's dtype, W' not yet rounded.

        Parameters
        ----------
        W : Tensor, (m, n), floating point
        scales : Tensor, (n,)
            λ'.
        values : Tensor, (nnz,)
            The values of S at the pattern's positions.

        Returns
        -------
        Tensor, (m, n), float32 (float64 for a float64 V)
            Valid until the next call.
        """
        B, norms = self._project(W.to(self.dtype))
        U = self._unit_columns(B, norms)
        U = self.scratch.cast("rounded", U, self.dtype)
        K = self._core(scales.to(self.dtype), values.to(self.dtype), None)
        return self._product(self.scratch.cast("U", U, self.work), K)

    def delta(self, W: Tensor, scales: Tensor, values: Tensor, base_scales: Tensor | None = None) -> Tensor:
        """W' − W = W V⁻ᵀ diag(λ)⁻¹ (diag(λ' − λ) + S) Vᵀ, not rounded to a 16-bit dtype anywhere.

        Parameters
        ----------
        W : Tensor, (m, n), floating point
        scales, values : Tensor, (n,) and (nnz,)
            λ' and S, as in `reconstruct`.
        base_scales : Tensor, (n,), optional
            λ. By default the column norms of W V⁻ᵀ, and for λ' − λ those norms rounded to V's dtype, where PEFT
            begins.

        Returns
        -------
        Tensor, (m, n), float32 (float64 for a float64 V)
            Valid until the next call.
        """
        B, norms = self._project(W)
        start = norms.to(self.dtype) if base_scales is None else base_scales
        divisors = norms if base_scales is None else base_scales.to(norms)
        change = scales.to(norms) - start.to(norms)
        K = self._core(change, values, _reciprocal(divisors, _NULL if base_scales is None else 0))
        return self._product(self.scratch.cast("U", B, self.work), K)

    def _project(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """B = W V⁻ᵀ (m, n) and its column norms (n,) in float64."""
        X = self.scratch.cast("W", W, self.D.dtype)
        B = self.scratch.empty("B", (len(W), self.n), self.D.dtype)
        with full_float32():
            torch.mm(X.to(self.scratch.device), self.D, out=B)
        return B, torch.linalg.vector_norm(B, dim=0).double()

    def _unit_columns(self, B: Tensor, norms: Tensor) -> Tensor:
        """U, rounded to float32 first as PEFT rounds it."""
        return self.scratch.cast("U", B.mul_(_reciprocal(norms, _NULL).to(B)), torch.float32)

    def _core(self, diagonal: Tensor, values: Tensor, row_scales: Tensor | None) -> Tensor:
        """(diag(diagonal) + S) Vᵀ (n, n), its rows scaled."""
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

    def _product(self, X: Tensor, K: Tensor) -> Tensor:
        out = self.scratch.empty("product", (len(X), self.n), self.work)
        with full_float32():
            return torch.mm(X, K, out=out)


def dual_basis(V: Tensor) -> tuple[Tensor, float]:
    """V⁻ᵀ and cond(V), for float64; where V is singular the pseudo-inverse's transpose and infinity."""
    inverse, failed = torch.linalg.inv_ex(V)
    if failed or not torch.isfinite(inverse).all():
        return torch.linalg.pinv(V, rtol=1e-6).T, float("inf")
    return inverse.T, spectral_norm(V) * spectral_norm(inverse)


def csr_pattern(indices: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _reciprocal(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x > threshold, 1 / x, 0)

"""The products under a trained layer, with their gradients: only V, D and the pattern's positions are ever kept.

Q = s diag(λ)⁻¹ (S + diag(λ' − λ)) is the sparse matrix of a layer, given by its ``entries``. The same layer in two
forms, both exactly the base layer where Q = 0::

    input side    W (x + D Q Vᵀ x)          any W, a few products per token
    weight        (W + W D Q Vᵀ) x          a dense W, fewer products per token, more per layer

and W' = W + W D Q Vᵀ itself, where a model multiplies by a layer's weight instead of calling the layer.

Autograd on its own would keep the dense Q, or a second W, of every layer until its backward pass, and would fill
all n² entries of Q's gradient; so each form is a function of its own.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CSR_DTYPES = (torch.float32, torch.float64)
_BLOCK = 256  # rows


class Positions(NamedTuple):
    """Where Q may differ from 0, in the order of compressed sparse rows (`frodctl.method.update.csr_pattern`)."""

    rows: Tensor  #: int64, one for each entry
    row_starts: Tensor  #: int64, (n + 1,)
    columns: Tensor  #: int64, one for each entry

    @property
    def n(self) -> int:
        return len(self.row_starts) - 1

    def csr(self, entries: Tensor) -> Tensor:
        """The matrix with these entries, in compressed sparse rows."""
        return torch.sparse_csr_tensor(self.row_starts, self.columns, entries, (self.n, self.n), check_invariants=False)

    def transposed_csc(self, entries: Tensor) -> Tensor:
        """Its transpose, in compressed sparse columns."""
        return torch.sparse_csc_tensor(self.row_starts, self.columns, entries, (self.n, self.n), check_invariants=False)

    def dense(self, entries: Tensor) -> Tensor:
        """The matrix with these entries; those of one position add up."""
        flat = torch.zeros(self.n * self.n, dtype=entries.dtype, device=entries.device)
        return flat.index_add_(0, self.rows * self.n + self.columns, entries).view(self.n, self.n)


def sparse_product(positions: Positions, entries: Tensor, X: Tensor, *, transposed: bool = False) -> Tensor:
    """Each row of X (k, n) times Qᵀ, or times Q if ``transposed``: (k, n), in X's dtype.

    Compressed rows on the CPU: at 1 % of the positions ten times as fast as a dense Q. Elsewhere, and where a graph
    is being captured, a dense Q.
    """
    if not _uses_csr(X):
        Q = positions.dense(entries).to(X.dtype)
        return X @ (Q if transposed else Q.T)
    dtype = X.dtype if X.dtype in _CSR_DTYPES else torch.float32
    Q = (positions.transposed_csc if transposed else positions.csr)(entries.to(dtype))
    # by blocks, which stay in the cache
    return torch.cat([(Q @ rows.to(dtype).T).T.to(X.dtype) for rows in torch.split(X, _BLOCK)])


def sampled_product(positions: Positions, A: Tensor, B: Tensor) -> Tensor:
    """The entries of A B at the positions, for A (n, k) and B (k, n); float32 for 16-bit A and B on the CPU."""
    if _uses_csr(A):
        wide = A.dtype if A.dtype in _CSR_DTYPES else torch.float32
        mask = positions.csr(torch.zeros(len(positions.rows), dtype=wide, device=A.device))
        sampled: Tensor = torch.sparse.sampled_addmm(mask, A.to(wide), B.to(wide), beta=0.0)
        return sampled.values()
    return (A @ B)[positions.rows, positions.columns]


def _uses_csr(X: Tensor) -> bool:
    return X.device.type == "cpu" and not torch.compiler.is_compiling()


def ignore_beta_warning() -> None:
    """Have torch say now, unheard, that its compressed sparse rows are in beta; it says so once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


def projected(X: Tensor, V: Tensor) -> Tensor:
    """X V (tokens, n) in V's dtype, for X (…, n). Differentiable in X; nothing is saved for the backward pass."""
    result: Tensor = _Projected.apply(X.reshape(-1, X.shape[-1]).to(V.dtype), V)  # type: ignore[no-untyped-call]
    return result


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, V: Tensor) -> Tensor:
        ctx.V = V  # not saved: a checkpoint counts what a layer saves, whichever layer it is that computes this
        with torch.autocast(X.device.type, enabled=False):
            return X @ V

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return gradients[0] @ ctx.V.T, None


def corrected(Z: Tensor, entries: Tensor, D: Tensor, positions: Positions) -> Tensor:
    """D Q z for every row z = Vᵀ x of Z (tokens, n), in the dtype that Z and D (n, n) share.

    Differentiable in Z and in ``entries``, (nnz + n,) of Q.
    """
    result: Tensor = _Corrected.apply(Z, entries, D, positions)  # type: ignore[no-untyped-call]
    return result


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Z: Tensor, entries: Tensor, D: Tensor, positions: Positions) -> Tensor:
        ctx.positions = positions
        ctx.save_for_backward(Z, entries, D)
        with torch.autocast(Z.device.type, enabled=False):
            return sparse_product(positions, entries, Z) @ D.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        Z, entries, D = ctx.saved_tensors
        of_Z = of_entries = None
        with torch.autocast(Z.device.type, enabled=False):
            G = gradients[0] @ D
            if ctx.needs_input_grad[0]:
                of_Z = sparse_product(ctx.positions, entries, G, transposed=True)
            if ctx.needs_input_grad[1]:
                of_entries = sampled_product(ctx.positions, G.T, Z).to(entries.dtype)
        return of_Z, of_entries, None, None


def weight_side(
    X: Tensor,
    entries: Tensor,
    W: Tensor,
    bias: Tensor | None,
    V: Tensor,
    D: Tensor,
    positions: Positions,
    transposed: bool,
) -> Tensor:
    """W' x + b for every x along X's last dimension, with W' = W + W D Q Vᵀ formed for this call.

    The product is the one that `torch.nn.Linear` takes, or transformers' Conv1D; autocast holds for it. W' is formed
    a second time for the backward pass rather than kept. Differentiable in X and in ``entries``, not in W:
    ∂L/∂Q = Bᵀ (∂L/∂W') V with B = W D, at the pattern's positions.

    Parameters
    ----------
    X : Tensor, (…, n)
    entries : Tensor, (nnz + n,)
        Of Q.
    W : Tensor, (m, n), or (n, m) if ``transposed``
    bias : Tensor, (m,), optional
    V, D : Tensor, (n, n)
        Of the dtype in which the change of W is computed.
    """
    result: Tensor = _WeightSide.apply(  # type: ignore[no-untyped-call]
        X, entries, W, bias, V, D, positions, transposed
    )
    return result


class _WeightSide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        entries: Tensor,
        W: Tensor,
        bias: Tensor | None,
        V: Tensor,
        D: Tensor,
        positions: Positions,
        transposed: bool,
    ) -> Tensor:
        ctx.positions, ctx.transposed = positions, transposed
        ctx.save_for_backward(X, entries, W, V, D)
        updated = updated_weight(W, entries, V, D, positions, transposed)
        if not transposed:
            return F.linear(X, updated, bias)
        rows = X.reshape(-1, X.shape[-1])
        y = rows @ updated if bias is None else torch.addmm(bias, rows, updated)
        return y.view(*X.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        X, entries, W, V, D = ctx.saved_tensors
        gradient = gradients[0]
        of_X = of_entries = None
        with torch.autocast(X.device.type, enabled=False):
            B = _dual_columns(W, D, ctx.transposed)
            if ctx.needs_input_grad[0]:
                updated = _updated(W, B, entries, V, ctx.positions, ctx.transposed).to(gradient.dtype)
                of_X = (gradient @ (updated.T if ctx.transposed else updated)).to(X.dtype)
            if ctx.needs_input_grad[1]:
                rows = X.reshape(-1, X.shape[-1]).to(gradient.dtype)
                of_W = gradient.reshape(-1, gradient.shape[-1]).T @ rows
                of_entries = sampled_product(ctx.positions, B.T @ of_W.to(V.dtype), V).to(entries.dtype)
        return of_X, of_entries, None, None, None, None, None, None


def trained_weight(W: Tensor, entries: Tensor, V: Tensor, D: Tensor, positions: Positions, transposed: bool) -> Tensor:
    """`updated_weight`, differentiable in W and in ``entries``."""
    result: Tensor = _TrainedWeight.apply(W, entries, V, D, positions, transposed)  # type: ignore[no-untyped-call]
    return result


class _TrainedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W: Tensor, entries: Tensor, V: Tensor, D: Tensor, positions: Positions, transposed: bool
    ) -> Tensor:
        ctx.positions, ctx.transposed = positions, transposed
        ctx.save_for_backward(W, entries, V, D)
        return updated_weight(W, entries, V, D, positions, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        W, entries, V, D = ctx.saved_tensors
        gradient = gradients[0].T if ctx.transposed else gradients[0]
        of_W = of_entries = None
        with torch.autocast(W.device.type, enabled=False):
            G = gradient.to(V.dtype)
            if ctx.needs_input_grad[0]:  # G (I + D Q Vᵀ)ᵀ
                through = G + sparse_product(ctx.positions, entries, G @ V) @ D.T
                of_W = (through.T if ctx.transposed else through).to(W.dtype)
            if ctx.needs_input_grad[1]:
                B = _dual_columns(W, D, ctx.transposed)
                of_entries = sampled_product(ctx.positions, B.T @ G, V).to(entries.dtype)
        return of_W, of_entries, None, None, None, None


def updated_weight(W: Tensor, entries: Tensor, V: Tensor, D: Tensor, positions: Positions, transposed: bool) -> Tensor:
    """W + W D Q Vᵀ, stored as W is and in its dtype, rounded once.

    Parameters
    ----------
    W : Tensor, (m, n), or (n, m) if ``transposed``
    entries : Tensor, (nnz + n,)
        Of Q.
    V, D : Tensor, (n, n)
        Of the dtype in which the change is computed.
    """
    with torch.autocast(W.device.type, enabled=False):
        return _updated(W, _dual_columns(W, D, transposed), entries, V, positions, transposed)


def _dual_columns(W: Tensor, D: Tensor, transposed: bool) -> Tensor:
    """B = W D (m, n)."""
    return (W.T if transposed else W).to(D.dtype) @ D


def _updated(W: Tensor, B: Tensor, entries: Tensor, V: Tensor, positions: Positions, transposed: bool) -> Tensor:
    """W + B Q Vᵀ, stored as W is."""
    Kt = sparse_product(positions, entries, V)  # (Q Vᵀ)ᵀ
    wide = W.to(B.dtype)
    result = torch.addmm(wide, Kt, B.T) if transposed else torch.addmm(wide, B, Kt.T)
    return result.to(W.dtype)

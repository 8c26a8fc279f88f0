"""The products under a trained layer, with their gradients.

Q = s diag(λ)⁻¹ (S + diag(λ' − λ)) is the sparse matrix of a layer, given by its ``entries``. The same layer in two
forms, both exactly the base layer where Q = 0::

    input side    W (x + D Q Vᵀ x)          any W, more products per token
    weight        (W + W D Q Vᵀ) x          a dense W, a few products of n² numbers for any number of tokens

Autograd on its own would keep the dense Q of every layer until its backward pass, and would fill all n² entries of
Q's gradient; so each form is a function of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CSR_DTYPES = (torch.float32, torch.float64)
_BLOCK = 256  # rows
_COLUMNS = 512  # that are multiplied at a time


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
    blocks = [(Q @ rows.to(dtype).T).T.to(X.dtype) for rows in torch.split(X, _BLOCK)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def core(positions: Positions, entries: Tensor, V: Tensor) -> Iterator[Tensor]:
    """Q Vᵀ (n, n) in V's dtype, by so many columns at a time; fastest where the columns of V are contiguous."""
    if not _uses_csr(V):
        yield positions.dense(entries).to(V.dtype) @ V.T
        return
    dtype = V.dtype if V.dtype in _CSR_DTYPES else torch.float32
    Q = positions.csr(entries.to(dtype))
    for columns in V.T.split(_COLUMNS, 1):
        yield (Q @ columns.to(dtype)).to(V.dtype)


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


class Keeper(Protocol):
    """Who keeps W' and waiting gradients for a layer: `frodctl.training.layer.Update`."""

    def kept_weight(self, W: Tensor, entries: Tensor, dtype: torch.dtype, form: Callable[[], Tensor]) -> Tensor:
        """W' of this dtype for these entries of Q; ``form`` forms it."""

    def whole_gradient(self, gradient: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What is to be projected now: ∂L/∂W' (m, n) with what has waited, or nothing."""


@dataclass(frozen=True)
class Factors:
    """What W' = W + W D Q Vᵀ is made from beside Q: W (m, n), or (n, m) if ``transposed``; V and D (n, n).

    V and D have the dtype in which the change of W is computed. ``B`` is W D (m, n) where that is kept.
    """

    W: Tensor
    V: Tensor
    D: Tensor
    positions: Positions
    transposed: bool
    B: Tensor | None = None

    def oriented(self, stored: Tensor) -> Tensor:
        """(m, n) of what is stored as W is, or the other way round."""
        return stored.T if self.transposed else stored

    def updated(self, entries: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W', stored as W is, rounded once to W's dtype or another one; by columns, so that no Q Vᵀ is whole."""
        result = torch.empty_like(self.W, dtype=dtype or self.W.dtype)
        at, axis = 0, 0 if self.transposed else 1
        with torch.autocast(self.W.device.type, enabled=False):
            left, inner = self._left()
            for K in core(self.positions, entries, self.V):
                right = K if inner is None else inner @ K
                factors = (right.T, left.T) if self.transposed else (left, right)
                part, target = (stored.narrow(axis, at, K.shape[1]) for stored in (self.W, result))
                target.copy_(_added(part, *factors))
                at += K.shape[1]
        return result

    def projected(self, gradient: Tensor) -> Tensor:
        """Bᵀ (∂L/∂W') V at the positions, the entries of ∂L/∂Q, for ∂L/∂W' (m, n)."""
        W, V, D, B = self._wide_W(), self.V, self.D, self.B
        with torch.autocast(W.device.type, enabled=False):
            G = gradient.to(V.dtype)
            if _is_tall(W):
                return sampled_product(self.positions, D.T @ (W.T @ G) if B is None else B.T @ G, V)
            columns = dual_columns(W, D) if B is None else B
            return sampled_product(self.positions, columns.T, (V.T @ G.T).T)

    def _left(self) -> tuple[Tensor, Tensor | None]:
        """B (m, n), or W and D, whose product it is, where W D (Q Vᵀ) takes less from the right."""
        if self.B is not None:
            return self.B, None
        W = self._wide_W()
        return (W, self.D) if _is_tall(W) else (dual_columns(W, self.D), None)

    def _wide_W(self) -> Tensor:
        return self.oriented(self.W).to(self.V.dtype)


def _added(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W + A B, in the dtype with more bits: W must not lose any before a small change is added."""
    if torch.promote_types(W.dtype, A.dtype) == A.dtype:
        return torch.addmm(W.to(A.dtype), A, B)
    return W + A @ B


def _is_tall(W: Tensor) -> bool:
    """Whether products of n × n matrices are the smaller ones."""
    return len(W) >= W.shape[1]


def dual_columns(W: Tensor, D: Tensor) -> Tensor:
    """B = W D (m, n), each of whose columns is contiguous."""
    return (D.T @ W.T).T


def trained_weight(factors: Factors, entries: Tensor, dtype: torch.dtype, keeper: Keeper | None = None) -> Tensor:
    """W' = W + W D Q Vᵀ, stored as W is, differentiable in W and in ``entries``.

    Parameters
    ----------
    factors : Factors
    entries : Tensor, (nnz + n,)
        Of Q.
    dtype : torch.dtype
        Of the result.
    keeper : Keeper, optional
        Who keeps W' and the gradients that are not to be projected yet.
    """
    result: Tensor = _TrainedWeight.apply(  # type: ignore[no-untyped-call]
        entries, factors.W, factors.V, factors.D, factors.B, factors.positions, factors.transposed, dtype, keeper
    )
    return result


class _TrainedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        entries: Tensor,
        W: Tensor,
        V: Tensor,
        D: Tensor,
        B: Tensor | None,
        positions: Positions,
        transposed: bool,
        dtype: torch.dtype,
        keeper: Keeper | None,
    ) -> Tensor:
        ctx.positions, ctx.transposed, ctx.keeper = positions, transposed, keeper
        ctx.save_for_backward(entries, W, V, D, B)
        factors = Factors(W, V, D, positions, transposed, B)
        if keeper is None:
            return factors.updated(entries, dtype)
        return keeper.kept_weight(W, entries, dtype, lambda: factors.updated(entries, dtype)).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entries, W, V, D, B = ctx.saved_tensors
        factors = Factors(W, V, D, ctx.positions, ctx.transposed, B)
        G = factors.oriented(gradients[0])
        of_entries = of_W = None
        if ctx.needs_input_grad[0]:
            whole = G if ctx.keeper is None else ctx.keeper.whole_gradient(G, factors.projected)
            of_entries = None if whole is None else factors.projected(whole).to(entries.dtype)
        if ctx.needs_input_grad[1]:  # G (I + D Q Vᵀ)ᵀ
            with torch.autocast(W.device.type, enabled=False):
                G = G.to(V.dtype)
                through = G + sparse_product(ctx.positions, entries, G @ V) @ D.T
                of_W = factors.oriented(through).to(W.dtype)
        return of_entries, of_W, None, None, None, None, None, None, None

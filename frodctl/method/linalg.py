"""The dense kernels under the joint basis: symmetric and triangular products at half their full cost.

torch has no syrk or trmm on the CPU, so these work by column blocks and skip the half that is known. They write
into tensors they are given: fresh ones would cost page faults, and holes in the heap, layer after layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from frodctl.arrays import Array, DType

#: Up to this size LAPACK is as fast as our own recursion.
_LEAF = 128


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 products float32, whatever the caller allows for speed elsewhere (TF32, bfloat16)."""
    backends: list[object] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    settings = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # torch 2.9 and newer
    if not settings:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    earlier = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, earlier, strict=True):
            setting.fp32_precision = value
        if not settings:
            torch.set_float32_matmul_precision(before)


class Scratch:
    """Memory that is used again: one block by name and dtype, as large as the largest request so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: dict[tuple[str, DType], Array] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: DType = torch.float64) -> Array:
        """A contiguous tensor whose contents are whatever was left there."""
        size = prod(shape)
        block = self.blocks.get((name, dtype))
        if block is None or block.numel() < size:
            block = self.blocks[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return block[:size].view(shape)

    def cast(self, name: str, X: Array, dtype: DType) -> Array:
        """X in another dtype; X itself where it has it already."""
        return X if X.dtype == dtype else self.empty(name, tuple(X.shape), dtype).copy_(X)


def _blocks(n: int) -> list[tuple[int, int]]:
    """Column ranges wide enough for full GEMM speed, narrow enough to skip most of the known half."""
    count = max(1, min(8, n // 192))
    edges = [round(i * n / count) for i in range(count + 1)]
    return list(pairwise(edges))


def add_gram_(total: Array, X: Array, *, beta: int = 1, lower: bool = False) -> Array:
    """Replace the upper triangle of ``total`` (n, n) by ``beta total`` + XᵀX, X (m, n) of the same dtype.

    What is below the diagonal is undefined then; see `mirror_`. ``lower`` says that X is lower triangular.
    """
    for begin, end in _blocks(X.shape[1]):
        rows = X[begin:] if lower else X
        total[:end, begin:end].addmm_(rows[:, :end].T, rows[:, begin:end], beta=beta)
    return total


def inverse_cholesky(A: Array, out: Array) -> Array:
    """L⁻¹ in ``out`` (n, n), lower triangular, for the symmetric positive definite A = LLᵀ (n, n).

    Only the upper triangle of A is read, and A is overwritten. By halves, so that most of it is matrix products:
    with A = [[A₁, B], [Bᵀ, A₂]], X₁ = L₁⁻¹ and C = X₁B, the Schur complement is A₂ − CᵀC = L₂L₂ᵀ, and
    L⁻¹ = [[X₁, 0], [−X₂CᵀX₁, X₂]].
    """
    n = len(A)
    if n <= _LEAF:
        eye = torch.eye(n, dtype=A.dtype, device=A.device)
        return out.copy_(torch.linalg.solve_triangular(torch.linalg.cholesky(A.T), eye, upper=False))
    half = -(-n // 32) * 16
    first, second = out[:half, :half], out[half:, half:]
    inverse_cholesky(A[:half, :half], first)
    C = first @ A[:half, half:]
    inverse_cholesky(A[half:, half:].addmm_(C.T, C, alpha=-1), second)
    out[:half, half:].zero_()
    out[half:, :half].addmm_(second, C.T @ first, beta=0, alpha=-1)
    return out


def mirror_(total: Array) -> Array:
    """Fill the lower triangle of ``total`` (n, n) from the upper one."""
    strict = total.triu(1)
    return total.triu_().add_(strict.T)


def times_upper(X: Array, P: Array, out: Array) -> Array:
    """X P for X (m, n) and upper triangular P (n, n), in ``out`` (m, n)."""
    for begin, end in _blocks(P.shape[0]):
        torch.mm(X[:, :end], P[:end, begin:end], out=out[:, begin:end])
    return out


def rough_norm(W: Array) -> float:
    """‖W‖_F to a few per cent, whatever W's scale; NaN or infinity where W holds such."""
    norm = float(torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)))
    if 1e-15 < norm < 1e15:
        return norm
    peak = float(W.abs().max()) if W.numel() else 0.0
    if not 0 < peak < float("inf"):
        return peak
    return peak * float(torch.linalg.vector_norm(W.double() / peak))


def spectral_norm(A: Array, steps: int = 12) -> float:
    """‖A‖₂ of A (n, n) by power iteration on AᵀA, from its largest column: a lower bound, mostly within a few %."""
    x = A[:, A.norm(dim=0).argmax()]
    for _ in range(steps):
        y = A @ (x / x.norm())
        x = A.T @ y
    return float((A @ (x / x.norm())).norm())

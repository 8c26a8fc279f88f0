"""The dense kernels under the joint basis: symmetric and triangular products at half their full cost.

torch has no syrk or trmm on the CPU, so these work by column blocks and skip the half that is known.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _blocks(n: int) -> list[tuple[int, int]]:
    """Column ranges wide enough for full GEMM speed, narrow enough to skip most of the known half."""
    count = max(1, min(8, n // 192))
    edges = [round(i * n / count) for i in range(count + 1)]
    return list(pairwise(edges))


def add_gram_(total: Tensor, X: Tensor) -> Tensor:
    """Add the upper block triangle of XᵀX to ``total`` (n, n), whose lower part is left undefined.

    The product is taken in X's dtype (X is (m, n)) and added in that of ``total``.
    """
    for begin, end in _blocks(X.shape[1]):
        total[:end, begin:end] += X[:, :end].T @ X[:, begin:end]
    return total


def mirror_(total: Tensor) -> Tensor:
    """Fill the lower triangle of ``total`` (n, n) from the upper one."""
    for begin, end in _blocks(total.shape[0]):
        total[begin:end, :begin] = total[:begin, begin:end].T
        block = total[begin:end, begin:end]
        block.copy_(block.triu() + block.triu(1).T)
    return total


def times_upper(X: Tensor, P: Tensor) -> Tensor:
    """X P for X (m, n) and upper triangular P (n, n)."""
    product = torch.empty_like(X)
    for begin, end in _blocks(P.shape[0]):
        torch.mm(X[:, :end], P[:end, begin:end], out=product[:, begin:end])
    return product


def spd_inverse(A: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix (n, n), by its Cholesky factor."""
    return torch.cholesky_inverse(torch.linalg.cholesky(A))


def spectral_norm(A: Tensor, steps: int = 20) -> float:
    """‖A‖₂ by power iteration on AᵀA from A's largest column: a lower bound, mostly within a few per cent."""
    x = A[:, A.norm(dim=0).argmax()]
    for _ in range(steps):
        y = A @ (x / x.norm())
        x = A.T @ y
    return float((A @ (x / x.norm())).norm())

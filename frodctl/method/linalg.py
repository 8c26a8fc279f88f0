"""What the method needs of linear algebra beyond single routines."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Kernels

_PROBES = 8
_STEPS = 5


class Scratch:
    """Memory that is used again: one block by name and dtype, as large as the largest request so far."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.blocks: dict[tuple[str, str], Array] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: str = "float64") -> Array:
        """A contiguous array whose contents are whatever was left there."""
        size = prod(shape)
        block = self.blocks.get((name, dtype))
        if block is None or len(block) < size:
            self.blocks.pop((name, dtype), None)
            block = self.blocks[name, dtype] = self.kernels.empty((size,), dtype)
        return block[:size].reshape(shape)


def spectral_norm_of_triangle(kernels: Kernels, R: Array) -> float:
    """‖R‖₂ of R (n, n) triangular, as `spectral_norm` finds it."""
    return spectral_norm(
        lambda X: kernels.trmm(X, R), lambda X: kernels.trmm(X, R, transpose=True), len(R), kernels, str(R.dtype)
    )


def spectral_norm(
    forward: Callable[[Array], Array], adjoint: Callable[[Array], Array], n: int, kernels: Kernels, dtype: str
) -> float:
    """‖A‖₂ by subspace iteration from random rows X (8, n): a lower bound, mostly within a few per cent.

    ``forward`` takes X to XA, ``adjoint`` X to XAᵀ; both may overwrite it.
    """
    if n == 0:
        return 0.0
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((min(_PROBES, n), n))
    dtype = dtype.removeprefix("torch.")
    norm = 0.0
    for _ in range(_STEPS):
        rows = np.linalg.qr(rows.T)[0].T
        if not np.isfinite(rows).all():
            return float("nan")
        seen = forward(kernels.put(np.ascontiguousarray(rows, dtype)))
        product = np.array(kernels.get(seen), np.float64)
        norm = max(norm, float(np.linalg.norm(product, 2)))
        rows = np.asarray(kernels.get(adjoint(seen)), np.float64)
    return norm

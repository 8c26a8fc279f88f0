"""What the method needs of linear algebra beyond single routines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from frodctl.arrays import dtype_name

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Kernels

_STEPS = 12
#: A direction of which no more is left, relative to what it was, is none.
_NOTHING_NEW = 1e-12


def row_blocks(count: int, step: int) -> list[slice]:
    """``count`` rows, ``step`` at a time."""
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def element_blocks(shape: tuple[int, ...], elements: int) -> list[slice]:
    """The rows of a matrix (m, n), of about so many elements at a time."""
    m, n = shape
    return row_blocks(m, max(1, elements // max(1, n)))


class Scratch:
    """Memory that is used again: one block by name and dtype, as large as the largest request so far."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.blocks: dict[tuple[str, str], Array] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: str = "float64") -> Array:
        """A contiguous array whose contents are whatever was left there."""
        size = math.prod(shape)
        block = self.blocks.get((name, dtype))
        if block is None or len(block) < size:
            self.blocks.pop((name, dtype), None)
            block = self.blocks[name, dtype] = self.kernels.empty((size,), dtype)
        return block[:size].reshape(shape)


def spectral_norm_of_triangle(kernels: Kernels, R: Array) -> float:
    """‖R‖₂ of R (n, n) triangular, as `spectral_norm` finds it."""
    return spectral_norm(
        lambda X: kernels.trmm(X, R), lambda X: kernels.trmm(X, R, transpose=True), len(R), kernels, dtype_name(R)
    )


def spectral_norm(
    forward: Callable[[Array], Array], adjoint: Callable[[Array], Array], n: int, kernels: Kernels, dtype: str
) -> float:
    """‖A‖₂ by Lanczos' method on AAᵀ from a random row x (1, n): a lower bound, mostly within a few per cent.

    ``forward`` takes x to xA, ``adjoint`` to xAᵀ; both may overwrite it.
    """
    basis, products = np.empty((0, n)), np.empty((0, n))
    x = np.random.default_rng(0).standard_normal(n)
    for _ in range(min(_STEPS, n)):
        whole = np.linalg.norm(x)
        for _ in range(2):  # once leaves rounding
            x = x - np.einsum("i,ij->j", np.einsum("ij,j->i", basis, x), basis)
        length = np.linalg.norm(x)
        if not length > _NOTHING_NEW * whole:  # rounding, which lies along the basis too
            break
        basis = np.vstack([basis, x / length])
        seen = forward(kernels.put(basis[-1:].copy(), dtype))
        products = np.vstack([products, np.asarray(kernels.get(seen), np.float64)])
        x = np.asarray(kernels.get(adjoint(seen)), np.float64)[0]
    if not np.isfinite(products).all():
        return float("nan")
    return math.sqrt(max(np.linalg.eigvalsh(np.einsum("ij,kj->ik", products, products)), default=0.0))

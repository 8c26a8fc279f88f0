"""What a step of training costs in each form of a layer, from shapes alone: operations and bytes."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A layer with W (m, n) and a sparse Q (n, n)."""

    m: int
    n: int
    positions: int  #: of Q
    dense: bool = False  #: whether products with Q are taken as those of a full matrix: on a GPU
    readers: int = 1  #: layers that take one product Vᵀx, this one among them
    experts: int = 1  #: that have such a W each
    chosen: int = 1  #: of them that a token goes through
    own_input: bool = False  #: whether x is another one for each of these, as behind an expert's activation
    in_rows: bool = False  #: whether W is some rows of what the model multiplies x by, so that its change comes after

    @property
    def entries(self) -> int:
        """What a product with Q takes for one row, in multiplications and additions."""
        return self.n * self.n if self.dense else self.positions


def full_flops(shape: Shape, tokens: float, *, backward: bool = True) -> float:
    """Floating-point operations of a layer that is trained as a whole: y = W x, and both gradients."""
    return (6.0 if backward else 2.0) * shape.m * shape.n * shape.chosen * tokens


def lora_flops(shape: Shape, tokens: float, rank: int) -> float:
    """Of y = W x + B A x, and the gradients of all but W."""
    m, n = shape.m, shape.n
    return (4.0 * m * n + 6.0 * rank * (m + n)) * shape.chosen * tokens


def input_flops(shape: Shape, tokens: float, *, backward: bool = True) -> float:
    """Of y = W (x + D Q Vᵀ x), and the gradients of x and of Q at its positions."""
    m, n, pairs = shape.m, shape.n, shape.chosen * tokens
    rotated = 2.0 * n * n / shape.readers * (pairs if shape.own_input else tokens)
    forward = (2.0 * m * n + 2.0 * shape.entries) * pairs + rotated + _returning(shape, pairs)
    return 2 * forward + 2.0 * shape.entries * pairs if backward else forward


def _returning(shape: Shape, pairs: float) -> float:
    """Of D (…), or, where W x is there already, of W D (…): by W (D (…)) or by (W D) (…)."""
    m, n = shape.m, shape.n
    once = 2.0 * n * n * pairs
    return min(once, 2.0 * m * n * n * shape.experts) + 2.0 * m * n * pairs if shape.in_rows else once


def weight_flops(
    shape: Shape, tokens: float, *, passes: int = 1, keeps_U: bool = False, backward: bool = True
) -> float:
    """Of y = W' x with W' = W + W D Q Vᵀ formed once, and the gradients of x and, by ∂L/∂W', of Q.

    Parameters
    ----------
    passes : int
        How often ∂L/∂W' is projected: once, where `frodctl.accumulating` is around the other backward passes.
    keeps_U : bool
        Whether W D = U diag(λ) is kept.
    """
    once = _forming(shape, keeps_U) + (passes * _projecting(shape, keeps_U) if backward else 0.0)
    return full_flops(shape, tokens, backward=backward) + once


def _forming(shape: Shape, keeps_U: bool) -> float:
    """Q Vᵀ, and B (Q Vᵀ) with B = W D; or W (D Q Vᵀ) where m ≥ n."""
    m, n = shape.m, shape.n
    wide = 2.0 * m * n * n
    dual = 0.0 if keeps_U else min(wide, 2.0 * n**3)
    return 2.0 * shape.entries * n + dual + wide


def _projecting(shape: Shape, keeps_U: bool) -> float:
    """Bᵀ (∂L/∂W') V at the positions; the last product is sampled."""
    m, n = shape.m, shape.n
    wide = 2.0 * m * n * n
    dual = 0.0 if keeps_U else min(wide, 2.0 * n**3)
    return wide + dual + 2.0 * shape.entries * min(m, n)

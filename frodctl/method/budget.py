"""How many numbers are trained: positions from a sparsity, and sparsities from a budget."""

from __future__ import annotations

from collections.abc import Sequence
from math import ulp

from frodctl.errors import UsageError


def nnz(n: int, sparsity: float) -> int:
    """Number of trained off-diagonal positions of an (n, n) matrix: PEFT's max(1, min(⌊s n²⌋, n² − n)).

    None where the sparsity is 0, or n is 1.
    """
    if sparsity <= 0 or n < 2:
        return 0
    return max(1, min(int(n * n * sparsity), n * n - n))


def trainable(n: int, sparsity: float) -> int:
    """Trainable numbers of one layer of width n: its scales and its sparse values."""
    return n + nnz(n, sparsity)


def allocate(layers: Sequence[tuple[int, int]], weights: Sequence[float], budget: float) -> list[float]:
    """Sparsities in proportion to weights, as large as a budget allows.

    Parameters
    ----------
    layers : sequence of (int, int)
        n and the number of layers of each category.
    weights : sequence of float
        Of each category, not negative; all equal for one sparsity everywhere. A category whose sparsity would be
        over 1 gets 1.
    budget : float
        Number of trainable numbers over all layers.

    Returns
    -------
    list of float
        min(1, κ weight) for the largest κ at which no more than ``budget`` numbers are trained.

    Raises
    ------
    UsageError
        The scales alone, n a layer, take more.
    """
    least = sum(n * count for n, count in layers)
    if budget < least:
        raise UsageError(f"the budget of {int(budget)} numbers is too small: the scales alone take {least}")

    def at(factor: float) -> list[float]:
        # a product that underflows is a sparsity all the same: one position
        return [min(1.0, max(factor * weight, ulp(0.0))) if factor and weight else 0.0 for weight in weights]

    def fits(factor: float) -> bool:
        return sum(count * trainable(n, s) for (n, count), s in zip(layers, at(factor), strict=True)) <= budget

    low, high = 0.0, max((1 / weight for weight in weights if weight > 0), default=0.0)
    if fits(high):
        return [1.0 if weight > 0 else 0.0 for weight in weights]
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Below one position a layer (nnz is at least 1) nothing is gained by a sparsity that is not 0.
    return at(low if fits(low) else 0.0)

"""How many numbers are trained: positions from a sparsity, and the sparsity from a budget."""

from __future__ import annotations

from collections.abc import Sequence

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


def sparsity_for_budget(widths: Sequence[int], budget: float) -> float:
    """The largest sparsity at which layers of these widths train no more than ``budget`` numbers.

    Parameters
    ----------
    widths : sequence of int
        n of every layer.
    budget : float
        Number of trainable numbers over all layers.

    Raises
    ------
    UsageError
        The scales alone, n a layer, take more.
    """
    if budget < sum(widths):
        raise UsageError(f"the budget of {int(budget)} numbers is too small: the scales alone take {sum(widths)}")
    counts = {n: widths.count(n) for n in set(widths)}

    def fits(sparsity: float) -> bool:
        return sum(count * trainable(n, sparsity) for n, count in counts.items()) <= budget

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    # Below one position a layer (nnz is at least 1) nothing is gained by a sparsity that is not 0.
    return low if low > 0 and fits(low) else 0.0

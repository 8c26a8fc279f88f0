"""What the joint basis of a category and an update cost, from shapes alone: operations and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Short weights are stacked to about so many rows before they are multiplied.
STACK_ROWS = 2048

#: Floating-point operations of BLAS's and LAPACK's routines as the literature counts them, by dimensions as in
#: `kernels.Kernels`: what is to be computed, not what a device without triangular routines does for it.
FLOPS: dict[str, Callable[..., float]] = {
    "gemm": lambda m, n, k: 2.0 * m * n * k,
    "csrmm": lambda nnz, k: 2.0 * nnz * k,
    "syrk": lambda m, n: 1.0 * m * n * n,
    "trmm": lambda m, n: 1.0 * m * n * n,
    "trsm": lambda m, n: 1.0 * m * m * n,
    "potrf": lambda n: n**3 / 3,
    "potri": lambda n: 2 * n**3 / 3,
    "trtri": lambda n: n**3 / 3,
    "sygst": lambda n: 1.0 * n**3,
    "syevd": lambda n: 9.0 * n**3,  # Golub & Van Loan's, of the QR algorithm; divide and conquer takes fewer
    "eigvalsh": lambda n: 4 * n**3 / 3,
    "svdvals": lambda m, n: 4.0 * max(m, n) * min(m, n) ** 2 - 4 * min(m, n) ** 3 / 3,
    "svd": lambda m, n: 6.0 * max(m, n) * min(m, n) ** 2 + 20.0 * min(m, n) ** 3,
    "qr": lambda m, n: 2.0 * max(m, n) * min(m, n) ** 2 - 2 * min(m, n) ** 3 / 3,
    "inverse": lambda n: 8 * n**3 / 3,  # LU, and n right-hand sides
}


def layer_flops(m: int, n: int) -> tuple[float, float, float]:
    """Floating-point operations of one layer's part in the three passes (G, T, λ), about."""
    gram = m * n * n
    if m >= n:
        return gram, n**3, 2 * min(m, 2 * n) * n * n
    return gram, 2 * m * n * n + 2 * m * m * n, 2 * m * n * n


def flops(shapes: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations of a whole category, about: the layers' and the eigendecompositions'."""
    n = shapes[0][1]
    return sum(sum(layer_flops(m, n)) for m, _ in shapes) + 20.0 * n**3


def memory_bytes(shapes: Sequence[tuple[int, int]], cache_bytes: int) -> int:
    """Peak memory of `joint_basis` in bytes, about, without the process's own and the weights read ahead."""
    n = shapes[0][1]
    rows = max(m if m >= n else max(1, STACK_ROWS // m) * m for m, _ in shapes)
    tall = sum(m >= n for m, _ in shapes)
    cached = min(tall, cache_bytes // (8 * n * n)) * 8 * n * n
    return 7 * 8 * n * n + 3 * 8 * rows * n + cached


def update_flops(m: int, n: int) -> float:
    """Floating-point operations of updating an (m, n) weight, about: two products with (n, n) matrices."""
    return 4.0 * m * n * n


def update_memory_bytes(m: int, n: int) -> int:
    """Memory in bytes that updating an (m, n) weight takes, about, with its category's matrices."""
    rows = m if m <= n else min(m, 1024)  # that are multiplied at a time
    return max(28 * n * n, 20 * n * n + 8 * m * n + 16 * rows * n)

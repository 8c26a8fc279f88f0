"""What the joint basis of a category and an update cost, from shapes alone: operations, bytes moved, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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


class Call(NamedTuple):
    """Calls of a routine with the same dimensions, as `FLOPS` takes them; of "move" the bytes read and written."""

    routine: str
    dtype: str
    dimensions: tuple[int, ...]
    times: int = 1

    @property
    def flops(self) -> float:
        return self.times * FLOPS[self.routine](*self.dimensions) if self.routine != "move" else 0.0

    @property
    def nbytes(self) -> int:
        return self.times * self.dimensions[0] if self.routine == "move" else 0


#: Bytes that are moved for each element of V, from float64 in rows to the checked file (measured: 50 ns at 8 GB/s).
_STORING = 400
#: Bytes that are moved for each element of a weight that is updated, from file to checked file (as above: 12 ns).
_UPDATING = 100
#: Bytes moved to read a stored element: from the page cache, into a digest.
_READING = 4


def joint_basis_calls(
    shapes: Sequence[tuple[int, int]],
    *,
    work: str,
    regular: bool = True,
    inverted: bool = False,
    tried: bool = False,
    cache_bytes: int = 0,
) -> Iterator[Call]:
    """What `joint_basis` does for weights of these shapes, (m_i, n) each.

    Parameters
    ----------
    work : {"float32", "float64"}
        Of the products.
    regular : bool
        Whether G has a Cholesky factor; else it is decomposed into eigenvectors (all layers being of one scale).
    inverted : bool
        Whether D comes from the stored V: it is not stored in float32.
    tried : bool
        Whether float32 was tried before float64.
    cache_bytes : int
        As for `joint_basis`.
    """
    n = shapes[0][1]
    height = sum(m for m, _ in shapes)
    rank = min(n, height)
    tall = [m for m, _ in shapes if m >= n]
    wide = [m for m, _ in shapes if m < n]
    kept = min(len(tall), cache_bytes // (8 * n * n)) if regular else 0
    for dtype in ("float32", "float64") if tried else (work,):
        if dtype == "float32" or not tried or any(not _nearly_square(m, n) for m, _ in shapes):
            yield from _gram_calls(shapes, dtype)
    yield Call("potrf", "float64", (n,))
    yield from _root_calls(n, rank, regular=regular)
    yield from _tall_calls(tall[:kept], n, work) if regular else ()
    yield from _tall_calls(tall[kept:], n, work, again=True) if regular else _whitened_calls(tall, n, rank, work)
    for m in wide:
        yield _applied(m, n, rank, work, regular=regular)
        yield Call("syrk", work, (rank, m))
        yield Call("potrf", work, (m,))
        yield Call("trsm", work, (m, rank))
        yield Call("syrk", work, (m, rank))
        yield Call("move", work, (m * n * (_READING + _size(work)),))
    if regular and tall:
        yield Call("sygst", "float64", (n,))
    yield Call("syevd", "float64" if tall else work, (rank,))
    yield from _direction_calls(n, rank, _tied(shapes, rank), work, regular=regular)
    if inverted or not regular:
        yield Call("inverse", work, (n,))
    yield Call("trmm", work, (rank, n), kept + bool(kept))
    for m in [*wide, *tall[kept:]]:
        yield Call("gemm", work, (rank, m, n))
        yield Call("move", work, (m * n * (_READING + _size(work)),))
    yield Call("move", "", (n * n,), _STORING)


def update_calls(shapes: Sequence[tuple[int, int]]) -> Iterator[Call]:
    """What updating the weights of one category takes, (m_i, n) each, in float32."""
    n = shapes[0][1]
    yield Call("inverse", "float64", (n,))
    for m, _ in shapes:
        yield Call("gemm", "float32", (m, n, n), 2)
        yield Call("move", "float32", (_UPDATING * m * n,))


def _gram_calls(shapes: Sequence[tuple[int, int]], work: str) -> Iterator[Call]:
    for m, n in shapes:
        dtype = "float64" if _nearly_square(m, n) else work
        yield Call("syrk", dtype, (m, n))
        yield Call("move", dtype, (m * n * (4 * _READING + _size(dtype)),))  # read, digested, its norm taken
        if m >= n:
            yield Call("move", dtype, (n * n * (_size(dtype) + 16) // 2,))


def _root_calls(n: int, rank: int, *, regular: bool) -> Iterator[Call]:
    if regular:
        yield Call("trtri", "float64", (n,))
        yield Call("move", "float64", (4 * n * n,), 48)  # the norms of R and R⁻¹, by Lanczos' method
    else:
        yield Call("syevd", "float64", (n,))
        yield Call("move", "float64", (48 * rank * n,))


def _tall_calls(tall: Sequence[int], n: int, work: str, *, again: bool = False) -> Iterator[Call]:
    """Of (G_i + αG)⁻¹; the Gram matrix is computed ``again`` where it was not kept."""
    for m in tall:
        dtype = "float64" if _nearly_square(m, n) else work
        if again:
            yield Call("syrk", dtype, (m, n))
            yield Call("move", dtype, (m * n * (_READING + _size(dtype)),))
        yield Call("potrf", "float64", (n,))
        yield Call("potri", "float64", (n,))
        yield Call("move", "float64", (72 * n * n,))


def _whitened_calls(tall: Sequence[int], n: int, rank: int, work: str) -> Iterator[Call]:
    for m in tall:
        yield _applied(m, n, rank, work, regular=False)
        yield Call("syrk", work, (m, rank))
        yield Call("potrf", work, (rank,))
        yield Call("potri", work, (rank,))
        yield Call("move", work, (m * n * (_READING + _size(work)) + 12 * rank * rank,))


def _applied(m: int, n: int, rank: int, work: str, *, regular: bool) -> Call:
    """Q_i = W_i P."""
    return Call("trmm", work, (m, n)) if regular else Call("gemm", work, (m, rank, n))


def _direction_calls(n: int, rank: int, tied: int, work: str, *, regular: bool) -> Iterator[Call]:
    """Of V and D, and of the rotation within the directions whose τ are equal."""
    if regular:
        yield Call("trmm", work, (n, n))
        yield Call("trmm", "float64", (n, n))
    else:
        yield Call("gemm", "float64", (rank, n, rank))
    if tied > 1:
        yield Call("syrk", "float64", (n, tied))
        yield Call("syevd", "float64", (tied,))
        yield Call("gemm", "float64", (tied, n, tied))
        if regular:
            yield Call("gemm", work, (tied, n, tied))


def _tied(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Directions that belong to one layer alone, if the weights are in general position: their τ are equal."""
    height = sum(m for m, _ in shapes)
    return min(rank, sum(max(0, rank - (height - m)) for m, _ in shapes))


def _nearly_square(m: int, n: int) -> bool:
    return n <= m < 2 * n


def _size(dtype: str) -> int:
    return 8 if dtype == "float64" else 4

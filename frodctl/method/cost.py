"""What the joint basis of a category and an update cost, from shapes alone: operations, bytes moved, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: Short weights are stacked to about so many rows before they are multiplied.
STACK_ROWS = 2048
#: Rows of an updated weight that are computed at a time.
UPDATE_ROWS = 1024

#: Bytes of a number; numpy is not imported for it.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

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
    "syevr": lambda n, count: 4 * n**3 / 3 + 2.0 * n * n * count,
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


#: Operations in the time of a byte of a message: 20 GFLOP/s and 0.5 GB/s on a CPU's core, more of both on GPUs.
_MESSAGE = 40.0


def flops_of_ranks(shapes: Sequence[tuple[int, int]], ranks: int) -> float:
    """Operations, about, in whose time so many ranks are done with a category together.

    The layers are divided among them; all but their parts in the three passes is one rank's, for whom the others wait;
    G, T, V and D are sent.
    """
    n, most = shapes[0][1], -(-len(shapes) // ranks)
    layers = max(sum(sum(layer_flops(m, n)) for m, _ in shapes[i : i + most]) for i in range(0, len(shapes), most))
    sent = 0.0 if ranks == 1 else _MESSAGE * 28 * n * n
    return layers + 20.0 * n**3 + sent


def stacked(m: int, count: int) -> int:
    """How many of ``count`` wide weights of height m are multiplied at a time."""
    return max(1, min(STACK_ROWS // m, count))


def nearly_square(m: int, n: int) -> bool:
    """Whether the Gram matrix of an (m, n) weight is computed in float64, whatever the others are."""
    return n <= m < 2 * n


def is_deficient(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether the weights have too few rows for a Gram matrix of full rank."""
    return sum(m for m, _ in shapes) < shapes[0][1]


def working_dtype(shapes: Sequence[tuple[int, int]], precision: str) -> str:
    """The dtype of the products, as far as shapes tell; "float32" may turn out not to do.

    It will not where the layers but the highest have fewer than n rows together: that one has directions to itself,
    whose τ are equal (with N = 1 or Σ m_i ≤ n all are), and rounding must not decide V. Nor where wide weights are
    nearly square or stand beside tall ones: small τ drown in the rounding of the wide ones' terms.
    """
    heights, n = [m for m, _ in shapes], shapes[0][1]
    widest = max((m for m in heights if m < n), default=0)
    drowned = 2 * widest > n or (max(heights) >= n and widest > 0)
    alone = sum(heights) - max(heights) < n
    return "float64" if precision == "float64" or drowned or alone else "float32"


def kept_grams(shapes: Sequence[tuple[int, int]], cache_bytes: int, work: str) -> list[int]:
    """Bytes of each Gram matrix that is kept: the first ones of tall weights, as many as there is room for."""
    sizes = [n * n * ITEMSIZE["float64" if nearly_square(m, n) else work] for m, n in shapes if m >= n]
    kept, room = [], cache_bytes
    for size in sizes:
        room -= size
        if room >= 0:
            kept.append(size)
    return kept


def memory_bytes(
    shapes: Sequence[tuple[int, int]], cache_bytes: int, work: str, *, parked: bool = False, ranks: int = 1
) -> int:
    """Peak memory of `joint_basis` in bytes, without the process's own and the weights read ahead.

    The (n, n) matrices that are alive are counted phase by phase, as `joint_basis` goes.

    Parameters
    ----------
    shapes : sequence of (m, n)
        Of the weights.
    cache_bytes : int
        What may be spent on Gram matrices kept.
    work : {"float32", "float64"}
        Dtype of the products.
    parked : bool
        Whether R and R⁻¹ are elsewhere while they are not needed.
    ranks : int
        How many processes divide the layers among them; the memory is one's.
    """
    n = shapes[0][1]
    w = ITEMSIZE[work]
    tall = [(m, 8 if nearly_square(m, n) else w) for m, _ in shapes if m >= n]
    wide = [m for m, _ in shapes if m < n]
    kept = kept_grams(shapes[: -(-len(shapes) // ranks)], cache_bytes, work)
    roots = w * n * n * len(kept)
    turning = 4 * n * n if kept and kept[0] > w * n * n else 0  # a G_i beside the R_i that takes its place
    again = -(-len(tall) // ranks) > len(kept)  # some Gram matrices are computed again
    stack = max((stacked(m, len(shapes)) * m for m in wide), default=0)
    buffers = (w * stack + sum({size: size * m for m, size in sorted(tall)}.values())) * n
    buffers += sum({size for _, size in tall}) * n * n if again else 0
    products = w * n * max(stack, max((m for m, _ in tall), default=0)) if again or wide else 0
    deficient = is_deficient(shapes)  # so that R comes from G's eigenvectors
    spare = not tall and not deficient  # R takes G's place
    pending = 4 if w == 4 and wide else 0
    G, R, P = 8 if tall else 0, 0 if parked else 8, 0 if parked else w
    T = 8 if tall or w == 8 else 4
    matrices = {
        "G": 8 + pending,
        "R": 32 if deficient else (8 if spare else 16) + w,
        "T": G + R + (w if wide else P) + 8 + pending + (8 if tall else 0) + (8 if tall and wide else 0),
        "eigenvectors": R + P + max(8 + (0 if T == 8 else 4), 3 * T),
        "V": 8 + P + T + 8,
        "D": (R if kept else 0) + w + T + 8 + (w if w != T else 0),
        "scales": 4 + w + (8 + 2 * w if kept else 0),
    }
    others = {
        "G": buffers + sum(kept),
        "R": buffers + sum(kept),
        "T": buffers + max(sum(kept), roots) + turning + w * max(wide, default=0) ** 2,
        "scales": roots + (buffers + products if again or wide else 0),
    }
    return max(count * n * n + others.get(phase, roots) for phase, count in matrices.items())


def update_flops(m: int, n: int) -> float:
    """Floating-point operations of updating an (m, n) weight, about: two products with (n, n) matrices."""
    return 4.0 * m * n * n


class UpdateCase(NamedTuple):
    """How `CategoryUpdate` computes, as far as it is known before V is read; dtypes by numpy's names."""

    weights: str  #: dtype of the weights as stored
    stored: str  #: V's dtype
    inverse: str  #: the dtype in which V is inverted
    held_in: str | None = None  #: as `CategoryUpdate` takes it
    from_scales: bool = False  #: whether λ is given, so that W' − W is computed, where it can be in float32
    nnz: int = 0

    @property
    def work(self) -> str:
        return "float64" if self.stored == "float64" else "float32"

    @property
    def precision(self) -> str:
        """Of the products W V⁻ᵀ."""
        return self.work if self.from_scales else self.inverse

    def as_square(self, m: int, n: int) -> bool:
        """Whether W' − W is W (V⁻ᵀ M Vᵀ)."""
        return self.from_scales and self.work == "float32" and m > n


def update_memory_bytes(m: int, n: int, case: UpdateCase) -> int:
    """Peak memory of `CategoryUpdate` with weights (m, n), in bytes, without these and what is yielded."""
    return max(_inverting_bytes(n, case), _updating_bytes(m, n, case)) + 48 * (case.nnz + n)


def _inverting_bytes(n: int, case: UpdateCase) -> int:
    """V as stored beside V⁻¹: as it is computed, as cond(V) is, and as copies are made."""
    s, i, w = (ITEMSIZE[dtype] for dtype in (case.stored, case.inverse, case.work))
    copies = (ITEMSIZE[case.held_in], 4) if case.held_in else (0, 0)
    held = copies[0] + (copies[1] if case.held_in != "float32" else 0)
    return max(s + 2 * i + 1, s + i + (4 if s < 4 else 0), s + i + w + held) * n * n


def _updating_bytes(m: int, n: int, case: UpdateCase) -> int:
    """Vᵀ, V⁻¹ and what `CategoryUpdate` allocates for a weight."""
    s, i, w, p = (ITEMSIZE[dtype] for dtype in (case.stored, case.inverse, case.work, case.precision))
    kept = w + (4 if case.held_in else i + (p if p < i else 0))
    rounded = s if not case.from_scales and case.weights != case.stored else 0
    to_units = 0 if case.from_scales else (4 if p > 4 else 0) + (s if s < 4 else 0)
    in_work = w if p != w else 0
    if case.as_square(m, n):
        return (kept + 2 * w) * n * n + 2 * w * min(m, UPDATE_ROWS) * n
    if m > n:
        blocks = rounded + p + to_units + in_work + w
        return (kept + w) * n * n + p * m * n + blocks * min(m, UPDATE_ROWS) * n
    return kept * n * n + (2 * p + rounded + in_work + 2 * w) * m * n + to_units * m * min(n, UPDATE_ROWS)


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
    kept = len(kept_grams(shapes, cache_bytes, work)) if regular else 0
    for dtype in ("float32", "float64") if tried else (work,):
        if dtype == "float32" or not tried or any(not nearly_square(m, n) for m, _ in shapes):
            yield from _gram_calls(shapes, dtype)
    if not is_deficient(shapes):
        yield Call("potrf", "float64", (n,))
        if not regular and not tall:
            yield from _gram_calls(shapes, work)  # as R took its place
    yield from _root_calls(n, rank, work, regular=regular)
    yield from _tall_calls(tall[:kept], n, work) if regular else ()
    yield from _tall_calls(tall[kept:], n, work, again=True) if regular else _whitened_calls(tall, n, rank, work)
    for m in wide:
        yield _applied(m, n, rank, work, regular=regular)
        yield Call("syrk", work, (rank, m))
        yield Call("potrf", work, (m,))
        yield Call("trsm", work, (m, rank))
        yield Call("syrk", work, (m, rank))
        yield Call("move", work, (m * n * (_READING + ITEMSIZE[work]),))
    if regular and tall:
        yield Call("sygst", "float64", (n,))
    yield Call("syevd", "float64" if tall else work, (rank,))
    yield from _direction_calls(n, rank, _tied(shapes, rank), work, regular=regular)
    if inverted or not regular:
        yield Call("inverse", work, (n,))
    yield Call("trmm", work, (rank, n), kept + bool(kept))
    for m in [*wide, *tall[kept:]]:
        yield Call("gemm", work, (rank, m, n))
        yield Call("move", work, (m * n * (_READING + ITEMSIZE[work]),))
    yield Call("move", "", (n * n,), _STORING)


def update_calls(shapes: Sequence[tuple[int, int]], case: UpdateCase) -> Iterator[Call]:
    """What updating the weights of one category takes, (m_i, n) each."""
    n = shapes[0][1]
    yield Call("inverse", case.inverse, (n,))
    for m, _ in shapes:
        yield Call("gemm", case.precision, (n if case.as_square(m, n) else m, n, n))
        yield Call("csrmm", case.work, (case.nnz + n, min(m, n)))
        yield Call("gemm", case.work, (m, n, n))
        yield Call("move", "float32", (_UPDATING * m * n,))


def _gram_calls(shapes: Sequence[tuple[int, int]], work: str) -> Iterator[Call]:
    for m, n in shapes:
        dtype = "float64" if nearly_square(m, n) else work
        yield Call("syrk", dtype, (m, n))
        yield Call("move", dtype, (m * n * (4 * _READING + ITEMSIZE[dtype]),))  # read, digested, its norm taken
        if m >= n:
            yield Call("move", dtype, (n * n * (ITEMSIZE[dtype] + 16) // 2,))


def _root_calls(n: int, rank: int, work: str, *, regular: bool) -> Iterator[Call]:
    if regular:
        yield Call("trtri", work, (n,))
        yield Call("move", "float64", (4 * n * n,), 48)  # the norms of R and R⁻¹, by Lanczos' method
    else:
        yield Call("syevd", "float64", (n,))
        yield Call("move", "float64", (48 * rank * n,))


def _tall_calls(tall: Sequence[int], n: int, work: str, *, again: bool = False) -> Iterator[Call]:
    """Of (G_i + αG)⁻¹; the Gram matrix is computed ``again`` where it was not kept."""
    for m in tall:
        dtype = "float64" if nearly_square(m, n) else work
        if again:
            yield Call("syrk", dtype, (m, n))
            yield Call("move", dtype, (m * n * (_READING + ITEMSIZE[dtype]),))
        yield Call("potrf", "float64", (n,))
        yield Call("potri", "float64", (n,))
        yield Call("move", "float64", (56 * n * n,))


def _whitened_calls(tall: Sequence[int], n: int, rank: int, work: str) -> Iterator[Call]:
    for m in tall:
        yield _applied(m, n, rank, work, regular=False)
        yield Call("syrk", work, (m, rank))
        yield Call("potrf", work, (rank,))
        yield Call("potri", work, (rank,))
        yield Call("move", work, (m * n * (_READING + ITEMSIZE[work]) + 12 * rank * rank,))


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

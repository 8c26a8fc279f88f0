"""What the joint basis of a category and an update cost, from shapes alone: operations and memory."""

from __future__ import annotations

from collections.abc import Sequence

#: Short weights are stacked to about so many rows before they are multiplied.
STACK_ROWS = 2048


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


def stacked(m: int, count: int) -> int:
    """How many of ``count`` wide weights of height m are multiplied at a time."""
    return max(1, min(STACK_ROWS // m, count))


def nearly_square(m: int, n: int) -> bool:
    """Whether the Gram matrix of an (m, n) weight is computed in float64, whatever the others are."""
    return n <= m < 2 * n


def gram_bytes(n: int, dtype: str) -> int:
    """Bytes of a Gram matrix (n, n)."""
    return n * n * (8 if dtype == "float64" else 4)


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
    sizes = [gram_bytes(n, "float64" if nearly_square(m, n) else work) for m, n in shapes if m >= n]
    kept, room = [], cache_bytes
    for size in sizes:
        room -= size
        if room >= 0:
            kept.append(size)
    return kept


def memory_bytes(shapes: Sequence[tuple[int, int]], cache_bytes: int, work: str, *, parked: bool = False) -> int:
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
    """
    n = shapes[0][1]
    w = 4 if work == "float32" else 8
    tall = [(m, 8 if nearly_square(m, n) else w) for m, _ in shapes if m >= n]
    wide = [m for m, _ in shapes if m < n]
    kept = kept_grams(shapes, cache_bytes, work)
    roots = w * n * n * len(kept)
    turning = 4 * n * n if kept and kept[0] > w * n * n else 0  # a G_i beside the R_i that takes its place
    again = len(tall) > len(kept)  # some Gram matrices are computed again
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


def update_memory_bytes(m: int, n: int) -> int:
    """Memory in bytes that updating an (m, n) weight takes, about, with its category's matrices."""
    rows = m if m <= n else min(m, 1024)  # that are multiplied at a time
    return max(28 * n * n, 20 * n * n + 8 * m * n + 16 * rows * n)

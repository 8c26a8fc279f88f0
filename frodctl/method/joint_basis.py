"""The joint basis of a category of weights, computed by streaming over its layers.

The decomposition is the higher-order generalised SVD for rank-deficient matrices of Kempf, Goulart & Duncan
(SIAM J. Matrix Anal. Appl. 2023, arXiv 2102.09822), as FRoD uses it (Wan et al., AAAI 2026). For weights
W_i (m_i, n), i = 1..N, and α > 0::

    G_i = W_iᵀ W_i      G = Σ G_i = RᵀR      C_i = R⁻ᵀ G_i R⁻¹
    T = (1/N) Σ (C_i + αI)⁻¹ = Z diag(τ) Zᵀ  V = Rᵀ Z      D = V⁻ᵀ = R⁻¹ Z
    Y_i = W_i D         λ_ik = ‖Y_i[:,k]‖    U_i[:,k] = Y_i[:,k] / λ_ik

Three passes over the weights (for G, for T, for λ) and a few (n, n) matrices are all it takes, whatever N.

Three equal formulas for a layer's term of T; shapes and the condition of G choose:

- m ≥ n, G well conditioned: (C_i + αI)⁻¹ = R (G_i + αG)⁻¹ Rᵀ, in float64. R is applied once, to the sum,
  and a cached G_i makes this pass independent of m.
- m < n: with Q_i = W_i R⁻¹, (1/α) (I − Q_iᵀ (Q_i Q_iᵀ + αI)⁻¹ Q_i), by Woodbury's identity.
- G badly conditioned or singular: R from an eigendecomposition of G, which also splits off its null space;
  then (Q_iᵀ Q_i + αI)⁻¹ or Woodbury, whichever is smaller.

Layers may differ in scale by any factor. Where G is well conditioned that takes no care: whatever is small is small
in λ_i alone. Where it is not, the sum G has lost what only small layers hold, and R comes from a QR factorisation of
the layers in turn. Scales as such, of a category or a layer, are taken out by powers of two, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from frodctl.arrays import NAMED, dtype_name, epsilon
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.method.cost import is_deficient, kept_grams, layer_flops, nearly_square, stacked, working_dtype
from frodctl.method.kernels import Kernels, kernels_of
from frodctl.method.linalg import Scratch, row_blocks, spectral_norm_of_triangle
from frodctl.method.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.kernels import Vector

#: float32 products are used up to these condition numbers of R, where they leave τ within a few 1e-6 of τ_max:
#: for Gram matrices of wide layers, and (the terms of T being more sensitive to them) of tall ones.
FLOAT32_CONDITION_WIDE = 50.0
FLOAT32_CONDITION_TALL = 16.0
#: Up to this one a Cholesky factor of G serves; beyond it, an eigendecomposition.
CHOLESKY_CONDITION = 1e3
#: τ equal to this relative difference are one eigenvalue, whose eigenvectors may be rotated.
TIE = 1e-6
#: λ_ik is written as 0 where W_i d_k is rounding of its own layer: of ‖W_i‖‖d_k‖, and (times v_k) of ‖W_i‖, no more
#: than this. A small multiple of float32's ε, as V is stored in it at best.
ROUNDING = 8 * float(np.finfo(np.float32).eps)
#: λ² = ‖R_i d‖² − α dᵀGd is taken where it is at least this many times ε ‖R_i‖² ‖d‖², else ‖W_i d‖².
CANCELLATION = {"float32": 2.0**17, "float64": 2.0**24}
#: Norms of layers that differ by no more are of one scale: where G is badly conditioned it still has all of them.
SPREAD = 10.0
#: The layers but the largest have shares C_i of this size where their norms are so much smaller together; there
#: rounding to float32 would choose V.
DOMINANCE = 1e-3
#: Norms between this and its inverse can be squared and multiplied in float32 without a thought.
_SAFE_NORM = 2.0**-30
_ROWS = 128  #: of V that are rounded at a time


class NotPositiveDefinite(ArithmeticError):
    """Rounding has left a matrix without a Cholesky factor."""


class NonFiniteWeights(InvalidInput):
    """Some weight holds NaN or Inf; which one, the Gram matrices do not tell."""


class Unrepresentable(FrodctlError):
    """V or, where it has a number, the λ of layer ``layer`` cannot be stored."""

    def __init__(self, message: str, layer: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer


#: A matrix that is kept somewhere, in memory or not.
Held = Callable[[], "Array"]


def in_memory(X: Array) -> Held:
    """Keep a matrix where it is."""
    return lambda: X


class Layers(Protocol):
    """The weights of one category, which may be read as often as needed."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """(m_i, n) of each weight."""
        ...

    def read(self, numbers: Sequence[int]) -> Iterator[HostArray]:
        """The weights W_i (m_i, n) with these numbers, in this order, floating point; each valid until the next."""
        ...


@dataclass(frozen=True)
class JointBasis:
    """The joint basis of N weights of width n."""

    V: HostArray  #: (n, n) in the dtype asked for: the shared basis, null directions last
    tau: HostArray  #: (n,) float64, ascending; 1/α in null directions
    scales: list[HostArray]  #: λ_i, N arrays (n,) float32; 0 in null directions
    rank: int  #: number of directions that are not null
    condition: float  #: condition number of R on its range; estimated from below, to about 10 %
    precision: str  #: of the products: "float32" or "float64"
    rms_singular_value: float  #: of the n singular values of the stacked weights, √(tr G/n) = ‖V‖_F/√n (G = V Vᵀ)


@dataclass(frozen=True)
class _Root:
    """R (r, n) with G = RᵀR on its range, P with R P = I, and the null space of G in rows (n−r, n).

    ``P`` is (n, n), triangular as R is, or Pᵀ (r, n). With a frame Eᵀ (r, n), EᵀE = I, R and P are (r, r), for W_i E.
    """

    R: Held
    P: Held
    null: Array
    rank: int
    triangular: bool
    condition: float
    frame: Array | None = None

    def dual(self, kernels: Kernels, Zt: Array, work: str) -> Array | None:
        """D = PZ in rows, in the working dtype, in Zt's memory if that is; None unless P is triangular and (n, n)."""
        if not self.triangular or self.frame is not None:
            return None
        same = dtype_name(Zt) == work
        Z = Zt if same else kernels.copy(Zt, kernels.empty(tuple(Zt.shape), work))
        return kernels.trmm(Z, self.P(), transpose=True)

    def basis(self, kernels: Kernels, Zt: Array) -> Array:
        """V = RᵀZ in rows, float64."""
        Z = kernels.copy(Zt, kernels.empty(tuple(Zt.shape), "float64"))
        return kernels.trmm(Z, self.R()) if self.triangular else _rotated(kernels, Z, self.R())


def joint_basis(
    layers: Layers,
    *,
    alpha: float = 1e-3,
    precision: str = "auto",
    dtype: str = "float32",
    kernels: Kernels,
    cache_bytes: int = 0,
    park: Callable[[Array], Held] = in_memory,
    advance: Callable[[float], None] = lambda flops: None,
    ranks: Ranks = ALONE,
) -> JointBasis:
    """Compute the joint basis of ``layers``.

    Parameters
    ----------
    layers : Layers
        The weights W_i, (m_i, n) each.
    alpha : float
        The regularisation α > 0 of C_i.
    precision : {"auto", "float32", "float64"}
        Dtype of the products with weights. Sums over layers (beyond a few thousand rows) are float64, and so are
        the Gram matrices of nearly square weights (n ≤ m < 2n), to whose rounding T is most sensitive, and the
        inverses of tall ones'.
        "auto" takes float32 where G is well conditioned (condition of R up to 16, or 50 if no weight is tall,
        for α ≥ 1e-3); "float32" up to 1000, with errors of τ up to 1e-3 of its largest. Beyond that it is float64,
        as it is where one layer has directions to itself (Σ m_i less the largest is below n), where n/2 < m < n
        for some layer, and where m < n for some layers and not for others.
    dtype : {"float32", "bfloat16", "float16"}
        Of the stored V. λ is computed from V as stored.
    kernels : Kernels
        Where to compute.
    cache_bytes : int
        Memory for Gram matrices kept between passes instead of computed again.
    park : callable
        Takes R and R⁻¹ (n, n) while they are not needed, and returns what gives them back.
    advance : callable
        Progress: called with the number of floating-point operations just done (of `cost.flops`).
    ranks : Ranks
        The processes that compute it together, by default this one. Each reads its own layers only; all return it.

    Returns
    -------
    JointBasis

    Raises
    ------
    NonFiniteWeights
        A weight holds NaN or Inf.
    Unrepresentable
        V does not fit ``dtype``, or some λ_i float32: numbers would over- or underflow, or V rounded so is another.
    NotPositiveDefinite
        Rounding has left a layer's G_i + αG, or C_i + αI, without a Cholesky factor.
    """
    stack = _Stack(layers, kernels, cache_bytes, park, advance, ranks)
    work, directions = _directions(stack, alpha, precision, dtype)
    V, tau, Dt, rms = ranks.share(directions)
    rank, condition = stack.root.rank, stack.root.condition
    scales = stack.scales(V, Dt, work, alpha)
    _check_rounding(scales, rank, dtype)
    return JointBasis(V, tau, scales, rank, condition, work, rms)


def _directions(stack: _Stack, alpha: float, precision: str, dtype: str) -> tuple[str, list[Any] | None]:
    """The dtype of the products; V as stored, τ, D in rows if V's rounding does not show in it, and ‖V‖_F/√n.

    All but the dtype is found by the first rank alone.
    """
    kernels = stack.kernels
    G, work = stack.factored(precision, alpha)
    T = stack.mean_resolvent(G, alpha, work)
    del G
    if stack.ranks.number:
        stack.drop_R()
        stack.drop_P()
        return work, None
    # T is as precise as the products it came from: float32 where there are wide weights only
    T = T if stack.any_tall else kernels.put(T, work)
    tau, Zt = kernels.syevd(T)
    del T
    Vt = stack.root.basis(kernels, Zt)
    stack.drop_R()
    Dt = stack.root.dual(kernels, Zt, work)
    stack.drop_P()
    del Zt
    root = stack.root
    _untie(kernels, Vt, Dt, tau, graded=root.frame is not None)
    if root.frame is not None:
        Vt = _rotated(kernels, Vt, root.frame)
    columns, tau = _append_null(kernels.get(Vt), tau, kernels.get(root.null), alpha)
    del Vt
    rms = math.sqrt(float(np.einsum("ij,ij->", columns[: root.rank], columns[: root.rank])) / stack.n) / stack.factor
    stored, signs = _store(columns, dtype, stack.factor)
    del columns
    V = kernels_of("cpu").transpose(stored)
    del stored
    if Dt is not None and dtype == "float32" and root.condition <= FLOAT32_CONDITION_WIDE:
        Dt *= kernels.put(signs[:, None])
    else:  # the rounding of V would show
        Dt = None
    return work, [V, tau, Dt, rms]


def float32_condition(shapes: Sequence[tuple[int, int]], alpha: float) -> float:
    """Up to which condition number of R float32 products will do; their errors grow with its square over α."""
    limit = FLOAT32_CONDITION_TALL if any(m >= n for m, n in shapes) else FLOAT32_CONDITION_WIDE
    return limit * min(1.0, math.sqrt(alpha / 1e-3))


class _Stack:
    """The three passes over the layers."""

    def __init__(
        self,
        layers: Layers,
        kernels: Kernels,
        cache_bytes: int,
        park: Callable[[Array], Held],
        advance: Callable[[float], None],
        ranks: Ranks,
    ) -> None:
        self.layers = layers
        self.shapes = layers.shapes
        self.n = self.shapes[0][1]
        self.kernels = kernels
        self.advance = advance
        self.scratch = Scratch(kernels)
        self.norms = [0.0] * len(self.shapes)  #: ‖W_i‖_F, known after the first pass
        self.factor = 1.0  #: a power of two, by which all weights are multiplied
        self.grams: dict[int, Array] = {}  #: G_i
        self.roots: dict[int, Array] = {}  #: R_i with R_iᵀR_i = G_i + αG, in G_i's place
        self.sizes: dict[int, float] = {}  #: the length of R_i's longest column, about ‖R_i‖
        self.cache_bytes = cache_bytes
        self.park = park
        self.ranks = ranks
        self.own = ranks.own(len(self.shapes))  #: the layers that this process reads
        self.root: _Root  #: of G, known after the first pass

    @property
    def any_tall(self) -> bool:
        return any(m >= n for m, n in self.shapes)

    @property
    def is_spare(self) -> bool:
        """Whether G is not needed beyond its Cholesky factor."""
        return not self.any_tall and not is_deficient(self.shapes)

    def rescale(self) -> bool:
        """Choose the factor by the norms; whether it is another than before."""
        if not all(map(math.isfinite, self.norms)):
            raise NonFiniteWeights("the weights hold NaN or Inf")
        largest = max(self.norms)
        if largest == 0 or _SAFE_NORM <= largest <= 1 / _SAFE_NORM:
            return False
        self.factor = _inverse_scale(largest)
        return True

    @property
    def spread(self) -> float:
        """The largest of the layers' norms over the smallest that is not 0."""
        return max(self.norms) / min((norm for norm in self.norms if norm), default=1.0)

    @property
    def is_dominated(self) -> bool:
        """Whether one layer is so much larger than the others that τ are all but equal in its directions."""
        largest = max(self.norms)
        return sum((norm / largest) ** 2 for norm in self.norms) - 1 < DOMINANCE if largest else False

    def stacks(
        self,
        step: int,
        dtype: str,
        factors: Sequence[float] | None = None,
        numbers: Sequence[int] | None = None,
        near_square: str | None = None,
    ) -> Iterator[tuple[slice, Array]]:
        """The weights times their factors, in a dtype, with the numbers of their layers; ``step`` is the pass.

        Those of this process are taken, or what there is of them in ``numbers``. The factors, powers of two, are by
        default the common one. Wide weights come several of one height on top of
        each other, as short matrices do not make the most of the machine. Nearly square ones may be of another dtype.
        """
        numbers = self.own if numbers is None else numbers
        first, held = 0, 0
        weights = self.kernels.ahead(self.layers.read(numbers))
        for place, (i, W) in enumerate(zip(numbers, weights, strict=True)):
            m, n = self.shapes[i]
            self.advance(layer_flops(m, n)[step])
            if step == 0:
                self.norms[i] = self.kernels.norm(W)
            factor = self.factor if factors is None else factors[i]
            if factor != 1:
                W = self.kernels.copy(W, self.scratch.empty("scaled", (m, n), "float64"))
                W *= factor
            if m >= n:
                wanted = near_square if near_square and nearly_square(m, n) else dtype
                yield slice(i, i + 1), self.kernels.copy(W, self.scratch.empty("W", (m, n), wanted))
                continue
            per_stack = stacked(m, len(self.shapes))
            first = i if not held else first
            stack = self.scratch.empty("stack", (per_stack * m, n), dtype)
            self.kernels.copy(W, stack[held * m : (held + 1) * m])
            held += 1
            following = numbers[place + 1] if place + 1 < len(numbers) else None
            if held == per_stack or following != i + 1 or self.shapes[following][0] != m:
                yield slice(first, i + 1), stack[: held * m]
                held = 0

    def factored(self, precision: str, alpha: float) -> tuple[Array, str]:
        """G (0, 0 where it is not needed again), and the dtype of the products that turned out to do."""
        work = working_dtype(self.shapes, precision)
        G = self.gram(work)
        if self.rescale():
            del G
            G = self.gram(work)
        root = self.cholesky_root(G, work)
        limit = float32_condition(self.shapes, alpha) if precision == "auto" else CHOLESKY_CONDITION
        if work == "float32" and (root is None or root.condition > limit or self.is_dominated):
            work = "float64"
            del root
            if not all(nearly_square(*shape) for shape in self.shapes):  # theirs were float64 already
                del G
                G = self.gram(work)
            root = self.cholesky_root(G, work)
        if root is None:
            if self.is_spare:
                del G
                G = self.gram(work)
            root = self.qr_root(G) if self.spread > SPREAD else self.eigen_root(G)
        if not self.any_tall:  # G has served, and R may be in its place
            G = self.kernels.empty((0, 0), "float64")
        self.root = root
        return G, work

    def drop_R(self) -> None:
        """R has served, unless λ is to be found by the R_i."""
        if not self.roots:
            self.root = replace(self.root, R=in_memory(self.root.null))

    def drop_P(self) -> None:
        """P has served."""
        self.root = replace(self.root, P=in_memory(self.root.null))

    def gram(self, work: str) -> Array:
        """G = Σ W_iᵀ W_i (n, n) float64."""
        self.grams.clear()
        kept = len(kept_grams([self.shapes[i] for i in self.own], self.cache_bytes, work))
        total = _Sum(self.n, self.kernels)
        for layers, X in self.stacks(0, work, near_square="float64"):
            if self.shapes[layers.start][0] < self.n:
                total.add_gram(X)
                continue
            keep = len(self.grams) < kept
            gram = self.gram_of(X, keep=keep)
            if keep:
                self.grams[layers.start] = gram
            total.add(gram)  # each G_i as it is used again: ties depend on G being their sum exactly
        self.norms = self.ranks.sum(
            np.array([self.norms[i] * (i in self.own) for i in range(len(self.shapes))])
        ).tolist()
        return self.ranks.sum(total.result())

    def gram_of(self, X: Array, *, keep: bool) -> Array:
        """XᵀX (n, n), in scratch memory unless it is to be kept."""
        shape, dtype = (self.n, self.n), dtype_name(X)
        out = self.kernels.empty(shape, dtype) if keep else self.scratch.empty("gram", shape, dtype)
        return self.kernels.syrk(X, out)

    def mean_resolvent(self, G: Array, alpha: float, work: str) -> Array:
        """T = (1/N) Σ (C_i + αI)⁻¹ (r, r) float64."""
        terms = _Resolvents(G, self.root, alpha, work, self.scratch)
        unwhitened = self.root.triangular and self.root.frame is None
        for i in list(self.grams) if unwhitened else ():
            self.advance(layer_flops(*self.shapes[i])[1])
            self.roots[i], self.sizes[i] = terms.add_unwhitened(self.grams.pop(i), keep=True)
        others = [i for i in self.own if i not in self.roots]
        for layers, X in self.stacks(1, work, numbers=others, near_square="float64" if unwhitened else None):
            m = self.shapes[layers.start][0]
            if unwhitened and m >= self.n:
                terms.add_unwhitened(self.gram_of(X, keep=False))
            else:
                terms.add_whitened(X, m)
        self.grams.clear()
        self.scratch.blocks.clear()
        T = self.ranks.sum(terms.sum())
        return self.kernels.axpby(1 / len(self.shapes), T, 0, T)

    def cholesky_root(self, G: Array, work: str) -> _Root | None:
        """The Cholesky factor of G as its root; None where G is singular or too badly conditioned for it.

        R takes G's place where that is spare.
        """
        kernels, shape = self.kernels, (self.n, self.n)
        if is_deficient(self.shapes):
            return None
        R = G if self.is_spare else kernels.axpby(1, G, 0, kernels.empty(shape, "float64"))
        condition = math.inf
        if kernels.potrf(R):
            P = kernels.trtri(kernels.copy(R, kernels.empty(shape, work)))
            condition = spectral_norm_of_triangle(kernels, R) * spectral_norm_of_triangle(kernels, P)
        condition = self.ranks.largest(condition)
        if not condition <= CHOLESKY_CONDITION:
            return None
        null = kernels.empty((0, self.n), "float64")
        return _Root(self.park(R), self.park(P), null, self.n, True, condition)

    def qr_root(self, G: Array) -> _Root:
        """R by a QR factorisation of all weights, for layers of different scales whose G is badly conditioned.

        As far as small layers go, G is rounding of the large ones. The null space is that of the Gram matrix of the
        weights divided by their norms; then R is updated layer by layer, in a frame in which the large layers'
        directions come first, and with large rows on top: Householder's method is then backward stable row by row.
        """
        kernels, n = self.kernels, self.n
        balanced = kernels.zeros((n, n), "float64")
        reciprocals = [_inverse_scale(norm) if norm else 0.0 for norm in self.norms]
        for _, X in self.stacks(0, "float64", reciprocals):
            kernels.syrk(X, balanced, beta=1)
        null, E = _split(*self.eigenvectors(self.ranks.sum(balanced)))
        seen = kernels.gemm(E, kernels.mirror(G), kernels.empty(tuple(E.shape), "float64"))
        inner = kernels.gemm(seen, E, kernels.empty((len(E), len(E)), "float64"), transpose_b=True)
        frame = _rotated(kernels, self.eigenvectors(_negated(kernels, inner))[1], E)
        R = kernels.zeros((0, len(frame)), "float64")
        for _, X in self.stacks(0, "float64"):
            R = self.stacked_qr(R, X, frame)
        for number in range(1, self.ranks.count):
            [part] = self.ranks.share([R], number)
            R = self.stacked_qr(R, part) if self.ranks.number == 0 else R
        [R] = self.ranks.share([R])
        P = kernels.trtri(kernels.copy(R, kernels.empty(tuple(R.shape), "float64")))
        condition = spectral_norm_of_triangle(kernels, R) * spectral_norm_of_triangle(kernels, P)
        return _Root(self.park(R), self.park(P), null, len(R), True, condition, frame)

    def stacked_qr(self, R: Array, X: Array, frame: Array | None = None) -> Array:
        """The triangular factor of R on top of X, or of X seen in a frame."""
        rows = self.kernels.empty((len(R) + len(X), R.shape[1]), "float64")
        rows[: len(R)] = R
        if frame is None:
            rows[len(R) :] = X
        else:
            self.kernels.gemm(X, frame, rows[len(R) :], transpose_b=True)
        lengths = self.kernels.row_dots(rows, rows)
        return self.kernels.qr(rows[np.argsort(-lengths, kind="stable").tolist()])

    def eigen_root(self, G: Array) -> _Root:
        """diag(√g) Eᵀ of G = E diag(g) Eᵀ as its root, the null space split off."""
        kernels = self.kernels
        values, E = self.eigenvectors(kernels.axpby(1, G, 0, kernels.zeros(tuple(G.shape), "float64")))
        null, E = _split(values, E)
        root = np.sqrt(values[len(null) :])
        condition = float(root[-1] / root[0]) if len(root) else 1.0
        scale = kernels.put(root[:, None])
        return _Root(in_memory(E * scale), in_memory(E / scale), null, len(E), False, condition)

    def eigenvectors(self, A: Array) -> tuple[Vector, Array]:
        """The same to the last bit in every rank: what follows depends on it."""
        found = self.kernels.syevd(A) if self.ranks.number == 0 else None
        values, E = self.ranks.share(found)
        return values, E

    def scales(self, V: HostArray, Dt: Array | None, work: str, alpha: float) -> list[HostArray]:
        """λ_i (n,) float32 of every layer, from V as stored; 0 in the null directions, the last n − rank.

        ``Dt`` (n, n) is D in rows where it is known.
        """
        kernels, rank = self.kernels, self.root.rank
        lengths = (kernels_of("cpu").norms(V, 0) * self.factor)[:rank]
        if Dt is None:
            inverse = kernels.inverse(kernels.put(V.astype(np.float64) * self.factor, work))
            if inverse is None:
                raise Unrepresentable(
                    "V is so badly conditioned that it is singular as it is stored; give `dtype=float32`"
                )
            Dt = inverse
        Dt = Dt[:rank]
        duals = np.sqrt(kernels.row_dots(Dt, Dt))
        factors = [self._own_factor(norm) for norm in self.norms]
        scales = np.sqrt(self._squares(kernels.put(Dt, work), factors, work, alpha))
        # ‖W_i‖ from λ_i and V: within rounding that matters here, as U's columns are unit vectors
        sizes = np.linalg.norm(scales * lengths, axis=1, keepdims=True)
        scales[(scales <= ROUNDING * sizes * duals) & (scales * lengths <= ROUNDING * sizes)] = 0
        scales *= np.array([self.factor / factor for factor in factors])[:, None]
        for layer, row in enumerate(scales):
            if bool(((row > 0) & (row < np.finfo(np.float32).tiny)).any()):
                raise Unrepresentable(
                    "its weights are so much smaller than others of its category that its scales leave float32", layer
                )
        return list(np.pad(scales, ((0, 0), (0, self.n - rank))).astype(np.float32))

    def _own_factor(self, norm: float) -> float:
        """The factor of a layer of this norm whose products are to be squared."""
        common = norm * self.factor
        return self.factor if not common or common >= _SAFE_NORM else _inverse_scale(norm)

    def _squares(self, Dt: Array, factors: Sequence[float], work: str, alpha: float) -> HostArray:
        """‖f_i W_i d_k‖² (N, r) float64 for the rows d_k of Dt (r, n), f_i being the factors."""
        squares = np.zeros((len(self.shapes), len(Dt)))
        lost = self._squares_by_roots(squares, Dt, factors, work, alpha)
        others = [i for i in self.own if i not in self.roots or i in lost]
        for layers, X in self.stacks(2, work, factors, others):
            m = self.shapes[layers.start][0]
            chosen = lost.get(layers.start)
            D = Dt if chosen is None else self.kernels.put(Dt[chosen])
            Y = self.kernels.gemm(D, X, self.scratch.empty("Y", (len(D), len(X)), work), transpose_b=True)
            for place, i in enumerate(range(layers.start, layers.stop)):
                own = Y[:, place * m : (place + 1) * m]
                squares[i, slice(None) if chosen is None else chosen] = self.kernels.row_dots(own, own)
        return self.ranks.sum(squares)

    def _squares_by_roots(
        self, squares: HostArray, Dt: Array, factors: Sequence[float], work: str, alpha: float
    ) -> dict[int, list[int]]:
        """Fill in λ² = ‖R_i d‖² − α dᵀGd where R_i is kept; of each such layer the k where that cancels too much."""
        lost: dict[int, list[int]] = {}
        if not self.roots:
            return lost
        lengths = self.kernels.row_dots(Dt, Dt)
        shift = alpha * self._squares_of(self.kernels.put(self.root.R(), work), Dt)
        for i, R in self.roots.items():
            self.advance(layer_flops(*self.shapes[i])[2])
            squares[i] = self._squares_of(R, Dt) - shift
            floor = CANCELLATION[work] * epsilon(work) * lengths * self.sizes[i] ** 2
            few = np.flatnonzero(~(squares[i] >= floor)).tolist()
            if few or factors[i] != self.factor:
                lost[i] = few if factors[i] == self.factor else list(range(len(Dt)))
        return lost

    def _squares_of(self, R: Array, Dt: Array) -> Vector:
        """‖R d‖² (r,) for the rows d of Dt (r, n), R (n, n) triangular."""
        Y = self.kernels.copy(Dt, self.scratch.empty("RD", tuple(Dt.shape), dtype_name(Dt)))
        self.kernels.trmm(Y, R, transpose=True)
        return self.kernels.row_dots(Y, Y)


class _Sum:
    """A float64 sum of Gram matrices XᵀX, whose products may be float32.

    float32 products are added up in float32 for a few thousand rows at a time, no more than one product has.
    """

    FLUSH_ROWS = 4096

    def __init__(self, n: int, kernels: Kernels) -> None:
        self.kernels = kernels
        self.sum = kernels.zeros((n, n), "float64")
        self.pending: Array | None = None
        self.rows = 0

    def add(self, gram: Array) -> None:
        """Add a symmetric matrix (n, n)."""
        self.kernels.axpby(1, gram, 1, self.sum)

    def add_gram(self, X: Array) -> None:
        """Add XᵀX for X (m, n)."""
        if dtype_name(X) == "float64":
            self.kernels.syrk(X, self.sum, beta=1)
            return
        if self.pending is None:
            self.pending = self.kernels.empty(tuple(self.sum.shape), "float32")
        self.kernels.syrk(X, self.pending, beta=1 if self.rows else 0)
        self.rows += len(X)
        if self.rows >= self.FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.pending is not None and self.rows:
            self.add(self.pending)
        self.rows = 0

    def result(self) -> Array:
        """The sum, symmetric."""
        self.flush()
        self.pending = None
        return self.sum


class _Resolvents:
    """The sum of (C_i + αI)⁻¹ over the layers, each by the cheapest of the equal formulas."""

    def __init__(self, G: Array, root: _Root, alpha: float, work: str, scratch: Scratch) -> None:
        self.G = G
        self.root = root
        self.alpha = alpha
        self.work = work
        self.kernels = scratch.kernels
        self.P: Array | None = None  #: loaded when it is needed
        self.r = root.rank
        self.scratch = scratch
        self.unwhitened: _Sum | None = None  #: Σ (G_i + αG)⁻¹
        self.tall: _Sum | None = None  #: Σ (Q_iᵀQ_i + αI)⁻¹
        self.wide: _Sum | None = None  #: Σ Q_iᵀ (Q_i Q_iᵀ + αI)⁻¹ Q_i
        self.wide_count = 0

    def add_unwhitened(self, gram: Array, *, keep: bool = False) -> tuple[Array, float]:
        """A layer with m ≥ n, by its Gram matrix G_i (n, n).

        Returns R_i with R_iᵀR_i = G_i + αG, in G_i's memory where that is of the working dtype, and the length of its
        longest column; unless it is to be kept, R_i is not to be used.
        """
        shape = tuple(gram.shape)
        shifted = self.kernels.axpby(1, gram, 0, self.scratch.empty("shifted", shape, "float64"))
        self.kernels.axpby(self.alpha, self.G, 1, shifted)
        longest = math.sqrt(float(self.kernels.get(shifted.diagonal()).max()))
        R = self._factored(shifted)
        if keep:
            same = dtype_name(gram) == self.work
            gram = self.kernels.copy(R, gram if same else self.kernels.empty(shape, self.work))
        self.unwhitened = self.unwhitened or _Sum(len(gram), self.kernels)
        self.unwhitened.add(self.kernels.potri(R))
        return gram, longest

    def add_whitened(self, W: Array, m: int) -> None:
        """Layers of any one height m, on top of each other in W, by Q_i = W_i P (m, r)."""
        kernels, r, dtype = self.kernels, self.r, dtype_name(W)
        if self.root.frame is not None:
            frame = kernels.put(self.root.frame, dtype)
            W = kernels.gemm(W, frame, self.scratch.empty("framed", (len(W), r), dtype), transpose_b=True)
        self.P = self.root.P() if self.P is None else self.P
        if self.root.triangular:
            Q = kernels.trmm(W, self.P)
        else:
            Q = kernels.gemm(W, self.P, self.scratch.empty("Q", (len(W), r), dtype), transpose_b=True)
        parts = [Q[rows] for rows in row_blocks(len(Q), m)]
        if m < r:
            for part in parts:
                S = kernels.syrk(part, self.scratch.empty("shifted", (m, m), dtype), rows=True)
                kernels.trsm(self._factored(kernels.add_diagonal(S, self.alpha)), part)
            self.wide = self.wide or _Sum(r, kernels)
            self.wide.add_gram(Q)
            self.wide_count += len(parts)
            return
        self.tall = self.tall or _Sum(r, kernels)
        for part in parts:
            C = kernels.syrk(part, self.scratch.empty("shifted", (r, r), dtype))
            self.tall.add(kernels.potri(self._factored(kernels.add_diagonal(C, self.alpha))))

    def _factored(self, A: Array) -> Array:
        if not self.kernels.potrf(A):
            raise NotPositiveDefinite("rounding has left a matrix without a Cholesky factor")
        return A

    def sum(self) -> Array:
        """Σ (C_i + αI)⁻¹ (r, r) float64, symmetric."""
        kernels = self.kernels
        parts = []
        if self.unwhitened is not None:
            parts.append(kernels.sygst(self.unwhitened.result(), self.root.R()))
        if self.tall is not None:
            parts.append(self.tall.result())
        if self.wide is not None:
            wide = self.wide.result()
            kernels.add_diagonal(kernels.axpby(-1 / self.alpha, wide, 0, wide), self.wide_count / self.alpha)
            parts.append(wide)
        T = parts[0]
        for part in parts[1:]:
            kernels.axpby(1, part, 1, T)
        return T


def _split(values: Vector, E: Array) -> tuple[Array, Array]:
    """The null space and the range, by the eigenvalues (n,), ascending, and eigenvectors in rows."""
    threshold = len(values) * float(np.finfo(np.float64).eps) * max(values[-1], 0)
    null = int((~(values > threshold)).sum())
    return E[:null] * 1.0, E[null:]  # memory of its own: it stays longer


def _negated(kernels: Kernels, A: Array) -> Array:
    """−A (n, n) symmetric, in its place: its eigenvalues ascend where A's descend."""
    return kernels.axpby(-1, A, 0, A)


def _rotated(kernels: Kernels, rotation: Array, rows: Array) -> Array:
    return kernels.gemm(rotation, rows, kernels.empty((len(rotation), rows.shape[1]), dtype_name(rows)))


def _untie(kernels: Kernels, Vt: Array, Dt: Array | None, tau: Vector, *, graded: bool) -> None:
    """Rotate V's columns, the rows of Vt (r, n), within each cluster of equal τ so that they are orthogonal there.

    With V = RᵀZ the rotation diagonalises Zᵀ R Rᵀ Z; the longest column comes first, as in an SVD. D's columns, the
    rows of Dt, turn with V's. ``graded`` says that lengths may differ so much that their squares would hide the short
    ones; then there is no Dt.
    """
    begin = 0
    while begin < len(tau):
        end = begin + 1
        while end < len(tau) and tau[end] - tau[begin] <= TIE * abs(tau[begin]):
            end += 1
        if end - begin > 1:
            cluster = Vt[begin:end]
            if graded:
                lengths, rows = kernels.svd(cluster)
                cluster[:] = rows * kernels.put(lengths[:, None])
            else:
                gram = kernels.syrk(cluster, kernels.empty((end - begin, end - begin), "float64"), rows=True)
                rotation = kernels.syevd(_negated(kernels, gram))[1]
                cluster[:] = _rotated(kernels, rotation, cluster)
                if Dt is not None:
                    Dt[begin:end] = _rotated(kernels, kernels.put(rotation, dtype_name(Dt)), Dt[begin:end])
        begin = end


def _append_null(Vt: HostArray, tau: Vector, null: HostArray, alpha: float) -> tuple[HostArray, Vector]:
    """V in rows, and τ, with the null directions last, as long as the others are on average (RMS)."""
    if not len(null):
        return Vt, tau
    length = math.sqrt(float(np.einsum("ij,ij->", Vt, Vt)) / len(Vt)) if len(Vt) else 1.0
    return np.concatenate([Vt, null * length]), np.concatenate([tau, np.full(len(null), 1 / alpha)])


def _store(Vt: HostArray, dtype: str, factor: float) -> tuple[HostArray, HostArray]:
    """V/factor (n, n) rounded to ``dtype``, the largest component of each column positive, and the columns' signs.

    ``Vt`` (n, n) has V's columns in rows, float64.
    """
    stored = _rounded(Vt, dtype, factor)
    if not _holds(stored, Vt, factor):
        lengths = np.linalg.norm(Vt, axis=1) / factor
        found = f"columns of V are from {lengths.min():.1e} to {lengths.max():.1e} long"
        others = [d for d in ("float32", "bfloat16") if _holds(_rounded(Vt, d, factor), Vt, factor)]
        advice = " or ".join(f"`dtype={d}`" for d in others)
        advice = f"give {advice}" if others else "no dtype can store it; rescale the weights"
        raise Unrepresentable(f"{found}, which does not fit {dtype}; {advice}")
    signs = np.ones(len(Vt), np.float32)
    for rows in row_blocks(len(Vt), _ROWS):
        block = stored[rows].astype(np.float32)
        peaks = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], axis=1)[:, 0]
        signs[rows][peaks < 0] = -1
        stored[rows] = block * signs[rows][:, None]
    return stored, signs


def _rounded(Vt: HostArray, dtype: str, factor: float) -> HostArray:
    stored = np.empty(Vt.shape, NAMED[dtype])
    with np.errstate(over="ignore"):
        for rows in row_blocks(len(Vt), _ROWS):
            stored[rows] = Vt[rows] / factor
    return stored


def _holds(stored: HostArray, Vt: HostArray, factor: float) -> bool:
    """Whether ``stored`` is Vt/factor to its dtype's rounding, row by row: nothing over- or underflowed."""
    tolerance = epsilon(stored.dtype.name)
    for rows in row_blocks(len(Vt), _ROWS):
        error = np.linalg.norm(stored[rows].astype(np.float64) * factor - Vt[rows], axis=1)
        if not bool((error <= tolerance * np.linalg.norm(Vt[rows], axis=1)).all()):
            return False
    return True


def _check_rounding(scales: Sequence[HostArray], rank: int, dtype: str) -> None:
    """See by Σ_i λ_ik² = 1 that V rounded to 16 bits still is the basis."""
    squares = np.square(scales, dtype=np.float64).sum(axis=0)[:rank]
    if dtype != "float32" and bool((np.abs(squares - 1) > 0.5).any()):
        raise Unrepresentable(f"V is too badly conditioned for {dtype}; give `dtype=float32`")


def _inverse_scale(norm: float) -> float:
    """A power of two by which a matrix of this norm comes near 1."""
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(norm)[1])))

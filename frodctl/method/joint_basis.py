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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from frodctl.errors import FrodctlError, InvalidInput
from frodctl.method.cost import STACK_ROWS, layer_flops
from frodctl.method.dual import inverse_transpose
from frodctl.method.linalg import (
    Scratch,
    add_gram_,
    full_float32,
    inverse_cholesky,
    mirror_,
    rough_norm,
    spectral_norm,
    times_upper,
)

if TYPE_CHECKING:
    from frodctl.arrays import Array, DType

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
ROUNDING = 8 * torch.finfo(torch.float32).eps
#: λ² = dᵀ G_i d is taken where it is at least this many times ε‖G_i‖‖d‖², else ‖W_i d‖².
CANCELLATION = 2.0**16
#: Norms of layers that differ by no more are of one scale: where G is badly conditioned it still has all of them.
SPREAD = 10.0
#: The layers but the largest have shares C_i of this size where their norms are so much smaller together; there
#: rounding to float32 would choose V.
DOMINANCE = 1e-3
#: Norms between this and its inverse can be squared and multiplied in float32 without a thought.
_SAFE_NORM = 2.0**-30


#: What torch raises where rounding leaves a matrix without a Cholesky factor.
NotPositiveDefinite: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class NonFiniteWeights(InvalidInput):
    """Some weight holds NaN or Inf; which one, the Gram matrices do not tell."""


class Unrepresentable(FrodctlError):
    """V or, where it has a number, the λ of layer ``layer`` cannot be stored."""

    def __init__(self, message: str, layer: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class Layers(Protocol):
    """The weights of one category, which may be walked as often as needed, always in the same order."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """(m_i, n) of each weight."""
        ...

    def __iter__(self) -> Iterator[Array]:
        """The weights W_i (m_i, n), floating point, on the CPU."""
        ...


@dataclass(frozen=True)
class JointBasis:
    """The joint basis of N weights of width n."""

    V: Array  #: (n, n) in the dtype asked for: the shared basis, null directions last
    tau: Array  #: (n,) float64, ascending; 1/α in null directions
    scales: list[Array]  #: λ_i, N tensors (n,) float32; 0 in null directions
    rank: int  #: number of directions that are not null
    condition: float  #: condition number of R on its range; estimated from below, to about 10 %
    precision: str  #: of the products: "float32" or "float64"

    @property
    def rms_singular_value(self) -> float:
        """Root mean square of the n singular values of the stacked weights, √(tr G/n) = ‖V‖_F/√n (G = V Vᵀ)."""
        return float(self.V[:, : self.rank].double().norm()) / math.sqrt(len(self.V))


@dataclass(frozen=True)
class _Root:
    """R (r, n) with G = RᵀR on its range, P (n, r) with R P = I, and the null space of G (n, n−r).

    With a frame E (n, r), EᵀE = I, they are R (r, r) and P (r, r) for the weights W_i E.
    """

    R: Array
    P: Array
    null: Array
    triangular: bool
    condition: float
    frame: Array | None = None


@full_float32()
def joint_basis(
    layers: Layers,
    *,
    alpha: float = 1e-3,
    precision: str = "auto",
    dtype: DType = torch.float32,
    device: torch.device | str = "cpu",
    cache_bytes: int = 0,
    advance: Callable[[float], None] = lambda flops: None,
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
    dtype : DType
        Of the stored V. λ is computed from V as stored.
    device : torch.device or str
        Where to compute.
    cache_bytes : int
        Memory for Gram matrices kept between passes instead of computed again.
    advance : callable
        Progress: called with the number of floating-point operations just done (of `cost.flops`).

    Returns
    -------
    JointBasis

    Raises
    ------
    NonFiniteWeights
        A weight holds NaN or Inf.
    Unrepresentable
        V does not fit ``dtype``, or some λ_i float32: numbers would over- or underflow, or V rounded so is another.
    """
    stack = _Stack(layers, torch.device(device), cache_bytes, advance)
    work = torch.float64 if precision == "float64" or stack.needs_float64 else torch.float32
    G = stack.gram(work)
    if stack.rescale():
        G = stack.gram(work)
    root = _cholesky_root(G)
    limit = stack.float32_condition(alpha) if precision == "auto" else CHOLESKY_CONDITION
    if work == torch.float32 and (root is None or root.condition > limit or stack.is_dominated):
        work = torch.float64
        if not all(map(_nearly_square, stack.shapes)):  # theirs were float64 already
            G = stack.gram(work)
            root = _cholesky_root(G)
    if root is None:
        root = stack.qr_root(G) if stack.spread > SPREAD else _eigen_root(G)
    T = stack.mean_resolvent(G, root, alpha, work)
    stack.scratch.blocks.clear()
    del G
    # T is as precise as the products it came from: float32 where there are wide weights only
    tau, Z = torch.linalg.eigh(T if stack.any_tall or T.is_cuda else T.to(work))
    del T
    tau = tau.double()
    V = _untie(root.R.T @ Z.double(), tau, graded=root.frame is not None)
    del Z
    V, tau = _append_null(V if root.frame is None else root.frame @ V, tau, root.null, alpha)
    rank, condition = root.P.shape[1], root.condition
    del root
    V = _store(V, dtype, stack.factor)
    scales = stack.scales(V, rank, work)
    _check_rounding(scales, rank, dtype)
    return JointBasis(V.cpu(), tau.cpu(), scales, rank, condition, _name(work))


class _Stack:
    """The three passes over the layers."""

    def __init__(
        self, layers: Layers, device: torch.device, cache_bytes: int, advance: Callable[[float], None]
    ) -> None:
        self.layers = layers
        self.shapes = layers.shapes
        self.n = self.shapes[0][1]
        self.device = device
        self.advance = advance
        self.scratch = Scratch(device)
        self.norms = [0.0] * len(self.shapes)  #: ‖W_i‖_F, known after the first pass
        self.factor = 1.0  #: a power of two, by which all weights are multiplied
        self.grams: dict[int, Array] = {}
        self.gram_room = int(cache_bytes // (8 * self.n**2))

    @property
    def any_tall(self) -> bool:
        return any(m >= n for m, n in self.shapes)

    def float32_condition(self, alpha: float) -> float:
        """Up to which condition number of R float32 products will do; their errors grow with its square over α."""
        limit = FLOAT32_CONDITION_TALL if self.any_tall else FLOAT32_CONDITION_WIDE
        return limit * min(1.0, math.sqrt(alpha / 1e-3))

    @property
    def needs_float64(self) -> bool:
        """Whether shapes alone tell that float32 products will not do.

        Where the layers but the highest have fewer than n rows together, that one has directions to itself, whose
        τ are equal (with N = 1 or Σ m_i ≤ n all are), and rounding must not decide V. Where wide weights are nearly
        square or stand beside tall ones, small τ drown in the rounding of the wide ones' terms.
        """
        heights = [m for m, _ in self.shapes]
        widest = max((m for m in heights if m < self.n), default=0)
        drowned = 2 * widest > self.n or (self.any_tall and widest > 0)
        return drowned or sum(heights) - max(heights) < self.n

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

    def stacks(self, step: int, work: DType, factors: Sequence[float] | None = None) -> Iterator[tuple[slice, Array]]:
        """The weights times their factors on the device, with the numbers of their layers; ``step`` is the pass.

        The factors, powers of two, are by default the common one. Wide weights come in the working dtype, several of
        one height on top of each other, as short matrices do not make the most of the machine; tall ones in any.
        """
        first, held = 0, 0
        for i, W in enumerate(self.layers):
            m, n = self.shapes[i]
            self.advance(layer_flops(m, n)[step])
            W = W.to(self.device)  # there first: a GPU converts faster
            if step == 0:
                self.norms[i] = rough_norm(W)
            factor = self.factor if factors is None else factors[i]
            if factor != 1:
                W = W.double() * factor
            if m >= n:
                yield slice(i, i + 1), W
                continue
            per_stack = max(1, STACK_ROWS // m)
            first = i if not held else first
            stack = self.scratch.empty("stack", (per_stack * m, n), work)
            stack[held * m : (held + 1) * m].copy_(W)
            held += 1
            if held == per_stack or i + 1 == len(self.shapes) or self.shapes[i + 1][0] != m:
                yield slice(first, i + 1), stack[: held * m]
                held = 0

    def gram(self, work: DType) -> Array:
        """G = Σ W_iᵀ W_i (n, n) float64."""
        self.grams.clear()
        total = _Sum(self.n, self.device)
        for layers, W in self.stacks(0, work):
            if self.shapes[layers.start][0] < self.n:
                total.add_gram(W)
                continue
            gram = self.gram_of(W, work, keep=len(self.grams) < self.gram_room)
            if len(self.grams) < self.gram_room:
                self.grams[layers.start] = gram
            total.sum += gram  # each G_i as it is used again: ties depend on G being their sum exactly
        return total.result()

    def gram_of(self, W: Array, work: DType, *, keep: bool) -> Array:
        """The upper triangle of WᵀW (n, n), in scratch memory unless it is to be kept."""
        shape = (self.n, self.n)
        dtype = torch.float64 if _nearly_square(tuple(W.shape)) else work
        kept = torch.empty(shape, dtype=dtype, device=self.device) if keep else self.scratch.empty("gram", shape, dtype)
        return add_gram_(kept, self.scratch.cast("W", W, dtype), beta=0)

    def mean_resolvent(self, G: Array, root: _Root, alpha: float, work: DType) -> Array:
        """T = (1/N) Σ (C_i + αI)⁻¹ (r, r) float64."""
        terms = _Resolvents(G, root, alpha, work, self.scratch)
        for layers, W in self.stacks(1, work):
            m = self.shapes[layers.start][0]
            if root.triangular and root.frame is None and m >= self.n:
                gram = self.grams.get(layers.start)
                terms.add_unwhitened(self.gram_of(W, work, keep=False) if gram is None else gram)
            else:
                terms.add_whitened(self.scratch.cast("W", W, work), m)
        return terms.mean()

    def qr_root(self, G: Array) -> _Root:
        """R by a QR factorisation of all weights, for layers of different scales whose G is badly conditioned.

        As far as small layers go, G is rounding of the large ones. The null space is that of the Gram matrix of the
        weights divided by their norms; then R is updated layer by layer, in a frame in which the large layers'
        directions come first, and with large rows on top: Householder's method is then backward stable row by row.
        """
        balanced = torch.zeros_like(G)
        reciprocals = [_inverse_scale(norm) if norm else 0.0 for norm in self.norms]
        for _, W in self.stacks(0, torch.float64, reciprocals):
            add_gram_(balanced, W.double())
        values, E = torch.linalg.eigh(mirror_(balanced))
        kept = values > len(G) * torch.finfo(G.dtype).eps * values[-1]
        null, E = E[:, ~kept], E[:, kept]
        E = (E @ torch.linalg.eigh(E.T @ G @ E)[1]).flip(1)
        R = E.new_empty(0, E.shape[1])
        for _, W in self.stacks(0, torch.float64):
            rows = torch.cat([R, W.double() @ E])
            order = torch.argsort(torch.linalg.vector_norm(rows, dim=1), descending=True, stable=True)
            R = torch.linalg.qr(rows[order], mode="r").R
        P = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
        return _Root(R, P, null, True, spectral_norm(R) * spectral_norm(P), E)

    def scales(self, V: Array, rank: int, work: DType) -> list[Array]:
        """λ_i (n,) float32 of every layer, from V as stored; 0 in the null directions, the last n − rank."""
        exact = V.double() * self.factor
        D = inverse_transpose(exact)
        if D is None:
            raise Unrepresentable("V is so badly conditioned that it is singular as it is stored; give `dtype=float32`")
        D = D[:, :rank]
        lengths, duals = (torch.linalg.vector_norm(X[:, :rank], dim=0).cpu() for X in (exact, D))
        D = D.to(work).contiguous()
        del exact
        factors = [self._own_factor(norm) for norm in self.norms]
        scales = self._norms_of_products(D, factors, work).cpu()
        # ‖W_i‖ from λ_i and V: within rounding that matters here, as U's columns are unit vectors
        sizes = torch.linalg.vector_norm(scales * lengths, dim=1, keepdim=True)
        rounding = (scales <= ROUNDING * sizes * duals) & (scales * lengths <= ROUNDING * sizes)
        scales[rounding] = 0
        scales *= torch.tensor([self.factor / factor for factor in factors], dtype=torch.float64)[:, None]
        for layer, row in enumerate(scales):
            if bool(((row > 0) & (row < torch.finfo(torch.float32).tiny)).any()):
                raise Unrepresentable(
                    "its weights are so much smaller than others of its category that its scales leave float32", layer
                )
        return list(torch.nn.functional.pad(scales, (0, self.n - rank)).float())

    def _own_factor(self, norm: float) -> float:
        """The factor of a layer of this norm whose products are to be squared."""
        common = norm * self.factor
        return self.factor if not common or common >= _SAFE_NORM else _inverse_scale(norm)

    def _norms_of_products(self, D: Array, factors: Sequence[float], work: DType) -> Array:
        """‖f_i W_i d_k‖ (N, r) float64 for the columns d_k of D (n, r), f_i being the factors."""
        rank = D.shape[1]
        squares = torch.zeros(len(self.shapes), rank, dtype=torch.float64, device=self.device)
        for layers, W in self.stacks(2, work, factors):
            m = self.shapes[layers.start][0]
            gram = self.grams.get(layers.start)
            shared = factors[layers.start] == self.factor
            if gram is not None and gram.dtype == work and m >= 2 * self.n and shared:  # λ² = dᵀ G_i d is the cheaper
                GD = torch.mm(mirror_(gram), D, out=self.scratch.empty("Y", (self.n, rank), work))
                squares[layers] = GD.mul_(D).sum(dim=0)
                floor = CANCELLATION * torch.finfo(work).eps * gram.diagonal().max() * D.square().sum(dim=0)
                lost = squares[layers.start] < floor
                if bool(lost.any()):
                    Y = self.scratch.cast("W", W, work) @ D[:, lost]
                    squares[layers.start, lost] = Y.square_().sum(dim=0).double()
                continue
            Y = torch.mm(self.scratch.cast("W", W, work), D, out=self.scratch.empty("Y", (len(W), rank), work))
            squares[layers] = torch.unflatten(Y.square_(), 0, (-1, m)).sum(dim=1).double()
        return squares.sqrt_()


class _Sum:
    """A float64 sum of Gram matrices XᵀX, whose products may be float32.

    float32 products are added up in float32 for a few thousand rows at a time, no more than one product has.
    """

    FLUSH_ROWS = 4096

    def __init__(self, n: int, device: torch.device) -> None:
        self.sum = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.pending: Array | None = None
        self.rows = 0

    def add_gram(self, X: Array, *, lower: bool = False) -> None:
        """Add XᵀX for X (m, n); ``lower`` says that X is lower triangular."""
        if X.dtype == self.sum.dtype:
            add_gram_(self.sum, X, lower=lower)
            return
        if self.pending is None:
            self.pending = torch.empty_like(self.sum, dtype=X.dtype)
        add_gram_(self.pending, X, beta=1 if self.rows else 0, lower=lower)
        self.rows += len(X)
        if self.rows >= self.FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        if self.pending is not None and self.rows:
            self.sum += self.pending
        self.rows = 0

    def result(self) -> Array:
        """The whole symmetric sum."""
        self.flush()
        return mirror_(self.sum)


class _Resolvents:
    """The sum of (C_i + αI)⁻¹ over the layers, each by the cheapest of the equal formulas."""

    def __init__(self, G: Array, root: _Root, alpha: float, work: DType, scratch: Scratch) -> None:
        self.G = G
        self.root = root
        self.alpha = alpha
        self.P = root.P.to(work)
        self.r = root.P.shape[1]
        self.scratch = scratch
        self.unwhitened: _Sum | None = None  #: Σ (G_i + αG)⁻¹
        self.tall: _Sum | None = None  #: Σ (Q_iᵀQ_i + αI)⁻¹
        self.wide: _Sum | None = None  #: Σ Q_iᵀ (Q_i Q_iᵀ + αI)⁻¹ Q_i
        self.wide_count = 0
        self.count = 0

    def add_unwhitened(self, gram: Array) -> None:
        """A layer with m ≥ n, by the upper triangle of its Gram matrix G_i (n, n)."""
        self.count += 1
        shifted = torch.add(gram, self.G, alpha=self.alpha, out=self.scratch.empty("shifted", tuple(gram.shape)))
        self.unwhitened = self.unwhitened or _Sum(len(gram), gram.device)
        inverse = inverse_cholesky(shifted, self.scratch.empty("inverse", tuple(gram.shape)))
        self.unwhitened.add_gram(inverse, lower=True)

    def add_whitened(self, W: Array, m: int) -> None:
        """Layers of any one height m, on top of each other in W, by Q_i = W_i P (m, r)."""
        r = self.r
        if self.root.frame is not None:
            W = W @ self.root.frame
        Q = self.scratch.empty("Q", (len(W), r), W.dtype)
        Q = times_upper(W, self.P, Q) if self.root.triangular else torch.mm(W, self.P, out=Q)
        self.count += len(W) // m
        if m < r:
            B = self.scratch.empty("B", (r, len(W)), W.dtype)  # of each layer, Bᵀ = Qᵀ L⁻ᵀ
            for part, out in zip(torch.split(Q, m), torch.split(B, m, dim=1), strict=True):
                times_upper(part.T, self._inverse_root(part.T).T, out)
            self.wide = self.wide or _Sum(r, W.device)
            self.wide.add_gram(B.T)
            self.wide_count += len(W) // m
            return
        self.tall = self.tall or _Sum(r, W.device)
        for part in torch.split(Q, m):
            self.tall.add_gram(self._inverse_root(part), lower=True)

    def _inverse_root(self, Q: Array) -> Array:
        """L⁻¹ (k, k) for QᵀQ + αI = LLᵀ, Q having k columns; in scratch memory."""
        k = Q.shape[1]
        C = add_gram_(self.scratch.empty("shifted", (k, k), Q.dtype), Q, beta=0)
        C.diagonal().add_(self.alpha)
        return inverse_cholesky(C, self.scratch.empty("inverse", (k, k), Q.dtype))

    def mean(self) -> Array:
        """T (r, r) float64."""
        T = torch.zeros(self.r, self.r, dtype=torch.float64, device=self.G.device)
        if self.unwhitened is not None:
            T += self.root.R @ self.unwhitened.result() @ self.root.R.T
        if self.tall is not None:
            T += self.tall.result()
        if self.wide is not None:
            T -= self.wide.result() / self.alpha
            T.diagonal().add_(self.wide_count / self.alpha)
        return mirror_(T.div_(self.count))


def _nearly_square(shape: tuple[int, ...]) -> bool:
    m, n = shape
    return n <= m < 2 * n


def _cholesky_root(G: Array) -> _Root | None:
    """The Cholesky factor of G as its root; None where G is singular or too badly conditioned for it."""
    L, info = torch.linalg.cholesky_ex(G)
    if int(info) != 0 or not bool(torch.isfinite(L.diagonal()).all()):
        return None
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    P = torch.linalg.solve_triangular(L, eye, upper=False).T
    condition = spectral_norm(L) * spectral_norm(P)
    if not condition <= CHOLESKY_CONDITION:
        return None
    return _Root(L.T, P.contiguous(), G.new_empty(len(G), 0), True, condition)


def _eigen_root(G: Array) -> _Root:
    """diag(√g) Eᵀ of G = E diag(g) Eᵀ as its root, the null space split off."""
    values, vectors = torch.linalg.eigh(G)
    threshold = len(G) * torch.finfo(G.dtype).eps * values[-1].clamp(min=0)
    kept = values > threshold
    root, E = values[kept].sqrt(), vectors[:, kept]
    condition = float(root[-1] / root[0]) if len(root) else 1.0
    return _Root(root[:, None] * E.T, E / root, vectors[:, ~kept], False, condition)


def _untie(V: Array, tau: Array, *, graded: bool) -> Array:
    """Rotate V's columns (n, r) within each cluster of equal τ so that they are orthogonal there.

    With V = RᵀZ the rotation diagonalises Zᵀ R Rᵀ Z; the longest column comes first, as in an SVD.
    ``graded`` says that lengths may differ so much that their squares would hide the short ones.
    """
    values = tau.tolist()
    begin = 0
    while begin < len(values):
        end = begin + 1
        while end < len(values) and values[end] - values[begin] <= TIE * abs(values[begin]):
            end += 1
        if end - begin > 1:
            cluster = V[:, begin:end]
            if graded:
                rotation = torch.linalg.svd(cluster, full_matrices=False).Vh.T
            else:
                rotation = torch.linalg.eigh(cluster.T @ cluster)[1].flip(1)
            V[:, begin:end] = cluster @ rotation
        begin = end
    return V


def _append_null(V: Array, tau: Array, null: Array, alpha: float) -> tuple[Array, Array]:
    """V and τ with the null directions last, as long as the others are on average (RMS)."""
    if null.shape[1] == 0:
        return V, tau
    length = V.square().sum(dim=0).mean().sqrt() if V.shape[1] else V.new_ones(())
    ceiling = tau.new_full((null.shape[1],), 1 / alpha)
    return torch.cat([V, null * length], dim=1), torch.cat([tau, ceiling])


def _store(V: Array, dtype: DType, factor: float) -> Array:
    """V/factor rounded to ``dtype``, the largest component of each column (by magnitude) made positive."""
    stored = (V / factor).to(dtype)
    if not _holds(stored, V, factor):
        lengths = torch.linalg.vector_norm(V, dim=0) / factor
        found = f"columns of V are from {float(lengths.min()):.1e} to {float(lengths.max()):.1e} long"
        others = [d for d in (torch.float32, torch.bfloat16) if _holds((V / factor).to(d), V, factor)]
        advice = " or ".join(f"`dtype={_name(d)}`" for d in others)
        advice = f"give {advice}" if others else "no dtype can store it; rescale the weights"
        raise Unrepresentable(f"{found}, which does not fit {_name(dtype)}; {advice}")
    peaks = stored.gather(0, stored.abs().argmax(dim=0, keepdim=True))
    return stored * torch.where(peaks < 0, -1, 1).to(dtype)


def _holds(stored: Array, V: Array, factor: float) -> bool:
    """Whether ``stored`` is V/factor to its dtype's rounding, column by column: nothing over- or underflowed."""
    error = torch.linalg.vector_norm(stored.double().mul_(factor).sub_(V), dim=0)
    return bool((error <= torch.finfo(stored.dtype).eps * torch.linalg.vector_norm(V, dim=0)).all())


def _check_rounding(scales: Sequence[Array], rank: int, dtype: DType) -> None:
    """See by Σ_i λ_ik² = 1 that V rounded to 16 bits still is the basis."""
    squares = torch.stack([scale.double().square() for scale in scales]).sum(dim=0)[:rank]
    if dtype != torch.float32 and bool(((squares - 1).abs() > 0.5).any()):
        raise Unrepresentable(f"V is too badly conditioned for {_name(dtype)}; give `dtype=float32`")


def _name(dtype: DType) -> str:
    return str(dtype).removeprefix("torch.")


def _inverse_scale(norm: float) -> float:
    """A power of two by which a matrix of this norm comes near 1."""
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(norm)[1])))

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
  and a cached G_i makes the cost independent of m.
- m < n: with Q_i = W_i R⁻¹, (1/α) (I − Q_iᵀ (Q_i Q_iᵀ + αI)⁻¹ Q_i), by Woodbury's identity.
- G badly conditioned or singular: R from an eigendecomposition of G, which also splits off its null space;
  then (Q_iᵀ Q_i + αI)⁻¹ or Woodbury, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from frodctl.errors import FrodctlError
from frodctl.method.cost import layer_flops
from frodctl.method.linalg import add_gram_, mirror_, spd_inverse, spectral_norm, times_upper

#: float32 products are used up to this condition number of R; there they leave τ within about 1e-6 τ_max.
FLOAT32_CONDITION = 50.0
#: Up to this one a Cholesky factor of G serves; beyond it, an eigendecomposition.
CHOLESKY_CONDITION = 1e3
#: τ equal to this relative difference are one eigenvalue, whose eigenvectors may be rotated.
TIE = 1e-6
#: λ below this fraction of the largest is written as 0.
NEGLIGIBLE_SCALE = 1e-6


class Layers(Protocol):
    """The weights of one category, which may be walked as often as needed, always in the same order."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """(m_i, n) of each weight."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """The weights W_i (m_i, n), floating point, on the CPU."""
        ...


@dataclass(frozen=True)
class JointBasis:
    """The joint basis of N weights of width n."""

    V: Tensor  #: (n, n) in the dtype asked for: the shared basis, null directions last
    tau: Tensor  #: (n,) float64, ascending; 1/α in null directions
    scales: list[Tensor]  #: λ_i, N tensors (n,) float32; 0 in null directions
    rank: int  #: number of directions that are not null
    condition: float  #: condition number of R on its range
    precision: str  #: of the products: "float32" or "float64"


@dataclass(frozen=True)
class _Root:
    """R (r, n) with G = RᵀR on its range, P (n, r) with R P = I, and the null space of G (n, n−r)."""

    R: Tensor
    P: Tensor
    null: Tensor
    triangular: bool
    condition: float


def joint_basis(
    layers: Layers,
    *,
    alpha: float = 1e-3,
    precision: str = "auto",
    dtype: torch.dtype = torch.float32,
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
        Dtype of the products with weights. Sums and factorisations are float64 always, and so are the Gram
        matrices of weights with m ≥ n. "auto" takes float32 where G is well conditioned (condition of R
        up to 50); "float32" up to 1000. Beyond that, and where N = 1 or Σ m_i ≤ n, it is float64.
    dtype : torch.dtype
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
    FrodctlError
        V cannot be represented in ``dtype``.
    """
    stack = _Stack(layers, torch.device(device), cache_bytes, advance)
    work = torch.float64 if precision == "float64" or stack.tied_by_shape else torch.float32
    G = stack.gram(work)
    root = _cholesky_root(G)
    limit = FLOAT32_CONDITION if precision == "auto" else CHOLESKY_CONDITION
    if work == torch.float32 and (root is None or root.condition > limit):
        work = torch.float64
        if stack.any_wide:  # narrower layers' Gram matrices were float64 already
            G = stack.gram(work)
            root = _cholesky_root(G)
    if root is None:
        root = _eigen_root(G)
    T = stack.mean_resolvent(G, root, alpha, work)
    del G
    tau, Z = torch.linalg.eigh(T)
    del T
    V = _untie(root.R.T @ Z, tau)
    del Z
    V, tau = _append_null(V, tau, root.null, alpha)
    rank, condition = root.P.shape[1], root.condition
    del root
    V = _store(V, dtype)
    scales = stack.scales(V, rank, work)
    return JointBasis(V.cpu(), tau.cpu(), scales, rank, condition, str(work).removeprefix("torch."))


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
        self.grams: dict[int, Tensor] = {}
        self.gram_room = int(cache_bytes // (8 * self.n**2))

    @property
    def any_wide(self) -> bool:
        return any(m < n for m, n in self.shapes)

    @property
    def tied_by_shape(self) -> bool:
        """Whether T is a multiple of I for reasons of shape alone, so that rounding must not decide V."""
        return len(self.shapes) == 1 or sum(m for m, _ in self.shapes) <= self.n

    def weights(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Each layer's number and weight on the device; ``step`` is the pass, for progress."""
        for i, W in enumerate(self.layers):
            yield i, W.to(self.device)
            self.advance(layer_flops(*self.shapes[i])[step])

    def zeros(self, n: int) -> Tensor:
        return torch.zeros(n, n, dtype=torch.float64, device=self.device)

    def gram(self, work: torch.dtype) -> Tensor:
        """G = Σ W_iᵀ W_i (n, n) float64."""
        self.grams.clear()
        G = self.zeros(self.n)
        for i, W in self.weights(0):
            m, n = W.shape
            if m < n:
                add_gram_(G, W.to(work))
            elif len(self.grams) < self.gram_room:
                self.grams[i] = add_gram_(self.zeros(n), W.double())
                G += self.grams[i]
            else:
                add_gram_(G, W.double())
        for gram in self.grams.values():
            mirror_(gram)
        return mirror_(G)

    def mean_resolvent(self, G: Tensor, root: _Root, alpha: float, work: torch.dtype) -> Tensor:
        """T = (1/N) Σ (C_i + αI)⁻¹ (r, r) float64."""
        r = root.P.shape[1]
        P = root.P.to(work)
        T = self.zeros(r)
        unwhitened: Tensor | None = None
        correction: Tensor | None = None
        wide = 0
        for i, W in self.weights(1):
            if root.triangular and W.shape[0] >= self.n:
                gram = self.grams.get(i)
                gram = mirror_(add_gram_(self.zeros(self.n), W.double())) if gram is None else gram
                inverse = spd_inverse(gram + alpha * G)
                unwhitened = inverse if unwhitened is None else unwhitened.add_(inverse)
                continue
            Q = times_upper(W.to(work), P) if root.triangular else W.to(work) @ P
            if Q.shape[0] < r:
                K = mirror_(add_gram_(torch.zeros_like(Q[:, : len(Q)]), Q.T))
                K.diagonal().add_(alpha)
                B = torch.linalg.solve_triangular(torch.linalg.cholesky(K), Q, upper=False)
                correction = add_gram_(self.zeros(r) if correction is None else correction, B)
                wide += 1
            else:
                C = mirror_(add_gram_(self.zeros(r), Q))
                C.diagonal().add_(alpha)
                T += spd_inverse(C)
        if unwhitened is not None:
            T += root.R @ unwhitened @ root.R.T
        if correction is not None:
            T -= mirror_(correction) / alpha
            T.diagonal().add_(wide / alpha)
        return mirror_(T.div_(len(self.shapes)))

    def scales(self, V: Tensor, rank: int, work: torch.dtype) -> list[Tensor]:
        """λ_i (n,) float32 of every layer, from V as stored; 0 in the null directions, the last n − rank."""
        D = torch.linalg.inv(V.double()).T[:, :rank].contiguous()
        narrow = D.to(work)
        squares: list[Tensor] = []
        for i, W in self.weights(2):
            if i in self.grams and _gram_is_cheaper(W.shape[0], self.n, work):
                square = ((self.grams[i] @ D) * D).sum(dim=0).clamp_(min=0)
            else:
                Y = W.to(work) @ narrow
                square = torch.linalg.vector_norm(Y, dim=0, dtype=torch.float64).square()
            squares.append(square)
        scales = torch.zeros(len(squares), self.n, dtype=torch.float64)
        scales[:, :rank] = torch.stack(squares).sqrt().cpu()
        scales[scales < NEGLIGIBLE_SCALE * scales.max()] = 0
        return list(scales.float())


def _gram_is_cheaper(m: int, n: int, work: torch.dtype) -> bool:
    """Whether n³ products in float64 cost less than m n² in the working precision (float64 at half speed)."""
    return (2 * n if work == torch.float32 else n) < m


def _cholesky_root(G: Tensor) -> _Root | None:
    """The Cholesky factor of G as its root; None where G is singular or too badly conditioned for it."""
    L, info = torch.linalg.cholesky_ex(G)
    if int(info) != 0 or not bool(torch.isfinite(L.diagonal()).all()):
        return None
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    P = torch.linalg.solve_triangular(L, eye, upper=False).T
    condition = spectral_norm(L) * spectral_norm(P)
    if not condition <= CHOLESKY_CONDITION:
        return None
    return _Root(L.T, P.contiguous(), G[:, :0], True, condition)


def _eigen_root(G: Tensor) -> _Root:
    """diag(√g) Eᵀ of G = E diag(g) Eᵀ as its root, the null space split off."""
    values, vectors = torch.linalg.eigh(G)
    threshold = len(G) * torch.finfo(G.dtype).eps * values[-1].clamp(min=0)
    kept = values > threshold
    root, E = values[kept].sqrt(), vectors[:, kept]
    condition = float(root[-1] / root[0]) if len(root) else 1.0
    return _Root(root[:, None] * E.T, E / root, vectors[:, ~kept], False, condition)


def _untie(V: Tensor, tau: Tensor) -> Tensor:
    """Rotate V's columns (n, r) within each cluster of equal τ so that they are orthogonal there.

    With V = RᵀZ the rotation diagonalises Zᵀ R Rᵀ Z; the longest column comes first, as in an SVD.
    """
    values = tau.tolist()
    begin = 0
    while begin < len(values):
        end = begin + 1
        while end < len(values) and values[end] - values[begin] <= TIE * abs(values[begin]):
            end += 1
        if end - begin > 1:
            cluster = V[:, begin:end]
            _, rotation = torch.linalg.eigh(cluster.T @ cluster)
            V[:, begin:end] = cluster @ rotation.flip(1)
        begin = end
    return V


def _append_null(V: Tensor, tau: Tensor, null: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """V and τ with the null directions last, as long as the others are on average (RMS)."""
    if null.shape[1] == 0:
        return V, tau
    length = V.square().sum(dim=0).mean().sqrt() if V.shape[1] else V.new_ones(())
    ceiling = tau.new_full((null.shape[1],), 1 / alpha)
    return torch.cat([V, null * length], dim=1), torch.cat([tau, ceiling])


def _store(V: Tensor, dtype: torch.dtype) -> Tensor:
    """V rounded to ``dtype``, the largest component of each column (by magnitude) made positive."""
    V = V.to(dtype)
    if not bool(torch.isfinite(V).all()):
        raise FrodctlError(f"the basis does not fit {dtype}; store it as float32 or bfloat16")
    peaks = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    return V * torch.where(peaks < 0, -1, 1).to(dtype)

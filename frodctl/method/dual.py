"""V⁻ᵀ of a stored V, and where products with it may be taken in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from frodctl.arrays import dtype_name
from frodctl.method.linalg import spectral_norm

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Kernels


@dataclass(frozen=True)
class Accuracy:
    """What V must be for a product W V⁻ᵀ in float32 to do; else it is taken in float64."""

    condition: float  #: cond(V) at most
    width: int = 0  #: n at least
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  #: of V as stored


#: U is rounded to V's dtype afterwards: about one of its entries in 4,000 is then rounded to the other neighbour, which
#: only a small matrix would feel.
ROUNDED_AFTERWARDS = Accuracy(condition=16, width=512, dtypes=("bfloat16",))
#: U is to be right to about 1e-6 (and the weight has a share in each of V's directions).
TO_A_MILLIONTH = Accuracy(condition=64)


@dataclass(frozen=True, eq=False)
class Dual:
    """V and V⁻¹ (n, n) in float64 on a device; where V is singular the pseudo-inverse."""

    V: Array
    inverse: Array
    stored: str  #: V's dtype as it was given
    regular: bool
    kernels: Kernels

    @classmethod
    def of(cls, V: Array, kernels: Kernels) -> Dual:
        """Of V (n, n) as it is stored, computed on the device."""
        exact = kernels.put(V, "float64")
        inverse = kernels.inverse(kernels.copy(exact, kernels.empty(tuple(V.shape), "float64")))
        regular = inverse is not None
        if inverse is None:
            inverse = kernels.put(np.linalg.pinv(kernels.get(exact), 1e-6))
        return cls(exact, inverse, dtype_name(V), regular, kernels)

    @property
    def D(self) -> Array:
        """V⁻ᵀ (n, n), a view."""
        return self.inverse.T

    @cached_property
    def condition(self) -> float:
        """cond(V), mostly within a few per cent; infinity where V is singular."""
        return self._norm(self.V) * self._norm(self.inverse) if self.regular else float("inf")

    def work(self, accuracy: Accuracy) -> str:
        """The dtype in which products W V⁻ᵀ are taken."""
        cheap = self.stored in accuracy.dtypes and len(self.V) >= accuracy.width
        return "float32" if cheap and self.condition <= accuracy.condition else "float64"

    def _norm(self, A: Array) -> float:
        kernels, n = self.kernels, len(A)

        def times(X: Array, *, transpose: bool) -> Array:
            return kernels.gemm(X, A, kernels.empty(tuple(X.shape), "float64"), transpose_b=transpose)

        forward, adjoint = (lambda X: times(X, transpose=False)), (lambda X: times(X, transpose=True))
        return spectral_norm(forward, adjoint, n, kernels, "float64")

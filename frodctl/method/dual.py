"""V⁻ᵀ of a stored V, and where it may be computed, and products with it taken, in float32."""

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
    """What V must be for V⁻ᵀ and a product W V⁻ᵀ in float32 to do; else they are taken in float64."""

    condition: float  #: cond(V) at most
    width: int = 0  #: n at least
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  #: of V as stored

    def may_hold(self, stored: str, n: int) -> bool:
        """Whether its condition number decides."""
        return stored in self.dtypes and n >= self.width


#: U is rounded to V's dtype afterwards: at n = 2048 one entry in 40 is then rounded to the other neighbour, and one in
#: 60 where PEFT solves for it, in float32 too. Rounding of W' to bfloat16 is five times as large as what comes of
#: that; only a small matrix would feel it.
ROUNDED_AFTERWARDS = Accuracy(condition=16, width=512, dtypes=("bfloat16",))
#: U is to be right to about 1e-6 (and the weight has a share in each of V's directions).
TO_A_MILLIONTH = Accuracy(condition=64)


@dataclass(frozen=True, eq=False)
class Dual:
    """V, as it was given, and V⁻¹ (n, n) on a device; where V is singular the pseudo-inverse."""

    V: Array
    inverse: Array  #: in float64 unless less was asked for
    regular: bool
    kernels: Kernels

    @classmethod
    def of(cls, V: Array, kernels: Kernels, enough: Accuracy | None = None) -> Dual:
        """Of V (n, n) as it is stored, computed on the device; in float32 where that is accurate ``enough``."""
        if enough is not None and enough.may_hold(dtype_name(V), len(V)):
            found = cls._inverted(V, kernels, "float32")
            if found is not None and found.condition <= enough.condition:
                return found
        found = cls._inverted(V, kernels, "float64")
        if found is not None:
            return found
        exact = kernels.get(kernels.put(V, "float64"))
        return cls(kernels.put(V), kernels.put(np.linalg.pinv(exact, 1e-6)), False, kernels)

    @classmethod
    def _inverted(cls, V: Array, kernels: Kernels, dtype: str) -> Dual | None:
        """V and its inverse in the dtype; None where it has none."""
        given = kernels.put(V)
        inverse = kernels.inverse(kernels.copy(given, kernels.empty(tuple(V.shape), dtype)))
        return None if inverse is None else cls(given, inverse, True, kernels)

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
        cheap = accuracy.may_hold(dtype_name(self.V), len(self.V)) and self.condition <= accuracy.condition
        return "float32" if cheap else "float64"

    def _norm(self, A: Array) -> float:
        kernels, n = self.kernels, len(A)
        dtype = "float64" if dtype_name(A) == "float64" else "float32"
        A = kernels.put(A, dtype)

        def times(X: Array, *, transpose: bool) -> Array:
            return kernels.gemm(X, A, kernels.empty(tuple(X.shape), dtype), transpose_b=transpose)

        forward, adjoint = (lambda X: times(X, transpose=False)), (lambda X: times(X, transpose=True))
        return spectral_norm(forward, adjoint, n, kernels, dtype)

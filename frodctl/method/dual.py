"""V⁻ᵀ of a stored V, and where products with it may be taken in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from frodctl.method.linalg import spectral_norm

if TYPE_CHECKING:
    from frodctl.arrays import Array, DType


@dataclass(frozen=True)
class Accuracy:
    """What V must be for a product W V⁻ᵀ in float32 to do; else it is taken in float64."""

    condition: float  #: cond(V) at most
    width: int = 0  #: n at least
    dtypes: tuple[DType, ...] = (torch.float32, torch.bfloat16, torch.float16)  #: of V as stored


#: U is rounded to V's dtype afterwards: about one of its entries in 4,000 is then rounded to the other neighbour, which
#: only a small matrix would feel.
ROUNDED_AFTERWARDS = Accuracy(condition=16, width=512, dtypes=(torch.bfloat16,))
#: U is to be right to about 1e-6 (and the weight has a share in each of V's directions).
TO_A_MILLIONTH = Accuracy(condition=64)


@dataclass(frozen=True, eq=False)
class Dual:
    """V and V⁻ᵀ (n, n) in float64; where V is singular the pseudo-inverse's transpose."""

    V: Array
    D: Array
    stored: DType  #: of V
    regular: bool

    @classmethod
    def of(cls, V: Array, device: torch.device | None = None) -> Dual:
        """Of V (n, n) as it is stored, computed on the device."""
        exact = V.detach().to(device or V.device, torch.float64)
        D = inverse_transpose(exact)
        regular = D is not None
        return cls(exact, torch.linalg.pinv(exact, rtol=1e-6).T if D is None else D, V.dtype, regular)

    @cached_property
    def condition(self) -> float:
        """cond(V), mostly within a few per cent; infinity where V is singular."""
        return spectral_norm(self.V) * spectral_norm(self.D.T) if self.regular else float("inf")

    def work(self, accuracy: Accuracy) -> DType:
        """The dtype in which products W V⁻ᵀ are taken."""
        cheap = self.stored in accuracy.dtypes and len(self.V) >= accuracy.width
        return torch.float32 if cheap and self.condition <= accuracy.condition else torch.float64


def inverse_transpose(V: Array) -> Array | None:
    """V⁻ᵀ (n, n) for V in float64; None where V is singular."""
    inverse: Array
    inverse, failed = torch.linalg.inv_ex(V)
    return None if failed or not torch.isfinite(inverse).all() else inverse.T

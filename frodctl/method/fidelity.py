"""How much of a matrix is in another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method.linalg import element_blocks

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

_BLOCK = 1 << 18  # elements that are compared at a time


@dataclass(frozen=True)
class Fidelity:
    """How near Y comes to X, by Frobenius' norm and inner product; but for the norm None where X = 0."""

    norm: float  #: ‖X‖
    kept: float | None  #: ⟨Y, X⟩/‖X‖²
    distance: float | None  #: ‖Y − X‖/‖X‖

    @classmethod
    def of(cls, X: HostArray, Y: HostArray) -> Fidelity:
        """Of two matrices (m, n), in float64."""
        terms = np.zeros(3)
        for rows in element_blocks(X.shape, _BLOCK):
            x, y = X[rows].astype(np.float64), Y[rows].astype(np.float64)
            d = y - x
            terms += [np.einsum("ij,ij->", *pair) for pair in ((x, x), (x, y), (d, d))]
        return cls.from_terms(*map(float, terms))

    @classmethod
    def from_terms(cls, XX: float, XY: float, DD: float) -> Fidelity:
        """From ‖X‖², ⟨X, Y⟩ and ‖Y − X‖²."""
        return cls(math.sqrt(XX), XY / XX if XX else None, math.sqrt(DD / XX) if XX else None)

    def as_dict(self) -> dict[str, float | None]:
        """By the names that tables and JSON have for them."""
        return {"delta_norm": self.norm, "kept": self.kept, "distance": self.distance}

    @property
    def terms(self) -> tuple[float, float, float]:
        """‖X‖², ⟨X, Y⟩ and ‖Y − X‖²: those of several matrices add up to those of all together."""
        square = self.norm**2
        return square, square * (self.kept or 0.0), square * (self.distance or 0.0) ** 2


def together(parts: list[Fidelity]) -> Fidelity:
    """Of several matrices as one."""
    XX, XY, DD = (sum(part.terms[number] for part in parts) for number in range(3))
    return Fidelity.from_terms(XX, XY, DD)

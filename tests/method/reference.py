"""The joint decomposition by its definition, in float64, through QR of the stacked weights (design: Kempf et al.)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from frodctl.arrays import HostArray, dtype_name, from_torch, to_torch
from frodctl.method import joint_basis as method
from frodctl.method.kernels import Kernels, kernels_of

Array = npt.NDArray[np.float64]


class Arrays:
    """Weights in memory, as the method takes them."""

    def __init__(self, weights: Sequence[HostArray]) -> None:
        self.weights = weights
        self.shapes = [(w.shape[0], w.shape[1]) for w in weights]

    def read(self, numbers: Sequence[int]) -> Iterator[HostArray]:
        return (self.weights[number] for number in numbers)


class Layers(Arrays):
    """Of torch's tensors."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__([from_torch(w) for w in weights])


@dataclass(frozen=True)
class Basis:
    """A `JointBasis` in torch's tensors, with which the tests reckon."""

    V: torch.Tensor
    tau: torch.Tensor
    scales: list[torch.Tensor]
    rank: int
    condition: float
    precision: str
    rms_singular_value: float


def joint_basis(
    layers: Layers, *, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None, **options: Any
) -> Basis:
    """`frodctl.method.joint_basis` of weights in torch's tensors, on the CPU's kernels unless others are given."""
    name = dtype_name(torch.empty(0, dtype=dtype))
    found = method.joint_basis(layers, dtype=name, kernels=kernels or kernels_of("cpu"), **options)
    return Basis(
        **vars(found)
        | {"V": to_torch(found.V), "tau": to_torch(found.tau), "scales": [to_torch(scale) for scale in found.scales]}
    )


def resolvent(weights: Sequence[torch.Tensor], alpha: float) -> tuple[Array, Array]:
    """R and T of the full-rank definition: QR of the stack, T = (1/N) Σ (Q_iᵀQ_i + αI)⁻¹."""
    stacked = np.concatenate([w.double().numpy() for w in weights])
    q, r = np.linalg.qr(stacked)
    total = np.zeros_like(r)
    start = 0
    for w in weights:
        block = q[start : start + len(w)]
        start += len(w)
        total += np.linalg.inv(block.T @ block + alpha * np.eye(len(r)))
    return r, (total + total.T) / (2 * len(weights))


def tau(weights: Sequence[torch.Tensor], alpha: float) -> Array:
    """Eigenvalues of T, ascending."""
    return np.linalg.eigvalsh(resolvent(weights, alpha)[1])


def eigen_residual(weights: Sequence[torch.Tensor], alpha: float, V: torch.Tensor) -> float:
    """As in `tau_and_residual`."""
    return tau_and_residual(weights, alpha, V)[1]


def tau_and_residual(weights: Sequence[torch.Tensor], alpha: float, V: torch.Tensor) -> tuple[Array, float]:
    """Also the largest ‖T z − (zᵀTz) z‖ / τ_max over the unit vectors z = R⁻ᵀ v of V's columns v."""
    r, T = resolvent(weights, alpha)
    z = np.linalg.solve(r.T, V.double().numpy())
    z /= np.linalg.norm(z, axis=0)
    Tz = T @ z
    values = np.linalg.eigvalsh(T)
    return values, float(np.linalg.norm(Tz - z * (z * Tz).sum(axis=0), axis=0).max() / values[-1])


def reconstruction_errors(
    weights: Sequence[torch.Tensor], V: torch.Tensor, scales: Sequence[torch.Tensor]
) -> list[float]:
    """‖U diag(λ) Vᵀ − W‖ / ‖W‖ for each layer, U being the unit columns of W V⁻ᵀ (0 where λ is)."""
    v = V.double().numpy()
    dual = np.linalg.inv(v).T
    errors = []
    for weight, scale in zip(weights, scales, strict=True):
        w, lam = weight.double().numpy(), scale.double().numpy()
        y = w @ dual
        lengths = np.linalg.norm(y, axis=0)
        u = np.divide(y, lengths, out=np.zeros_like(y), where=(lam > 0) & (lengths > 0))
        errors.append(float(np.linalg.norm((u * lam) @ v.T - w) / max(np.linalg.norm(w), 1e-300)))
    return errors

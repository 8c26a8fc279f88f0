"""Between torch's tensors and the arrays that the kernels of their device take."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from frodctl.arrays import from_torch, to_torch
from frodctl.method.kernels import Kernels, kernels_of

if TYPE_CHECKING:
    from frodctl.arrays import Array


def kernels_on(device: torch.device) -> Kernels:
    """The kernels of a device; the CPU's for mps, which has no float64."""
    return kernels_of("cpu" if device.type in ("cpu", "mps") else str(device))


def array_of(tensor: Tensor, kernels: Kernels) -> Array:
    """What the kernels take for a tensor, wherever it is; without a copy where it is there."""
    return from_torch(tensor.cpu()) if kernels.name == "cpu" else cast("Array", tensor)


def tensor_of(array: Array) -> Tensor:
    """The tensor for what kernels gave, without a copy."""
    return array if isinstance(array, Tensor) else to_torch(array)

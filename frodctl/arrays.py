"""What a weight's numbers are held in: numpy arrays on the CPU, torch tensors on a GPU and in training.

bfloat16 and the 8-bit dtypes are those of ml_dtypes, which numpy converts at full speed, rounding to nearest even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

HostArray: TypeAlias = npt.NDArray[Any]
#: On a GPU these are torch's tensors. What is done with them outside `Kernels` (slices, sums and products in place,
#: elementwise) they write as numpy does, and are checked as such.
Array: TypeAlias = npt.NDArray[Any]

#: By their names in the safetensors format.
DTYPES = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16), "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64), "U64": np.dtype(np.uint64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "C64": np.dtype(np.complex64),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: By torch's and numpy's names.
NAMED = {dtype.name: dtype for dtype in DTYPES.values()}

#: torch has no numpy of these; their bits go through integers.
_VIEWED = {
    "bfloat16": (np.int16, ml_dtypes.bfloat16),
    "float8_e4m3fn": (np.int8, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (np.int8, ml_dtypes.float8_e5m2),
}


def dtype_name(X: Array | torch.Tensor) -> str:
    """ "float32", whether the array is numpy's or torch's."""
    return str(X.dtype).removeprefix("torch.")


def epsilon(dtype: str) -> float:
    """The distance from 1 to the next number of a floating dtype, by its name."""
    found: ml_dtypes.finfo = ml_dtypes.finfo(NAMED[dtype])  # type: ignore[no-untyped-call]
    return float(found.eps)


def from_torch(tensor: torch.Tensor) -> HostArray:
    """The array of a CPU tensor, without a copy."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach()
    if name not in _VIEWED:
        return tensor.numpy()
    carrier, dtype = _VIEWED[name]
    return tensor.view(getattr(torch, np.dtype(carrier).name)).numpy().view(dtype)


def to_torch(array: HostArray) -> torch.Tensor:
    """The CPU tensor of an array, without a copy where the array may be written to."""
    import torch

    array = array if array.flags.writeable else array.copy()
    name = array.dtype.name
    if name not in _VIEWED:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_VIEWED[name][0])).view(getattr(torch, name))

"""The tensors' bytes, read one tensor at a time, and their digests.

Files are read into buffers of our own, never mapped, so that what was read does not stay resident.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from frodctl.arrays import DTYPES
from frodctl.checkpoint.source import Folder, Source
from frodctl.errors import InvalidInput, OutOfResources

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.checkpoint.records import Scaled, TensorInfo  # which compares tensors' bytes to find ties

_PIECE = 1 << 18  # elements


def read_tensor(source: Source | Path, info: TensorInfo, buffer: HostArray | None = None) -> HostArray:
    """Read one tensor, or a slice of one (`TensorInfo.slice`), in its stored dtype and shape.

    ``source`` may be the folder of its file. The bytes go to the beginning of ``buffer`` (uint8) if one is given, else
    to fresh memory. The result is contiguous (except where a pickled tensor was stored with other strides) and aligned
    regardless of its place in the file, so that equal bytes give equal arithmetic. A weight that is stored with scales
    becomes its values: the products in float32, each rounded once.

    Raises
    ------
    InvalidInput
        The file has become shorter than its header says.
    OutOfResources
        There is no memory for it.
    """
    if info.data is not None:
        return info.data
    if isinstance(source, Path):
        source = Folder(source)
    nbytes = info.nbytes
    buffer = _empty(nbytes, info.name) if buffer is None else buffer[:nbytes]
    if info.scaled is not None:
        return _dequantized(source, info.scaled, buffer)
    source.read(info, tensor_bytes(buffer))
    flat: HostArray = buffer.view(DTYPES[info.dtype])
    if info.stride is None:
        flat.shape = info.shape
        return flat
    found: HostArray = np.lib.stride_tricks.as_strided(flat, info.shape, [s * flat.itemsize for s in info.stride])
    return found


def _dequantized(source: Source, scaled: Scaled, buffer: HostArray) -> HostArray:
    """The values of a matrix with scales, in float32 in the buffer, which has their size."""
    (m, n), (height, width) = scaled.codes.shape, scaled.block
    values: HostArray = buffer.view(np.float32).reshape(m, n)
    codes = buffer[len(buffer) - m * n :]  # its last quarter, where values come after what was there has been used
    source.read(scaled.codes, tensor_bytes(codes))
    codes = codes.view(DTYPES[scaled.codes.dtype]).reshape(m, n)
    scales = read_tensor(source, scaled.scales).astype(np.float32).reshape(-(-m // height), -(-n // width))
    step = max(1, _PIECE // n)
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        factors = scales[np.arange(m)[rows] // height]
        factors = factors if width >= n else np.repeat(factors, width, axis=1)[:, :n]
        np.multiply(codes[rows].astype(np.float32), factors, out=values[rows])
    return values


def _empty(nbytes: int, name: str) -> HostArray:
    try:
        return np.empty(nbytes, np.uint8)
    except MemoryError:
        raise OutOfResources(f"out of memory: tensor {name} takes {nbytes / 1e9:.2f} GB") from None


def tensor_bytes(tensor: HostArray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return tensor.reshape(-1).view(np.uint8).data


def digest(tensor: HostArray) -> str:
    """``sha256:…`` of the tensor's bytes in their stored order."""
    if not tensor.flags.c_contiguous:  # a view over a pickled storage: its bytes are the storage's
        tensor = np.lib.stride_tricks.as_strided(tensor, (_span(tensor),), (tensor.itemsize,))
    return "sha256:" + hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _span(tensor: HostArray) -> int:
    last: int = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    return 1 + last // tensor.itemsize


def check_finite(tensor: HostArray, name: str, file: str) -> None:
    """Raise `InvalidInput` that names the tensor if it holds NaN or Inf."""
    rows = tensor.reshape(-1) if tensor.flags.c_contiguous else tensor
    step = max(1, _PIECE * len(rows) // max(1, rows.size))
    bad = sum(int((~np.isfinite(rows[i : i + step])).sum()) for i in range(0, len(rows), step))
    if bad:
        raise InvalidInput(f"{file}: tensor {name} holds {bad} values that are NaN or Inf; the weights are damaged")

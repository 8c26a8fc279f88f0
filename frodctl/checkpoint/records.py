"""What is known of a tensor before its bytes are read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from frodctl.checkpoint import codec


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and where its bytes lie."""

    name: str
    dtype: str  #: the safetensors format's name of the dtype
    shape: tuple[int, ...]
    file: str  #: path of the file inside the checkpoint
    offset: int  #: of the first byte, in that file
    stride: tuple[int, ...] | None = None  #: in elements, where a pickled tensor is not contiguous
    data: Any = field(default=None, repr=False, compare=False)  #: the torch.Tensor of an old-format pickle

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file, from its first element to its last."""
        elements = prod(self.shape)
        if self.stride is not None and elements:
            elements = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return elements * codec.DTYPE_BITS[self.dtype] // 8

    def slice(self, index: int) -> TensorInfo:
        """One slice of the first dimension."""
        if self.stride is None:
            step, stride = prod(self.shape[1:]), None
        else:
            step, stride = self.stride[0], self.stride[1:]
        offset = self.offset + index * step * codec.DTYPE_BITS[self.dtype] // 8
        return replace(self, shape=self.shape[1:], offset=offset, stride=stride)

"""What holds numbers, as annotations name it: to be imported under ``TYPE_CHECKING``, for it has nothing at run time.

Shape and dtype are said beside it, in a comment or a docstring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = torch.Tensor
    DType: TypeAlias = torch.dtype

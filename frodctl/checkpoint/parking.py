"""Matrices that wait on disk while they are not needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from frodctl.checkpoint import files

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


def park(matrix: HostArray, folder: Path) -> Callable[[], HostArray]:
    """Write a matrix to a file without a name, which goes with what is returned: a function that reads it back."""
    file = files.open_nameless(folder)
    with files.named(folder):
        files.write_all(file.fileno(), np.ascontiguousarray(matrix).data, 0)
    shape, dtype = matrix.shape, matrix.dtype

    def back() -> HostArray:
        file.seek(0)
        return np.fromfile(file, dtype).reshape(shape)

    return back

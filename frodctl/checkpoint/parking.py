"""Matrices that wait on disk while they are not needed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


def park(matrix: HostArray, folder: Path) -> Callable[[], HostArray]:
    """Write a matrix to a file without a name, which goes with what is returned: a function that reads it back."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    matrix.tofile(file)
    shape, dtype = matrix.shape, matrix.dtype

    def back() -> HostArray:
        file.seek(0)
        return np.fromfile(file, dtype).reshape(shape)

    return back

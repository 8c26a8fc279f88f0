"""Matrices in 8 bits an element (e4m3) with a scale for each block of rows and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from frodctl.method.fidelity import Fidelity, together
from frodctl.method.linalg import row_blocks

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

CODES = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0  #: of the numbers that e4m3 has
_ELEMENTS = 1 << 18  # that are rounded at a time


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of so many rows and columns a matrix (m, n) has, those at its ends included."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quantize(X: HostArray, block: tuple[int, int], dtype: np.dtype[np.generic]) -> tuple[HostArray, HostArray]:
    """Round a matrix to 8 bits.

    Parameters
    ----------
    X : HostArray, (m, n)
        float32.
    block : (int, int)
        Rows and columns that have one scale.
    dtype : dtype
        Of the scales: float32 or bfloat16.

    Returns
    -------
    codes : HostArray, (m, n)
        float8_e4m3fn.
    scales : HostArray, (⌈m / rows⌉, ⌈n / columns⌉)
        The least with which no element of the block is too large; 1 where all are 0. NaN or Inf where one is.
    """
    (m, n), (height, width) = X.shape, block
    of_rows = np.maximum.reduceat(np.abs(X), np.arange(0, n, width), axis=1)
    largest = np.maximum.reduceat(of_rows, np.arange(0, m, height), axis=0)
    scales = _at_least(largest / np.float32(LARGEST), dtype)
    with np.errstate(invalid="ignore"):  # of NaN and Inf, which the scales tell
        codes = (X / _spread(scales, block, (m, n))).astype(CODES)
    return codes, scales


def dequantize(codes: HostArray, scales: HostArray, block: tuple[int, int]) -> HostArray:
    """What the codes (m, n) stand for, each product rounded to float32."""
    product: HostArray = codes.astype(np.float32) * _spread(scales, block, codes.shape)
    return product


def quantize_sum(
    W: HostArray, delta: HostArray | None, block: tuple[int, int], dtype: np.dtype[np.generic]
) -> tuple[HostArray, HostArray, Fidelity | None]:
    """Round W + ΔW to 8 bits, and compare what is made of W with ΔW.

    Parameters
    ----------
    W : HostArray, (m, n)
    delta : HostArray, (m, n), optional
        ΔW; None for 0.
    block, dtype
        As for `quantize`.

    Returns
    -------
    codes, scales : HostArray
        As of `quantize`.
    fidelity : Fidelity or None
        Of Ŵ − W to ΔW.
    """
    (m, n), height = W.shape, block[0]
    codes = np.empty((m, n), CODES)
    scales = np.empty(scales_shape((m, n), block), dtype)
    parts = []
    for blocks in row_blocks(len(scales), max(1, _ELEMENTS // (height * n))):
        rows = slice(blocks.start * height, blocks.stop * height)
        exact = W[rows].astype(np.float64)
        before = exact.copy() if delta is not None else exact
        exact += 0 if delta is None else delta[rows]
        codes[rows], scales[blocks] = quantize(exact.astype(np.float32), block, dtype)
        if delta is not None:
            parts.append(Fidelity.of(delta[rows], dequantize(codes[rows], scales[blocks], block) - before))
    return codes, scales, together(parts) if parts else None


def _at_least(wanted: HostArray, dtype: np.dtype[np.generic]) -> HostArray:
    """The scales (float32) rounded up to a dtype, and 1 for 0."""
    scales = np.where(wanted == 0, np.float32(1), wanted).astype(dtype)
    up: HostArray = np.where(scales.astype(np.float32) < wanted, np.nextafter(scales, np.array(np.inf, dtype)), scales)
    return up


def _spread(scales: HostArray, block: tuple[int, int], shape: tuple[int, ...]) -> HostArray:
    """The scales in float32, one for each row and column of a matrix, or one column where that is all there is."""
    (m, n), (height, width) = shape, block
    found = np.repeat(scales.astype(np.float32), height, axis=0)[:m]
    return found if width >= n else np.repeat(found, width, axis=1)[:, :n]

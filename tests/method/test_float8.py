"""Rounding to 8 bits, against torch's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from frodctl.arrays import to_torch
from frodctl.method.fidelity import Fidelity
from frodctl.method.float8 import LARGEST, dequantize, quantize, quantize_sum

BLOCKS = [(1, 200), (128, 128), (7, 33), (300, 200)]
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def matrix(seed: int, shape: tuple[int, int] = (300, 200)) -> np.ndarray:
    """Rows of very different sizes."""
    random = np.random.default_rng(seed)
    found: np.ndarray = (random.standard_normal(shape) * 10.0 ** random.integers(-20, 20, (shape[0], 1))).astype("f4")
    return found


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_codes_and_scales(block: tuple[int, int], dtype: np.dtype) -> None:
    X = matrix(0)
    codes, scales = quantize(X, block, dtype)
    (height, width), values = block, torch.from_numpy(X)
    assert (codes.dtype, scales.dtype) == (ml_dtypes.float8_e4m3fn, dtype)
    for i, row in enumerate(to_torch(scales).float()):
        for j, scale in enumerate(row):
            part = values[i * height : (i + 1) * height, j * width : (j + 1) * width]
            found = to_torch(codes)[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert torch.equal((part / scale).to(torch.float8_e4m3fn).float(), found.float())
            # the least that is large enough
            assert part.abs().max() <= LARGEST * scale * (1 + 1e-6)
            assert part.abs().max() >= LARGEST * scale * (1 - 2.0**-7 if dtype == BF16 else 1 - 1e-6)
            stands_for = dequantize(codes, scales, block)[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert np.array_equal(stands_for, found.float().numpy() * float(scale))


def test_zeros_and_what_is_not_finite() -> None:
    X = matrix(1)
    X[3] = 0
    X[4, 5], X[5, 6] = np.nan, np.inf
    codes, scales = quantize(X, (1, 200), BF16)
    assert scales[3] == 1
    assert not codes[3].astype("f4").any()
    assert np.flatnonzero(~np.isfinite(scales.astype("f4"))).tolist() == [4, 5]


@pytest.mark.parametrize("block", [(1, 3000), (128, 128)], ids=str)
def test_a_sum_is_rounded_once_and_compared_with_its_change(block: tuple[int, int]) -> None:
    """In pieces, of a matrix of many."""
    random = np.random.default_rng(2)
    W = random.standard_normal((500, 3000)).astype(BF16)
    delta = (1e-2 * random.standard_normal(W.shape)).astype("f4")
    codes, scales, found = quantize_sum(W, delta, block, BF16)
    exact = W.astype("f8") + delta
    expected = quantize(exact.astype("f4"), block, BF16)
    assert codes.tobytes() == expected[0].tobytes()
    assert scales.tobytes() == expected[1].tobytes()
    kept = dequantize(codes, scales, block) - W.astype("f8")
    assert found is not None
    assert found.kept == pytest.approx((kept * delta).sum() / (delta.astype("f8") ** 2).sum(), rel=1e-9)
    assert found.distance == pytest.approx(np.linalg.norm(kept - delta) / np.linalg.norm(delta.astype("f8")), rel=1e-9)
    assert isinstance(found, Fidelity)
    alone = quantize_sum(W, None, block, BF16)
    assert alone[2] is None
    assert alone[0].tobytes() == quantize(W.astype("f4"), block, BF16)[0].tobytes()

"""The sparse pattern against torch's own permutation, which is what PEFT draws from."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frodctl.method.budget import nnz
from frodctl.method.pattern import patterns
from tests.conftest import PEAK_MEMORY


def drawn_by_torch(widths: dict[str, int], sparsity: float, seed: int) -> dict[str, np.ndarray]:
    """The first nnz entries of torch.randperm over the off-diagonal positions, category after category."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for category in sorted(widths):
        n = widths[category]
        count = nnz(n, sparsity)
        if not count:
            result[category] = np.empty((2, 0), dtype=np.int64)
            continue
        position = torch.randperm(n * n - n, generator=generator)[:count].numpy()
        row = position // (n - 1)
        column = position % (n - 1)
        result[category] = np.stack([row, column + (column >= row)])
    return result


@settings(max_examples=60, deadline=None)
@given(
    widths=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=4),
    sparsity=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 1.0])),
    seed=st.integers(0, 2**63 - 1),
)
def test_positions_are_torchs(widths: dict[str, int], sparsity: float, seed: int) -> None:
    ours = patterns(widths, dict.fromkeys(widths, sparsity), seed)
    theirs = drawn_by_torch(widths, sparsity, seed)
    for category in widths:
        np.testing.assert_array_equal(ours[category], theirs[category])


class Model(nn.Module):
    """Two layers of two roles, for PEFT to adapt."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(n, 8), "down": nn.Linear(n, 4)}) for _ in range(2))


@pytest.mark.parametrize(
    ("seed", "rate", "n"),
    [(0, 0.01, 16), (1, 0.02, 100), (42, 0.5, 33), (7, 1.0, 12), (2**31, 0.001, 50), (123456789, 0.0, 20), (3, 0.1, 2)],
)
def test_positions_are_pefts(seed: int, rate: float, n: int) -> None:
    from peft import FrodConfig, get_peft_model

    config = FrodConfig(target_modules=["up", "down"], projection_prng_key=seed, sparse_rate=rate, progressbar=False)
    theirs = get_peft_model(Model(n), config).base_model.frod_s_indices
    ours = patterns(dict.fromkeys(theirs, n), dict.fromkeys(theirs, rate), seed)
    for category in theirs:
        np.testing.assert_array_equal(ours[category], theirs[category]["default"].numpy())


#: n = 14655 is where torch begins to shuffle in another way; the digests are of what `drawn_by_torch` finds.
LARGE = {"a": 14655, "b": 5}
DRAWN = {
    "a": "3d4eb6350d7c9f09c4238bd469e0b3afc95519529d719557ea5facaffb3a3577",
    "b": "0fb84472ffe2b1591c692c9d25d94d8c28050b69e42dfc3823eb373446684311",
}


def digests(positions: dict[str, np.ndarray]) -> dict[str, str]:
    return {category: sha256(indices.astype("<i8").tobytes()).hexdigest() for category, indices in positions.items()}


def test_the_64_bit_branch() -> None:
    assert digests(patterns(LARGE, dict.fromkeys(LARGE, 1e-4), seed=5)) == DRAWN


@pytest.mark.long
def test_the_64_bit_branch_is_torchs() -> None:
    """By its whole permutation, of 1.7 GB."""
    assert digests(drawn_by_torch(LARGE, 1e-4, seed=5)) == DRAWN


def test_memory_is_that_of_the_positions() -> None:
    """n = 4096 adds under 150 MB to the process; the grid of positions alone would take 270 MB."""
    program = (
        f"import frodctl.method.pattern as p\n{PEAK_MEMORY}\n"
        "p.patterns({'a': 8}, {'a': 0.5}, 0); before = peak()\n"
        "p.patterns({'a': 4096}, {'a': 0.01}, 0)\n"
        "print((peak() - before) / 1e6)"
    )
    added = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert added < 150


@given(n=st.integers(2, 500), sparsity=st.floats(1e-6, 1))
def test_nnz_is_pefts(n: int, sparsity: float) -> None:
    assert nnz(n, sparsity) == max(1, min(int(n * n * sparsity), n * n - n))
    assert nnz(n, 0) == 0

"""The sparse pattern: off-diagonal positions drawn from a seed, the same ones that PEFT draws.

PEFT 0.21 takes the first nnz entries of ``torch.randperm(n² − n)`` for each category in sorted order, from one
generator. torch's permutation is a Fisher–Yates shuffle fed by the Mersenne Twister (MT19937), so the entries
that are kept can be followed on their own, in O(nnz) memory, and the other draws skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from frodctl.method.budget import nnz

#: From this many elements on, torch shuffles inside-out with 64-bit draws (ATen, ``randperm`` on the CPU).
INSIDE_OUT_FROM = (2**32 - 1) // 20
_CHUNK = 1 << 20


def patterns(widths: Mapping[str, int], sparsity: Mapping[str, float], seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """The positions of every category.

    Parameters
    ----------
    widths : mapping of str to int
        n of each category. All categories count: the draws follow one another in sorted order.
    sparsity : mapping of str to float
        Share of the n² positions, by category.
    seed : int
        PEFT's ``projection_prng_key``.

    Returns
    -------
    dict of str to ndarray
        (2, nnz) int64 for each category: rows, columns; unsorted, unique, none on the diagonal.
    """
    stream = _Twister(seed)
    result = {}
    for category in sorted(widths):
        n = widths[category]
        count = nnz(n, sparsity[category])
        position = _permutation_head(stream, n * n - n, count) if count else np.empty(0, dtype=np.int64)
        row, rest = np.divmod(position, max(n - 1, 1))
        result[category] = np.stack([row, rest + (rest >= row)])
    return result


def fault(positions: npt.NDArray[np.int64], n: int) -> str | None:
    """What is wrong with positions (2, nnz) of an (n, n) matrix, as a predicate; None where nothing is."""
    rows, columns = positions
    if not len(rows):
        return None
    if positions.min() < 0 or positions.max() >= n:
        return f"points outside the {n} x {n} matrix"
    if (rows == columns).any():
        return "has positions on the diagonal"
    if len(np.unique(rows * n + columns)) < len(rows):
        return "has a position twice"
    return None


class _Twister:
    """The stream of 32-bit draws of ``torch.Generator(device="cpu").manual_seed(seed)``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)  # numpy has two types for it
        self._bits.state = state

    def draw(self, count: int) -> npt.NDArray[np.uint64]:
        return self._bits.random_raw(count)

    def skip(self, count: int) -> None:
        for begin in range(0, count, _CHUNK):
            self._bits.random_raw(min(_CHUNK, count - begin), output=False)

    def draw64(self, count: int) -> npt.NDArray[np.uint64]:
        pairs = self.draw(2 * count).reshape(count, 2)
        return (pairs[:, 0] << np.uint64(32)) | pairs[:, 1]


def _permutation_head(stream: _Twister, size: int, count: int) -> npt.NDArray[np.int64]:
    """The first ``count`` entries of ``torch.randperm(size)``, which takes all its draws from ``stream``."""
    if size < INSIDE_OUT_FROM:
        return _forward_shuffle(stream, size, count)
    return _inside_out_shuffle(stream, size, count)


def _forward_shuffle(stream: _Twister, size: int, count: int) -> npt.NDArray[np.int64]:
    """for i in 0..size−2: swap entries i and i + draw mod (size − i)."""
    steps = min(count, size - 1)
    index = np.arange(steps, dtype=np.uint64)
    partners = (index + stream.draw(steps) % (np.uint64(size) - index)).tolist()
    stream.skip(size - 1 - steps)
    moved: dict[int, int] = {}
    head = np.empty(count, dtype=np.int64)
    for i, partner in enumerate(partners):
        here = moved.pop(i, i)
        head[i] = here if partner == i else moved.get(partner, partner)
        if partner != i:
            moved[partner] = here
    if count > steps:
        head[-1] = moved.get(size - 1, size - 1)
    return head


def _inside_out_shuffle(stream: _Twister, size: int, count: int) -> npt.NDArray[np.int64]:
    """for i in 0..size−1: z = draw mod (i + 1); entry i = entry z; entry z = i."""
    head = np.empty(count, dtype=np.int64)
    index = np.arange(1, count + 1, dtype=np.uint64)
    for i, z in enumerate((stream.draw64(count) % index).tolist()):
        head[i] = head[z]
        head[z] = i
    for begin in range(count, size, _CHUNK):
        index = np.arange(begin, min(begin + _CHUNK, size), dtype=np.uint64)
        z = stream.draw64(len(index)) % (index + np.uint64(1))
        kept = z < count
        head[z[kept]] = index[kept]  # of equal z the last counts, as in the loop
    return head

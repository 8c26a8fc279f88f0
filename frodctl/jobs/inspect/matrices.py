"""Spectra of matrices, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING

import torch

from frodctl.checkpoint import stream
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import TensorInfo
from frodctl.errors import InvalidInput
from frodctl.method.estimate import Products, estimate, frobenius_norm
from frodctl.method.linalg import Scratch
from frodctl.method.spectra import NotFinite, singular_values, summarize
from frodctl.pipeline import in_order

if TYPE_CHECKING:
    from frodctl.arrays import Array

#: Points of the small picture of a spectrum.
PROFILE_POINTS = 12
#: A matrix of more elements is not copied to float64 as a whole for an estimate.
_IN_BLOCKS = 1 << 26
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Figures:
    """The spectrum of one matrix."""

    values: dict[str, Json]
    singular_values: Array | None  #: (k,), float64, on the CPU; None for an estimate


class Spectra:
    """Computes the figures of matrices.

    Parameters
    ----------
    device : torch.device
    estimated : bool
        By randomised methods instead of exactly.
    seed : int
        Of those; the same for every matrix, so that a matrix's figures do not depend on which others are asked for.
    """

    def __init__(self, device: torch.device, *, estimated: bool = False, seed: int = 0) -> None:
        self.device = device
        self.estimated = estimated
        self.seed = seed
        self._own = local()

    def of(self, W: Array, name: str) -> Figures:
        """The figures of W (m, n); `InvalidInput` with the name if it holds NaN or Inf."""
        try:
            return self._estimate(W.to(self.device)) if self.estimated else self._exact(W.to(self.device))
        except NotFinite:
            raise InvalidInput(f"{name}: holds NaN or Inf; the weights are damaged") from None

    def of_all(self, tasks: Sequence[Callable[[], tuple[Array, str]]]) -> Generator[Figures, None, None]:
        """The figures of each task's matrix, in order.

        On the CPU several are computed at a time, on one core each. For the sizes in language models that is faster
        than one after another on all: the reduction to tridiagonal form hardly gains from a second core.
        """
        cores = torch.get_num_threads()
        if self.device.type != "cpu" or cores == 1:
            for W, name in in_order(tasks):
                yield self.of(W, name)
            return
        count = min(cores, _MOST_WORKERS)
        computing = [partial(self._of_task, task) for task in tasks]
        try:
            yield from in_order(computing, ahead=2 * count, count=count, prepare=partial(torch.set_num_threads, 1))
        finally:
            torch.set_num_threads(cores)

    def _of_task(self, task: Callable[[], tuple[Array, str]]) -> Figures:
        return self.of(*task())

    def _exact(self, W: Array) -> Figures:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch(self.device)
        sigma = singular_values(W, self._own.scratch).cpu()
        m, n = W.shape
        return Figures(summarize(sigma, (m, n)).as_dict() | {"profile": _profile(sigma)}, sigma)

    def _estimate(self, W: Array) -> Figures:
        generator = torch.Generator().manual_seed(self.seed)
        products = Products.of(W, in_blocks=W.numel() > _IN_BLOCKS)
        found = estimate(products, frobenius_norm(W), generator)
        return Figures({**found.as_dict(), "estimated": list(found.estimated), "profile": None}, None)


def _profile(sigma: Array) -> list[float] | None:
    """Singular values at even steps from the largest to the smallest, relative to the largest."""
    if not len(sigma) or not sigma[0] > 0:
        return None
    places = torch.linspace(0, len(sigma) - 1, PROFILE_POINTS).round().long()
    return [round(value, 4) for value in (sigma[places] / sigma[0]).tolist()]


def reading(root: Path, info: TensorInfo, index: int | None, name: str) -> Callable[[], tuple[Array, str]]:
    """A task for `Spectra.of_all`: the matrix in a file."""
    return lambda: (stream.read_tensor(root, info, index), name)


def quantiles(values: Array, at: Sequence[float]) -> list[float | None]:
    """The values (k,) that lie at these shares of their order; None where there are none."""
    ordered = values.sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) if len(ordered) else None for q in at]

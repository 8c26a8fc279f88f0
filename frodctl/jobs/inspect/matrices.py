"""Spectra of matrices, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from frodctl.checkpoint import stream
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import TensorInfo
from frodctl.errors import InvalidInput
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.method.estimate import Products, estimate, frobenius_norm
from frodctl.method.linalg import Scratch
from frodctl.method.spectra import NotFinite, singular_values, summarize
from frodctl.pipeline import in_order

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.kernels import Kernels

#: Points of the small picture of a spectrum.
PROFILE_POINTS = 12
#: A matrix of more elements is not copied to float64 as a whole for an estimate.
_IN_BLOCKS = 1 << 26
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Figures:
    """The spectrum of one matrix."""

    values: dict[str, Json]
    singular_values: HostArray | None  #: (k,), float64; None for an estimate


class Spectra:
    """Computes the figures of matrices.

    Parameters
    ----------
    kernels : Kernels
        Where to compute.
    profile : Unprofiled
        Measures it, unless it does not.
    estimated : bool
        By randomised methods instead of exactly.
    seed : int
        Of those; the same for every matrix, so that a matrix's figures do not depend on which others are asked for.
    """

    def __init__(
        self, kernels: Kernels, profile: Unprofiled = UNPROFILED, *, estimated: bool = False, seed: int = 0
    ) -> None:
        self.kernels = profile.kernels(kernels)
        self.profile = profile
        self.estimated = estimated
        self.seed = seed
        self._own = local()

    def of(self, W: HostArray, name: str) -> Figures:
        """The figures of W (m, n); `InvalidInput` with the name if it holds NaN or Inf."""
        try:
            return self._estimate(W) if self.estimated else self._exact(W)
        except NotFinite:
            raise InvalidInput(f"{name}: holds NaN or Inf; the weights are damaged") from None

    def of_all(self, tasks: Sequence[Callable[[], tuple[HostArray, str]]]) -> Generator[Figures, None, None]:
        """The figures of each task's matrix, in order.

        On the CPU several are computed at a time, on one core each. For the sizes in language models that is faster
        than one after another on all: the reduction to tridiagonal form hardly gains from a second core.
        """
        cores = max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        if self.kernels.name != "cpu" or cores == 1 or len(tasks) == 1:
            for W, name in self.profile.waiting("waiting for weights", in_order(map(self._reading, tasks))):
                yield self.of(W, name)
            return
        count = min(cores, _MOST_WORKERS)
        computing = [partial(self._of_task, task) for task in tasks]
        with threadpool_limits(1, "blas"), closing(in_order(computing, ahead=2 * count, count=count)) as found:
            yield from self.profile.waiting("waiting for workers", found)

    def _reading(self, task: Callable[[], tuple[HostArray, str]]) -> Callable[[], tuple[HostArray, str]]:
        def read() -> tuple[HostArray, str]:
            with self.profile.step("reading"):
                return task()

        return read

    def _of_task(self, task: Callable[[], tuple[HostArray, str]]) -> Figures:
        W, name = self._reading(task)()
        with self.profile.step("other arithmetic"):
            return self.of(W, name)

    def _exact(self, W: HostArray) -> Figures:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch(self.kernels)
        sigma = singular_values(W, self._own.scratch)
        m, n = W.shape
        return Figures(summarize(sigma, (m, n)).as_dict() | {"profile": _profile(sigma)}, sigma)

    def _estimate(self, W: HostArray) -> Figures:
        products = Products.of(W, self.kernels, in_blocks=W.size > _IN_BLOCKS)
        found = estimate(products, frobenius_norm(W), np.random.default_rng(self.seed))
        return Figures({**found.as_dict(), "estimated": list(found.estimated), "profile": None}, None)


def _profile(sigma: HostArray) -> list[float] | None:
    """Singular values at even steps from the largest to the smallest, relative to the largest."""
    if not len(sigma) or not sigma[0] > 0:
        return None
    places = np.linspace(0, len(sigma) - 1, PROFILE_POINTS).round().astype(int)
    return [round(value, 4) for value in (sigma[places] / sigma[0]).tolist()]


def reading(root: Path, info: TensorInfo) -> Callable[[], tuple[HostArray, str]]:
    """A task for `Spectra.of_all`: the matrix in a file."""
    return lambda: (stream.read_tensor(root, info), f"{root / info.file}: tensor {info.name}")


def quantiles(values: HostArray, at: Sequence[float]) -> list[float | None]:
    """The values (k,) that lie at these shares of their order; None where there are none."""
    ordered = np.sort(values)
    return [float(ordered[round(q * (len(ordered) - 1))]) if len(ordered) else None for q in at]

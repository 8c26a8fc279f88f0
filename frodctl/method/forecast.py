"""How long a device takes for what `cost` counts: operations over rates, measured in a third of a second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from frodctl.method import joint_basis as method
from frodctl.method.cost import FLOPS, Call, joint_basis_calls, working_dtype
from frodctl.method.profile import fastest, gemm_peak

if TYPE_CHECKING:
    from frodctl.method.kernels import Kernels

_SECONDS = 0.05  # of each measurement
#: A routine's share of the GEMM peak at size n is s n/(n + h), and 1 at most: (s, h), fitted to OpenBLAS 0.3 on two
#: cores of x86-64 with AVX-512, n from 192 to 2048, float32 and float64. syevd's own rate is measured beside it.
_SHARES = {
    "gemm": (1.0, 40), "syrk": (1.05, 220), "trmm": (1.02, 50), "trsm": (1.03, 90), "potrf": (1.1, 1100),
    "potri": (1.1, 900), "trtri": (1.1, 1150), "inverse": (1.0, 300), "sygst": (0.95, 1000), "syevd": (1.0, 500),
    "syevr": (0.22, 0), "eigvalsh": (0.25, 100), "csrmm": (0.05, 0),
}  # fmt: skip
#: What a decomposition moves (conversions, triangles, fresh memory) goes at this share of a copy's rate.
_MOVING = 0.2
#: The interpreter, numpy and scipy.
_START_SECONDS = 0.3
_PROBE = 384  # n of the eigendecompositions that are measured


@dataclass(frozen=True)
class Rates:
    """What a device can do in a second."""

    gemm: dict[str, float]  #: operations by dtype
    syevd: float  #: measured over what `_SHARES` says
    move: float  #: bytes read and written

    @classmethod
    def of(cls, kernels: Kernels) -> Rates:
        """Measured on the device."""
        gemm = {dtype: gemm_peak(kernels, dtype, _SECONDS) for dtype in ("float32", "float64")}
        X = np.random.default_rng(0).standard_normal((_PROBE, _PROBE))
        A, work = kernels.put(X + X.T), kernels.empty((_PROBE, _PROBE), "float64")
        seconds = fastest(kernels, lambda: kernels.syevd(kernels.copy(A, work)), _SECONDS)
        expected = _share("syevd", _PROBE) * gemm["float64"]
        wide, narrow = kernels.put(np.ones((2048, 2048))), kernels.empty((2048, 2048), "float32")
        moving = fastest(kernels, lambda: kernels.copy(wide, narrow), _SECONDS)
        return cls(gemm, FLOPS["syevd"](_PROBE) / seconds / expected, _MOVING * 12 * 2048**2 / moving)

    def seconds(self, calls: Iterable[Call]) -> float:
        """The time of a process that makes these calls."""
        return _START_SECONDS + sum(map(self._of_call, calls))

    def _of_call(self, call: Call) -> float:
        if call.routine == "move":
            return call.nbytes / self.move
        rate = self.gemm[call.dtype] * _share(call.routine, min(call.dimensions))
        return call.flops / rate / (self.syevd if call.routine == "syevd" else 1.0)


def decompose_calls(
    shapes: Sequence[tuple[int, int]], *, alpha: float, precision: str, dtype: str, cache_bytes: int
) -> Iterator[Call]:
    """What `joint_basis` does for weights of these shapes with these of its parameters.

    How well conditioned weights are is not known from shapes: they are taken to be random.
    """
    n, height = shapes[0][1], sum(m for m, _ in shapes)
    limit = method.float32_condition(shapes, alpha) if precision == "auto" else method.CHOLESKY_CONDITION
    condition = _random_condition(n, height)
    wanted = working_dtype(shapes, precision) == "float64"
    work = "float64" if wanted or condition > limit else "float32"
    return joint_basis_calls(
        shapes,
        work=work,
        regular=condition <= method.CHOLESKY_CONDITION,
        inverted=dtype != "float32",
        tried=work == "float64" and not wanted,
        cache_bytes=cache_bytes,
    )


def _random_condition(n: int, height: int) -> float:
    """Of a random matrix (height, n), by Marchenko and Pastur's law; infinity where it is wide, and n where square."""
    root = math.sqrt(n / height)
    return math.inf if root > 1 else float(n) if root == 1 else (1 + root) / (1 - root)


def _share(routine: str, n: int) -> float:
    limit, half = _SHARES[routine]
    return min(1.0, limit * n / (n + half))

"""Where the time of a command goes: its steps, the routines of linear algebra with their operations among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock, get_ident, local
from typing import TYPE_CHECKING, Any, TypeVar, cast

from frodctl.method.cost import FLOPS

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.method.kernels import Kernels

T = TypeVar("T")

#: What is left of the time between the steps.
REST = "rest"
_PEAK_SECONDS = 0.2  # for which a product is repeated, to see how fast it gets
_PEAK_SIZE = {"cpu": 1024}  # n of that product, elsewhere:
_PEAK_SIZE_OF_A_GPU = 4096


@dataclass
class Step:
    """All calls of one step, by the command's own thread or by those beside it."""

    name: str
    dtype: str = ""  #: of a routine's result
    workers: bool = False  #: by other threads, whose times are added up and overlap with the command's own
    calls: int = 0
    seconds: float = 0.0  #: without those of the steps within
    flops: float = 0.0  #: floating-point operations, by `cost.FLOPS`
    nbytes: float = 0.0  #: read and written, of a routine that only moves numbers
    gemm_share: float | None = None  #: of the device's own GEMM peak; a worker's, of one core's


class Unprofiled:
    """Measures nothing and costs nothing."""

    def step(self, name: str) -> AbstractContextManager[None]:
        """For the time of one step."""
        return nullcontext()

    def waiting(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, each waited for in this step."""
        return items

    def kernels(self, kernels: Kernels) -> Kernels:
        """The kernels, whose routines are steps."""
        return kernels

    def finish(self) -> tuple[Step, ...] | None:
        """What was measured."""
        return None


UNPROFILED = Unprofiled()


class Profile(Unprofiled):
    """Measures the steps of a command, in all its threads. A step may have others within, which are not counted twice.

    The steps of the thread that made the profile add up to the time since it began, with what is left as `REST`.

    Parameters
    ----------
    began : float, optional
        When the command's process began, on `time.perf_counter`'s clock; by default the profile begins now.
    """

    def __init__(self, began: float | None = None) -> None:
        now = time.perf_counter()
        self._began = now if began is None else began
        self._thread = get_ident()
        self._own = local()
        self._lock = Lock()
        self._steps: dict[tuple[bool, str, str], Step] = {}
        self._kernels: Kernels | None = None
        self._found: tuple[Step, ...] | None = None
        if began is not None:
            self._count("start and imports", now - began)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = self._begin()
        try:
            yield
        finally:
            self._count(name, self._end(begun))

    def waiting(self, name: str, items: Iterator[T]) -> Iterator[T]:
        while True:
            with self.step(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def kernels(self, kernels: Kernels) -> Kernels:
        self._kernels = kernels
        return cast("Kernels", _Profiled(kernels, self))

    def finish(self) -> tuple[Step, ...]:
        """What was measured until the first call: the longest step first, then other threads'; the rest is last."""
        if self._found is None:
            self._found = self._finished()
        return self._found

    def _finished(self) -> tuple[Step, ...]:
        from threadpoolctl import threadpool_limits

        with self.step("measuring the GEMM peak"):
            self._compare_with_peak([step for step in self._steps.values() if step.flops and not step.workers])
            with threadpool_limits(1, "blas"):
                self._compare_with_peak([step for step in self._steps.values() if step.flops and step.workers])
        steps = sorted(self._steps.values(), key=lambda step: (step.workers, -step.seconds))
        known = sum(step.seconds for step in steps if not step.workers)
        return *steps, Step(REST, calls=1, seconds=time.perf_counter() - self._began - known)

    def routine(self, name: str, kernels: Kernels, *arguments: Any, **options: Any) -> Any:
        """Call one of the kernels' routines as a step."""
        begun = self._begin()
        found = getattr(kernels, name)(*arguments, **options)
        kernels.synchronize()
        seconds = self._end(begun)
        self._count(name, seconds, *operations(name, found, arguments, options))
        return found

    def _begin(self) -> float:
        if not hasattr(self._own, "inner"):
            self._own.inner = []  # seconds of the steps within each step that is under way
        self._own.inner.append(0.0)
        return time.perf_counter()

    def _end(self, begun: float) -> float:
        """The seconds since then, without those of the steps within."""
        elapsed = time.perf_counter() - begun
        own: float = elapsed - self._own.inner.pop()
        if self._own.inner:
            self._own.inner[-1] += elapsed
        return own

    def _count(self, name: str, seconds: float, dtype: str = "", flops: float = 0.0, nbytes: float = 0.0) -> None:
        workers = get_ident() != self._thread
        with self._lock:
            step = self._steps.setdefault((workers, name, dtype), Step(name, dtype, workers))
            step.calls += 1
            step.seconds += seconds
            step.flops += flops
            step.nbytes += nbytes

    def _compare_with_peak(self, steps: Sequence[Step]) -> None:
        assert self._kernels is not None or not steps
        dtypes = {step.dtype for step in steps}
        peaks = {dtype: gemm_peak(self._kernels, dtype) for dtype in dtypes} if self._kernels else {}
        for step in steps:
            step.gemm_share = step.flops / step.seconds / peaks[step.dtype]


class _Profiled:
    """`Kernels` that count their routines as steps; all else is the device's own."""

    def __init__(self, kernels: Kernels, profile: Profile) -> None:
        self._kernels = kernels
        self._profile = profile

    def __getattr__(self, name: str) -> Any:
        if name in _DIMENSIONS or name in _BYTES:
            return partial(self._profile.routine, name, self._kernels)
        return getattr(self._kernels, name)


def gemm_peak(kernels: Kernels, dtype: str, seconds: float = _PEAK_SECONDS, n: int | None = None) -> float:
    """Operations in a second of the fastest of a few products of (n, n) matrices."""
    import numpy as np

    n = n or _PEAK_SIZE.get(kernels.name, _PEAK_SIZE_OF_A_GPU)
    A, B = (kernels.put(np.full((n, n), x), dtype) for x in (0.5, 0.25))
    out = kernels.empty((n, n), dtype)
    return FLOPS["gemm"](n, n, n) / fastest(kernels, lambda: kernels.gemm(A, B, out), seconds)


def fastest(kernels: Kernels, call: Callable[[], object], seconds: float) -> float:
    """The least of the times that a call takes, which is repeated for so many seconds, and three times at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        kernels.synchronize()
        begun = time.perf_counter()
        call()
        kernels.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def operations(
    routine: str, found: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[str, float, float]:
    """What a call of a routine of `Kernels` did, by the shapes of its arguments and what it returned.

    Returns
    -------
    dtype : str
        Of the arithmetic; of what was written.
    flops : float
        Floating-point operations, by the formulas of `cost.FLOPS`.
    nbytes : float
        Bytes read and written, of a routine that only moves numbers.
    """
    from frodctl.arrays import dtype_name

    if routine in _BYTES:
        written, nbytes = _BYTES[routine](found, *arguments, **options)
        return dtype_name(written), 0.0, float(nbytes)
    array, dimensions = _DIMENSIONS[routine](*arguments, **options)
    formula = "syrk" if routine == "matmul" and len(dimensions) == 2 else "gemm" if routine == "matmul" else routine
    return dtype_name(array), FLOPS[formula](*dimensions), 0.0


def _gemm(A: Array, B: Array, out: Array, *, transpose_a: bool = False, **_: object) -> tuple[Array, tuple[int, ...]]:
    return out, (*out.shape, A.shape[0 if transpose_a else 1])


def _matmul(A: Array, B: Array, out: Array | None = None) -> tuple[Array, tuple[int, ...]]:
    """Of XᵀX or XXᵀ, which numpy knows to be symmetric, the dimensions of Xᵀ or X: as for `syrk`."""
    if A.shape == B.shape[::-1] and A.T.shape == B.shape and _address(A) == _address(B):
        return A, (A.shape[1], A.shape[0])
    return A, (A.shape[0], B.shape[1], A.shape[1])


def _address(X: Any) -> int:
    return int(X.data_ptr() if hasattr(X, "data_ptr") else X.ctypes.data)


def _syrk(X: Array, out: Array, *, rows: bool = False, **_: object) -> tuple[Array, tuple[int, ...]]:
    return out, (X.shape[::-1] if rows else X.shape)


def _of_shape(X: Array, *_: object, **__: object) -> tuple[Array, tuple[int, ...]]:
    return X, X.shape


def _of_size(X: Array, *_: object, **__: object) -> tuple[Array, tuple[int, ...]]:
    return X, (len(X),)


#: The array that the arithmetic is of, and the dimensions that `cost.FLOPS` takes.
_DIMENSIONS: dict[str, Callable[..., tuple[Array, tuple[int, ...]]]] = {
    "gemm": _gemm,
    "matmul": _matmul,
    "csrmm": lambda starts, columns, entries, X: (X, (len(entries), X.shape[1])),
    "syrk": _syrk,
    "trmm": _of_shape,
    "trsm": lambda R, X: (X, X.shape),
    **dict.fromkeys(("potrf", "potri", "trtri", "sygst", "syevd", "eigvalsh", "inverse"), _of_size),
    **dict.fromkeys(("svdvals", "svd", "qr"), _of_shape),
    "syevr": lambda A, count: (A, (len(A), count)),
}

#: What was written, and how many bytes were read and written; of a symmetric matrix's triangle half.
_BYTES: dict[str, Callable[..., tuple[Array, float]]] = {
    "zeros": lambda found, *_: (found, found.nbytes),
    "put": lambda found, X, *_: (found, 0 if found is X else X.nbytes + found.nbytes),
    "get": lambda found, X, *_: (found, 0 if found is X else X.nbytes + found.nbytes),
    "copy": lambda found, X, out: (out, X.nbytes + out.nbytes),
    "axpby": lambda found, a, X, b, out: (out, (X.nbytes + (2 if b else 1) * out.nbytes) / 2),
    "row_dots": lambda found, X, Y: (X, X.nbytes if X is Y else X.nbytes + Y.nbytes),
    "norms": lambda found, X, axis: (X, X.nbytes),
    "norm": lambda found, X: (X, X.nbytes),
    "mirror": lambda found, A: (A, A.nbytes),
    "transpose": lambda found, A: (found, A.nbytes + found.nbytes),
}

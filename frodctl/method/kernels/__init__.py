"""The dense arithmetic under the method: BLAS's and LAPACK's routines, by their names, on one device.

Matrices are row-major. A symmetric matrix is its upper triangle, and what is below the diagonal is undefined, unless
said otherwise; a triangular matrix is upper triangular, and below the diagonal is anything. Routines work in place or
into memory that they are given: fresh memory costs page faults, layer after layer. Vectors that come back, one number
for each row, are numpy's and float64; whatever is as large as a weight stays on the device.

On the CPU it is numpy and scipy (OpenBLAS) and nothing else: a second library's threads would get in the way of the
first one's. `matmul`, `eigvalsh` and `svdvals` are numpy's alone, for work in several threads. On a GPU it is torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from frodctl.arrays import Array, HostArray

    Vector = npt.NDArray[np.float64]


class Kernels(Protocol):
    """What a device can do. Dtypes are numpy's names: "float32", "float64"; the stored ones come in by `put`."""

    @property
    def name(self) -> str:
        """The device's: "cpu", "cuda:0"."""
        ...

    def identity(self) -> list[str]:
        """What rounding depends on: the libraries and their versions, the device, its threads."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was asked for is done: a device works behind its caller."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory whose contents are undefined."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Zeros."""
        ...

    def buffer(self, nbytes: int) -> HostArray:
        """Memory of the host (nbytes,) uint8 to read into; pinned where a device copies from it."""
        ...

    def ahead(self, arrays: Iterator[HostArray]) -> Iterator[Array]:
        """Each array on the device, valid until the next, which a device copies meanwhile.

        An array may go once the one after it was asked for.
        """
        ...

    def put(self, X: Array, dtype: str | None = None) -> Array:
        """X on the device, in another dtype if one is given; X itself where nothing is to be done."""
        ...

    def get(self, X: Array, out: HostArray | None = None) -> HostArray:
        """X on the host; in ``out``, converted to its dtype, if one is given."""
        ...

    def copy(self, X: Array, out: Array) -> Array:
        """``out``, filled with X converted to its dtype."""
        ...

    def gemm(
        self,
        A: Array,
        B: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        beta: float = 0,
    ) -> Array:
        """``out`` (m, n) = AB + beta ``out`` for A (m, k) and B (k, n); with ``transpose_a`` Aᵀ, ``transpose_b`` Bᵀ."""
        ...

    def matmul(self, A: Array, B: Array, out: Array | None = None) -> Array:
        """AB (m, n), in ``out`` if given, for A (m, k) and B (k, n), which may be transposed views.

        On the CPU numpy's, which `gemm` is not: it leaves the interpreter to other threads, and knows XᵀX and XXᵀ.
        """
        ...

    def csrmm(self, starts: HostArray, columns: HostArray, entries: HostArray, X: Array) -> Array:
        """MX (n, k) for X (m, k) and M (n, m) in compressed sparse rows, its entries converted to X's dtype."""
        ...

    def syrk(self, X: Array, out: Array, *, beta: float = 0, rows: bool = False) -> Array:
        """``out`` (n, n) = XᵀX + beta ``out`` for X (m, n), or with ``rows`` (m, m) = XXᵀ + beta ``out``."""
        ...

    def axpby(self, a: float, X: Array, b: float, out: Array) -> Array:
        """``out`` (n, n) symmetric, replaced by a X + b ``out``; X may have another dtype."""
        ...

    def trmm(self, X: Array, R: Array, *, transpose: bool = False) -> Array:
        """X (m, n), replaced by XR, or XRᵀ, for R (n, n) triangular."""
        ...

    def trsm(self, R: Array, X: Array) -> Array:
        """X (m, n), replaced by R⁻ᵀX, for R (m, m) triangular."""
        ...

    def potrf(self, A: Array) -> bool:
        """A (n, n) symmetric, replaced by R with A = RᵀR; False where it is not positive definite."""
        ...

    def potri(self, R: Array) -> Array:
        """R (n, n) triangular, replaced by the symmetric (RᵀR)⁻¹."""
        ...

    def trtri(self, R: Array) -> Array:
        """R (n, n) triangular, replaced by R⁻¹."""
        ...

    def sygst(self, A: Array, R: Array) -> Array:
        """A (n, n) symmetric, replaced by the symmetric RARᵀ for R (n, n) triangular."""
        ...

    def syevd(self, A: Array) -> tuple[Vector, Array]:
        """Eigenvalues (n,) of A (n, n) symmetric, ascending, and the eigenvectors in rows; A is overwritten."""
        ...

    def syevr(self, A: Array, count: int) -> tuple[Vector, Array]:
        """The ``count`` largest eigenvalues of A (n, n) symmetric, descending, and their eigenvectors in rows.

        A is overwritten.
        """
        ...

    def eigvalsh(self, A: Array) -> Vector:
        """Eigenvalues (n,) of A (n, n) symmetric and whole, ascending."""
        ...

    def svdvals(self, A: Array) -> Vector:
        """Singular values (k,) of A (m, n), descending."""
        ...

    def svd(self, A: Array) -> tuple[Vector, Array]:
        """Singular values (k,) of A (m, n), descending, and the right singular vectors in rows (k, n)."""
        ...

    def qr(self, A: Array) -> Array:
        """R (min(m, n), n) of A = QR, zeros below the diagonal."""
        ...

    def inverse(self, A: Array) -> Array | None:
        """A⁻¹ of A (n, n), which is overwritten; None where A is singular."""
        ...

    def row_dots(self, X: Array, Y: Array) -> Vector:
        """The dot products of the rows of X and of Y (m, n)."""
        ...

    def norms(self, X: Array, axis: int) -> Vector:
        """The norms of the columns of X (m, n) for axis 0, of its rows for axis 1; squares do not underflow."""
        ...

    def norm(self, X: Array) -> float:
        """‖X‖_F to a few per cent, whatever X's scale; NaN or infinity where X holds such."""
        ...

    def add_diagonal(self, A: Array, x: float) -> Array:
        """A (n, n), to whose diagonal x was added."""
        ...

    def mirror(self, A: Array) -> Array:
        """A (n, n) symmetric, its lower triangle filled in."""
        ...

    def transpose(self, A: Array) -> Array:
        """Aᵀ (n, m) of A (m, n), in memory of its own."""
        ...


def kernels_of(device: str) -> Kernels:
    """The kernels of a device by its name: "cpu", or as torch has it."""
    if device == "cpu":
        from frodctl.method.kernels.host import Host

        return Host()
    from frodctl.method.kernels.device import Device

    return cast("Kernels", Device(device))


def has_gpu() -> bool:
    """Whether torch may find a GPU here: looked for in the system, as importing torch takes a second."""
    if sys.platform == "linux":
        return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    return sys.platform == "win32"

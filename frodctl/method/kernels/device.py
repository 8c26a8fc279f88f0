"""The kernels on a device of torch's. It has no routines for triangles there: they are products of whole matrices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from frodctl.arrays import from_torch, to_torch

if TYPE_CHECKING:
    from frodctl.method.kernels import Vector

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 products float32, whatever the caller allows for speed elsewhere (TF32, bfloat16)."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    settings = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # torch 2.9 and newer
    if not settings:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    earlier = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, earlier, strict=True):
            setting.fp32_precision = value
        if not settings:
            torch.set_float32_matmul_precision(before)


class Device:
    """See `Kernels`."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.name = str(self.device)

    def identity(self) -> list[str]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return [name, f"torch {torch.__version__}", str(torch.get_num_threads())]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=_DTYPES[dtype], device=self.device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=_DTYPES[dtype], device=self.device)

    def buffer(self, nbytes: int) -> Any:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()

    def ahead(self, arrays: Iterator[Any]) -> Iterator[torch.Tensor]:
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        before = None
        for X in arrays:
            with torch.cuda.stream(copies) if copies else nullcontext():
                tensor = to_torch(X).to(self.device, non_blocking=True, copy=True).contiguous()
            if before is not None:
                yield before  # its arithmetic is begun while X is copied
            if copies:
                copies.synchronize()
                tensor.record_stream(torch.cuda.current_stream(self.device))
            before = tensor
        if before is not None:
            yield before

    def put(self, X: Any, dtype: str | None = None) -> torch.Tensor:
        tensor = X if isinstance(X, torch.Tensor) else to_torch(X)
        return tensor.to(self.device).to(_DTYPES[dtype] if dtype else tensor.dtype).contiguous()

    def get(self, X: torch.Tensor, out: Any = None) -> Any:
        if out is None:
            return from_torch(X.cpu())
        out[...] = from_torch(X.to(_DTYPES[out.dtype.name]).cpu())
        return out

    def copy(self, X: Any, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(X if isinstance(X, torch.Tensor) else to_torch(X).to(self.device))

    @full_float32()
    def gemm(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        beta: float = 0,
    ) -> torch.Tensor:
        return out.addmm_(A.T if transpose_a else A, B.T if transpose_b else B, beta=beta)

    @full_float32()
    def matmul(self, A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.matmul(A, B, out=out)

    @full_float32()
    def csrmm(self, starts: Any, columns: Any, entries: Any, X: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            M = torch.sparse_csr_tensor(
                self.put(starts),
                self.put(columns),
                self.put(entries).to(X.dtype),
                (len(starts) - 1, len(X)),
                check_invariants=False,
            )
        return M @ X

    @full_float32()
    def syrk(self, X: torch.Tensor, out: torch.Tensor, *, beta: float = 0, rows: bool = False) -> torch.Tensor:
        return out.addmm_(X, X.T, beta=beta) if rows else out.addmm_(X.T, X, beta=beta)

    def axpby(self, a: float, X: torch.Tensor, b: float, out: torch.Tensor) -> torch.Tensor:
        return torch.add(out.mul_(b), X, alpha=a, out=out) if b else out.copy_(X).mul_(a)

    @full_float32()
    def trmm(self, X: torch.Tensor, R: torch.Tensor, *, transpose: bool = False) -> torch.Tensor:
        R = R.triu()
        return X.copy_(X @ (R.T if transpose else R))

    def trsm(self, R: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        return X.copy_(torch.linalg.solve_triangular(R.T, X, upper=False))

    def potrf(self, A: torch.Tensor) -> bool:
        L, info = torch.linalg.cholesky_ex(A.T)
        A.copy_(L.T)
        return bool(info == 0) and bool(torch.isfinite(A.diagonal()).all())

    def potri(self, R: torch.Tensor) -> torch.Tensor:
        return R.copy_(torch.cholesky_inverse(R.triu(), upper=True))

    def trtri(self, R: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
        return R.copy_(torch.linalg.solve_triangular(R, eye, upper=True))

    @full_float32()
    def sygst(self, A: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        R = R.triu()
        return torch.mm(R @ self.mirror(A), R.T, out=A)

    def syevd(self, A: torch.Tensor) -> tuple[Vector, torch.Tensor]:
        values, vectors = torch.linalg.eigh(A, UPLO="U")
        return _vector(values), vectors.T.contiguous()

    def syevr(self, A: torch.Tensor, count: int) -> tuple[Vector, torch.Tensor]:
        values, vectors = torch.linalg.eigh(A, UPLO="U")
        return _vector(values.flip(0)[:count]), vectors.T.flip(0)[:count].contiguous()

    def eigvalsh(self, A: torch.Tensor) -> Vector:
        return _vector(torch.linalg.eigvalsh(A))

    def svdvals(self, A: torch.Tensor) -> Vector:
        return _vector(torch.linalg.svdvals(A))

    def svd(self, A: torch.Tensor) -> tuple[Vector, torch.Tensor]:
        _, values, rows = torch.linalg.svd(A, full_matrices=False)
        return _vector(values), rows.contiguous()

    def qr(self, A: torch.Tensor) -> torch.Tensor:
        R: torch.Tensor = torch.linalg.qr(A, mode="r").R
        return R.contiguous()

    def inverse(self, A: torch.Tensor) -> torch.Tensor | None:
        found, info = torch.linalg.inv_ex(A)
        return None if info or not torch.isfinite(found).all() else found.contiguous()

    def row_dots(self, X: torch.Tensor, Y: torch.Tensor) -> Vector:
        return _vector(torch.linalg.vecdot(X, Y))

    def norms(self, X: torch.Tensor, axis: int) -> Vector:
        return _vector(torch.linalg.vector_norm(X, dim=axis, dtype=torch.float64))

    def norm(self, X: torch.Tensor) -> float:
        norm = float(torch.linalg.vector_norm(X, dtype=torch.promote_types(X.dtype, torch.float32)))
        if 1e-15 < norm < 1e15:
            return norm
        peak = float(X.abs().max()) if X.numel() else 0.0
        if not 0 < peak < float("inf"):
            return peak
        return peak * float(torch.linalg.vector_norm(X.double() / peak))

    def add_diagonal(self, A: torch.Tensor, x: float) -> torch.Tensor:
        A.diagonal().add_(x)
        return A

    def mirror(self, A: torch.Tensor) -> torch.Tensor:
        strict = A.triu(1)
        return A.triu_().add_(strict.T)

    def transpose(self, A: torch.Tensor) -> torch.Tensor:
        return A.T.contiguous()


def _vector(X: torch.Tensor) -> Vector:
    return np.asarray(X.double().cpu().numpy())

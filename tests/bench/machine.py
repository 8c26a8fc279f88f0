"""What the benchmarks run on: the processor, the rates of its matrix products, the versions of the libraries."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from process import printed

import frodctl

LIBRARIES = ("numpy", "scipy", "torch", "transformers", "peft", "safetensors")

#: Prints the best rate of five products of size n in each dtype, in GFLOP/s.
_TIMED = """
import json, sys, time
n = int(sys.argv[1])
def rate(product):
    product()  # so that the threads are there
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds) / 1e9
"""
_PRODUCTS = {
    "numpy": """
import numpy as np
def rate_of(dtype):
    A = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
    C = np.empty_like(A)
    return rate(lambda: np.matmul(A, A, out=C))
print(json.dumps({dtype: rate_of(dtype) for dtype in ("float32", "float64")}))
""",
    "scipy": """
import numpy as np
from scipy.linalg import blas
def rate_of(dtype, gemm):
    A = np.asfortranarray(np.random.default_rng(0).standard_normal((n, n)), dtype)
    C = np.empty_like(A, order="F")
    return rate(lambda: gemm(1.0, A, A, c=C, overwrite_c=1))
print(json.dumps({"float32": rate_of("float32", blas.sgemm), "float64": rate_of("float64", blas.dgemm)}))
""",
    "torch": """
import torch
def rate_of(dtype):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    C = torch.empty_like(A)
    return rate(lambda: torch.mm(A, A, out=C))
print(json.dumps({dtype: rate_of(dtype) for dtype in ("float32", "float64", "bfloat16")}))
""",
}

Rates = dict[str, dict[str, float]]


def gemm_rates(n: int = 3072) -> Rates:
    """GFLOP/s of square products by library and dtype, each library in a process of its own."""
    return {library: printed(_TIMED + program, [str(n)]) for library, program in _PRODUCTS.items()}


def rates_table(rates: Sequence[Rates], n: int) -> str:
    """What was measured at several moments, in Markdown."""
    dtypes = ("float32", "float64", "bfloat16")
    lines = [f"| GFLOP/s of a product, n = {n} | {' | '.join(dtypes)} |", "|---|---|---|---|"]
    for library in rates[0]:
        cells = (_span([found[library][dtype] for found in rates if dtype in found[library]]) for dtype in dtypes)
        lines.append(f"| {library} | {' | '.join(cells)} |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(weightwatcher: Path | None = None) -> dict[str, str]:
    """Versions of Python and of the libraries that take part; WeightWatcher's is that of its own Python."""
    found = {"python": platform.python_version(), "frodctl": _commit()}
    found |= {name: version(name) for name in LIBRARIES}
    if weightwatcher:
        program = "import importlib.metadata, json; print(json.dumps(importlib.metadata.version('weightwatcher')))"
        found["weightwatcher"] = printed(program, python=str(weightwatcher))
    return found


def description(libraries: Mapping[str, str] | None = None) -> str:
    """The machine and the versions in a line."""
    named = ", ".join(f"{name} {number}" for name, number in (libraries or versions()).items())
    return f"{processor()}, {cores()} cores, {platform.system()}; {named}"


def _commit() -> str:
    """frodctl's version and the commit of this source, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " at ".join(filter(None, (frodctl.__version__, done.stdout.strip())))


def _span(values: Sequence[float]) -> str:
    if not values:
        return "–"
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return least if least == most else f"{least}–{most}"

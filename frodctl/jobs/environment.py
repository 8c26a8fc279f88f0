"""What a bug report needs of the environment: versions, devices, threads, folders; no secret."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from urllib.parse import urlsplit

import frodctl
from frodctl.checkpoint.inputs import Json
from frodctl.jobs.columns import Column

COLUMNS = (Column("name", "name", "text"), Column("value", "value", "text"))
_PACKAGES = (
    "numpy", "scipy", "ml-dtypes", "safetensors", "huggingface-hub", "hf-xet", "threadpoolctl", "click", "rich",
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "matplotlib",
)  # fmt: skip
#: Of which the values may be seen; what else is in the environment is nobody's business.
_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DOWNLOAD_TIMEOUT", "NO_COLOR", "LANG", "TERM",
)  # fmt: skip


def environment(*, devices: bool = False) -> dict[str, Json]:
    """The facts by their names; with ``devices`` also the GPUs, for which torch is imported."""
    return dict(_facts(devices))


def rows(facts: dict[str, Json]) -> list[dict[str, Json]]:
    """The facts as lines of a table."""
    return [{"name": name, "value": value} for name, value in facts.items()]


def _facts(devices: bool) -> Iterator[tuple[str, Json]]:
    yield "frodctl", frodctl.__version__
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    yield "machine", platform.machine()
    yield "cores", os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        yield "cores_allowed", len(os.sched_getaffinity(0))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory_bytes", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for package in _PACKAGES:
        yield package, _version(package)
    yield from _libraries()
    yield from _hub()
    for name in _VARIABLES:
        yield name, os.environ.get(name)
    if devices:
        yield from _devices()


def _version(package: str) -> str | None:
    """Of what is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libraries() -> Iterator[tuple[str, Json]]:
    """The libraries of arithmetic, and how many threads they take."""
    import numpy
    import scipy.linalg
    from threadpoolctl import threadpool_info

    for package in (numpy, scipy):
        package_folder = os.path.dirname(str(package.__file__))
        for found in threadpool_info():
            if os.path.dirname(found["filepath"]).startswith(package_folder):
                kind = f"{found['internal_api']} {found['version']}"
                yield f"{package.__name__}_blas", f"{kind}, {found.get('architecture')}, {found['num_threads']} threads"


def _hub() -> Iterator[tuple[str, Json]]:
    """How the Hub is reached; of a token only whether there is one."""
    from huggingface_hub import constants, get_token

    endpoint = urlsplit(constants.ENDPOINT)
    yield "hub_endpoint", f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}{endpoint.path}"
    yield "hub_cache", constants.HF_HUB_CACHE
    yield "hub_token", "given" if get_token() else "none"


def _devices() -> Iterator[tuple[str, Json]]:
    import torch

    yield "torch_threads", torch.get_num_threads()
    yield "torch_cuda", torch.version.cuda
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{found.name}, {found.total_memory} bytes, compute {found.major}.{found.minor}"

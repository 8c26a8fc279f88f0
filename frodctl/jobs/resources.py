"""The device a job computes on, and whether its memory will do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from frodctl.errors import OutOfResources, UsageError
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.ranks import BY_ITSELF, Launch
from frodctl.method.kernels import has_gpu, kernels_of

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from frodctl.method.forecast import Rates
    from frodctl.method.kernels import Kernels


#: Resident memory of the process before any tensor: the interpreter, numpy and scipy.
PROCESS_BYTES = 70_000_000
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


def choose_device(name: str, number: int = 0) -> Kernels:
    """The kernels of the device called ``name``: "auto" is a CUDA GPU if there is one, else the CPU.

    Of several GPUs it is the one with this number, or so many times around, unless the name says which.

    Raises
    ------
    UsageError
        There is no such device here, or it has no float64 arithmetic.
    """
    if name == "cpu" or (name == "auto" and not has_gpu()):
        return kernels_of("cpu")
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return kernels_of("cpu")
    if name in ("auto", "cuda") and torch.cuda.device_count():
        return kernels_of(f"cuda:{number % torch.cuda.device_count()}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`device` {name}: not a device; say auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"`device` {name}: no such GPU here ({torch.cuda.device_count()} found)")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"`device` {name}: only cpu and cuda have the float64 arithmetic that is needed; say `device=cpu`"
        )
    return kernels_of(str(device))


def take_device(name: str, progress: Callback, nbytes: int = 0, launch: Launch = BY_ITSELF) -> Kernels:
    """`choose_device` for work that needs ``nbytes`` of its memory; where there is a GPU, say what "auto" came to.

    "auto" leaves a GPU that has not so much for the CPU, unless this is one of several ranks, which must be alike.

    Raises
    ------
    UsageError
        As `choose_device`.
    OutOfResources
        The device has not so much.
    """
    return take_devices(name, progress, [nbytes], launch)[0]


def take_devices(name: str, progress: Callback, needs: Sequence[int], launch: Launch = BY_ITSELF) -> list[Kernels]:
    """`take_device` for several works one after the other, by the bytes that each needs."""
    kernels = choose_device(name, launch.local_number)
    chosen = [kernels] * len(needs)
    if name == "auto" and kernels.name != "cpu":
        free = _available(kernels.name) if launch.count == 1 else None
        chosen = [kernels if free is None or free >= nbytes else kernels_of("cpu") for nbytes in needs]
        left = sum(each is not kernels for each in chosen)
        if left < len(needs):
            progress(Progress(f"computing on {kernels.name}, {kernels.identity()[0]}"))
        if free is not None and left:
            some = "" if left == len(needs) else f" {left} of {len(needs)}, as the table says,"
            progress(
                Progress(
                    f"computing{some} on the CPU: {kernels.name} has {free / 1e9:.2f} GB of memory available, of about "
                    f"{max(needs) / 1e9:.2f} GB needed"
                )
            )
    elif name == "auto" and _NVIDIA_DRIVER.exists():
        progress(Progress("computing on the CPU: this torch finds no GPU, although NVIDIA's driver is here"))
    for device in {each.name for each in chosen}:
        most = max(nbytes for nbytes, each in zip(needs, chosen, strict=True) if each.name == device)
        require_memory(most, device, launch.local_count)
    return chosen


def measured_rates(device: str) -> Rates | None:
    """What the device can do in a second, measured in less; None where there is no such device here."""
    from frodctl.method.forecast import Rates

    try:
        return Rates.of(choose_device(device))
    except UsageError:
        return None


def require_memory(nbytes: int, device: str, processes: int = 1) -> None:
    """Raise `OutOfResources` if ``nbytes`` are not available on the device for each process of this machine."""
    nbytes *= processes if device == "cpu" else 1
    available = _available(device)
    if available is not None and available < nbytes:
        raise OutOfResources(
            f"about {nbytes / 1e9:.2f} GB of memory needed on {device}, {available / 1e9:.2f} GB available; "
            f"{_way_out(device)}choose fewer or narrower target modules"
        )


def require_address_space() -> None:
    """Raise `OutOfResources` where a limit of virtual memory leaves no room for the libraries of arithmetic.

    OpenBLAS, which numpy and scipy each bring, reserves memory for every core as it is loaded, and where it gets none
    it waits or ends the process.
    """
    room = _address_space_left()
    needed = 130_000_000 + 2 * 41_000_000 * (os.cpu_count() or 1)
    if room is not None and room < needed:
        raise OutOfResources(
            f"out of memory: the limit of virtual memory (ulimit -v) leaves {room / 1e6:.0f} MB, and the libraries of "
            f"arithmetic reserve about {needed / 1e6:.0f} MB"
        )


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turn an allocation that failed into `OutOfResources`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfResources(
            f"out of memory on {device}; {_way_out(device)}choose fewer or narrower target modules, or give a "
            "`memory_limit`"
        ) from None


def _way_out(device: str) -> str:
    """What else there is to compute on."""
    return "" if device == "cpu" else "say `device=cpu`, or "


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python, C++, torch, CUDA, cuBLAS, cuSOLVER, or of a library as it is loaded."""
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc", "failed to map segment")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError) and any(sign in str(error) for sign in signs)
    )


def _available(device: str) -> int | None:
    """Bytes available, or None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    limits = [_meminfo(), _cgroup(), _address_space()]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo() -> int | None:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take (cgroup v2)."""
    if not all((folder / f"memory.{name}").is_file() for name in ("max", "current", "stat")):
        return None
    limit = (folder / "memory.max").read_text().strip()
    if not limit.isdigit():
        return None
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    page_cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back on demand
    return max(0, int(limit) - int((folder / "memory.current").read_text()) + page_cache)


def _address_space(status: Path = Path("/proc/self/status")) -> int | None:
    """What the process may have resident below its limit of virtual memory (``ulimit -v``), with what it has."""
    room = _address_space_left(status)
    return None if room is None else max(0, room + _memory_of_process("VmRSS", status))


def _address_space_left(status: Path = Path("/proc/self/status")) -> int | None:
    """What the process may still reserve of virtual memory; None where there is no limit."""
    if resource is None or not status.is_file():
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit - _memory_of_process("VmSize", status)


def _memory_of_process(key: str, status: Path) -> int:
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0]) * 1024

"""How much memory a container or a process may still take, and errors of allocation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frodctl.errors import OutOfResources
from frodctl.jobs import resources


@pytest.mark.parametrize(("limit", "available"), [("1000", 600), ("max", None), ("300", 0)])
def test_the_page_cache_counts_as_available(limit: str, available: int | None, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\nactive_file 200\n")
    assert resources._cgroup(tmp_path) == available


def test_without_such_a_container_nothing_is_known(tmp_path: Path) -> None:
    assert resources._cgroup(tmp_path) is None


def under(limit_kib: int, program: str) -> subprocess.CompletedProcess[str]:
    """A program under a limit of virtual memory."""
    command = ["bash", "-c", f'ulimit -v {limit_kib}; exec "$@"', "bash", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_limit_of_virtual_memory_counts() -> None:
    program = "from frodctl.jobs.resources import _address_space; print(_address_space())"
    done = under(500_000, program)
    assert 300e6 < int(done.stdout) < 500_000 * 1024
    assert resources._address_space(Path("/proc/no such file")) is None


def test_too_little_virtual_memory_is_out_of_resources(tmp_path: Path) -> None:
    """Before the work where it can be known, and where it cannot all the same."""
    from tests.conftest import save_checkpoint

    model = save_checkpoint(tmp_path / "m", {f"layers.{i}.up.weight": torch.randn(2048, 2048) for i in range(2)})
    arguments = ["decompose", str(model), "--target-modules", "all-linear", "-o", str(tmp_path / "b.safetensors"), "-q"]
    for limit in (200_000, 360_000):
        done = under(limit, f"import sys; from frodctl.cli.main import main; sys.exit(main({arguments!r}))")
        assert done.returncode == 4, done.stderr
        assert "memory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=repr,
)
def test_an_allocation_that_failed_is_out_of_resources(error: Exception) -> None:
    with pytest.raises(OutOfResources, match="out of memory on cpu"), resources.memory_errors("cpu"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")], ids=repr)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), resources.memory_errors("cpu"):
        raise error

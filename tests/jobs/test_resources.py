"""How much memory a container or a process may still take, and errors of allocation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frodctl.errors import OutOfResources, UsageError
from frodctl.jobs import resources
from frodctl.jobs.decompose import DecomposeOptions, plan_decompose
from frodctl.jobs.progress import Progress
from frodctl.jobs.ranks import BY_ITSELF, Launch
from frodctl.method.kernels import kernels_of
from frodctl.method.kernels.device import Device
from tests.conftest import Run


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that torch describes, and that computes nothing: 80 MB, of which 50 MB are free."""
    described = {
        "is_available": True,
        "device_count": 1,
        "mem_get_info": (50_000_000, 80_000_000),
        "get_device_name": "Small GPU",
    }
    for name, value in described.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(resources, "has_gpu", lambda: True)


def taken(name: str, nbytes: int, launch: Launch = BY_ITSELF) -> tuple[str, list[str]]:
    """The device, and what was said of it."""
    said: list[Progress] = []
    kernels = resources.take_device(name, said.append, nbytes, launch)
    return kernels.name, [report.text for report in said]


class Named(Device):
    """torch's arithmetic on the CPU, under another device's name."""

    def __init__(self, name: str) -> None:
        super().__init__("cpu")
        self.name = name


@pytest.mark.usefixtures("gpu")
class TestAGpu:
    def test_taken_unasked_is_named(self) -> None:
        assert taken("auto", 40_000_000) == ("cuda:0", ["computing on cuda:0, Small GPU"])

    def test_too_small_is_left_unasked(self, frodctl: Run, example: Path) -> None:
        said = "computing on the CPU: cuda:0 has 0.05 GB of memory available, of about 0.06 GB needed"
        assert taken("auto", 60_000_000) == ("cpu", [said])
        done = frodctl("decompose", example, "-o", "b.safetensors", "--target-modules", "v_proj")
        assert done.returncode == 0
        assert "computing on the CPU: cuda:0 has 0.05 GB" in done.stderr
        assert "s on cpu" in done.stderr

    def test_too_small_for_some_is_left_for_these(
        self, frodctl: Run, example: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What they are computed on is said of each; here the GPU's arithmetic is torch's on the CPU."""
        options = DecomposeOptions.of(target_modules="all-linear", device="cpu")
        plan = plan_decompose(example, None, options, dry_run=True)
        needs = [category.most_memory_bytes(plan.memory(category)) for category in plan.categories]
        free = sorted(needs)[len(needs) // 2]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 80_000_000))
        monkeypatch.setattr(resources, "kernels_of", lambda name: Named(name) if name != "cpu" else kernels_of(name))
        done = frodctl("decompose", example, "-o", "b.safetensors", "--target-modules", "all-linear", "--json")
        assert done.returncode == 0, done.stderr
        expected = ["cuda:0" if nbytes <= free else "cpu" for nbytes in needs]
        assert [row["device"] for row in json.loads(done.stdout)["categories"]] == expected
        assert f"computing {expected.count('cpu')} of 7, as the table says, on the CPU: cuda:0 has" in done.stderr

    def test_asked_for_is_taken_without_a_word(self) -> None:
        assert taken("cuda:0", 40_000_000) == ("cuda:0", [])
        assert taken("cpu", 60_000_000) == ("cpu", [])

    def test_asked_for_and_too_small_is_out_of_resources(self, frodctl: Run, example: Path, tmp_path: Path) -> None:
        done = frodctl("decompose", example, "-o", "b.safetensors", "--device", "cuda")
        assert done.returncode == 4
        assert "needed on cuda:0, 0.05 GB available; say --device cpu, or choose fewer" in done.stderr
        assert not list(tmp_path.iterdir())

    def test_ranks_are_alike(self) -> None:
        ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        launch = Launch({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
        with pytest.raises(OutOfResources, match="on cuda:0"):
            taken("auto", 60_000_000, launch)

    def test_out_of_its_memory_is_out_of_resources(self) -> None:
        with (
            pytest.raises(OutOfResources, match=r"memory on cuda:0; say `device=cpu`"),
            resources.memory_errors("cuda:0"),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def test_without_a_gpu_nothing_is_said() -> None:
    assert taken("auto", 1000) == ("cpu", [])


@pytest.mark.parametrize("name", ["mps", "xpu:1", "meta"])
def test_devices_without_float64(name: str, frodctl: Run, example: Path) -> None:
    with pytest.raises(UsageError, match=f"{name}: .*float64.*`device=cpu`"):
        resources.choose_device(name)
    done = frodctl("inspect", example, "--spectrum", "--device", name)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("say --device cpu")

"""Reading tensors: the right bytes, digested, checked, ahead of their use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frodctl.arrays import NAMED, from_torch, to_torch
from frodctl.checkpoint import codec, stream
from frodctl.checkpoint.records import TensorInfo
from frodctl.errors import InvalidInput, OutOfResources
from tests.conftest import LLAMA_CONFIG, PEAK_MEMORY, llama_layers, save_checkpoint

TORCH_DTYPES = [getattr(torch, name) for name in NAMED]
FLOATS = [NAMED[name] for name in ("float16", "bfloat16", "float32", "float64")]


def infos(path: Path) -> dict[str, TensorInfo]:
    header = codec.read_header(path)
    return {s.name: TensorInfo(s.name, s.dtype, s.shape, path.name, at) for s, at in header.tensors.values()}


def test_every_dtype_and_shape_reads_as_with_the_library(tmp_path: Path) -> None:
    raw = torch.arange(96, dtype=torch.uint8) % 2  # 0 and 1 are booleans too
    tensors = {str(dtype): raw.clone().view(dtype).reshape(2, -1) for dtype in TORCH_DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "byte": torch.ones(1, dtype=torch.uint8)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for name, expected in load_file(path).items():
        read = stream.read_tensor(tmp_path, infos(path)[name])
        assert (to_torch(read).dtype, read.shape) == (expected.dtype, expected.shape)
        assert stream.tensor_bytes(read) == stream.tensor_bytes(from_torch(expected))


def test_a_slice_reads_as_the_slice_of_the_whole(tmp_path: Path) -> None:
    experts = torch.randn(3, 4, 5).bfloat16()
    save_file({"a": torch.ones(1), "experts": experts}, tmp_path / "x.safetensors")
    info = infos(tmp_path / "x.safetensors")["experts"]
    for i in range(3):
        assert torch.equal(to_torch(stream.read_tensor(tmp_path, info.slice(i))), experts[i])


def test_the_digest_is_that_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.randn(3, 5).half(), "b": torch.randn(7)}, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    for info in infos(tmp_path / "x.safetensors").values():
        stored = raw[info.offset : info.offset + info.nbytes]
        tensor = stream.read_tensor(tmp_path, info)
        assert stream.digest(tensor) == "sha256:" + hashlib.sha256(stored).hexdigest()


def test_a_file_that_shrank_since_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"some.weight": torch.randn(64)}, path)
    info = infos(path)["some.weight"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=r"x\.safetensors.*some\.weight"):
        stream.read_tensor(tmp_path, info)


def test_no_memory_for_a_tensor_is_said_with_its_name(tmp_path: Path) -> None:
    """More than any machine's address space has."""
    info = TensorInfo("some.weight", "F32", (2**60,), "x.safetensors", 0)
    with pytest.raises(OutOfResources, match=r"some\.weight"):
        stream.read_tensor(tmp_path, info)


COMMANDS = """
import os, resource, sys
from frodctl.cli.main import main
import frodctl.jobs.decompose.run, frodctl.jobs.inspect.run
from tests.conftest import *

def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, resource.RLIM_INFINITY))

main(["inspect", "small", "--spectrum", "-q"]), main(["inspect", "small", "--estimate", "-q"])  # all is imported
main(["decompose", "small", "-o", "small.safetensors", "-q"])
large = [["inspect", "large", "--spectrum"], ["inspect", "large", "--estimate"]]
large += [["decompose", "large", "-o", "b.safetensors"]]
for megabytes, command in [(40, ["inspect", "legacy.bin"]), *((m, command) for m in (40, 100) for command in large)]:
    limit(megabytes)
    code = main(command)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    print("code", code, megabytes, *command, file=sys.stderr)
"""


def test_too_little_memory_ends_every_command_with_exit_4(tmp_path: Path) -> None:
    """One weight of 64 MB where 40 MB are left, and where it can be read but not worked on."""
    save_checkpoint(tmp_path / "small", llama_layers(2), LLAMA_CONFIG)
    large = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4000, 4000)}
    save_checkpoint(tmp_path / "large", large, LLAMA_CONFIG)
    torch.save(large | {"b": torch.ones(4000, 4000)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("code ")]
    assert codes == ["4"] * 7, done.stderr


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted_and_the_tensor_named(dtype: np.dtype[Any], value: float) -> None:
    tensor = np.ones((40, 50), dtype)
    tensor[3, 4] = tensor[-1, -1] = value
    with pytest.raises(InvalidInput, match=r"model\.bin.*some\.weight.* 2 values"):
        stream.check_finite(tensor, "some.weight", "model.bin")
    with pytest.raises(InvalidInput):
        stream.check_finite(tensor.T, "some.weight", "model.bin")


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(InvalidInput):
        stream.check_finite(np.array([np.inf, -np.inf]), "w", "f")


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_finite_values_are_finite_though_their_sum_is_not(dtype: np.dtype[Any]) -> None:
    stream.check_finite(np.full(100, ml_dtypes.finfo(dtype).max, dtype), "w", "f")
    stream.check_finite(np.empty((0, 3), dtype), "w", "f")


def test_checking_takes_no_multiple_of_the_tensors_memory() -> None:
    """One big tensor is read and checked in a process of its own; its peak stays near one copy of the tensor."""
    code = (
        f"import ml_dtypes\nimport numpy as np\nfrom frodctl.checkpoint import stream\n{PEAK_MEMORY}\n"
        "stream.check_finite(np.ones(10), 'w', 'f')\n"
        "tensor = np.ones(32 * 2**20, ml_dtypes.bfloat16)  # 64 MiB\n"
        "before = peak()\n"
        "stream.check_finite(tensor, 'w', 'f')\n"
        "print((peak() - before) // 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64

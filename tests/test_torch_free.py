"""On a CPU the commands do their work where torch cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import frodctl
from tests import peft_models
from tests.training.conftest import perturb

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch was to be imported")

sys.meta_path.insert(0, NoTorch())
"""
COMMAND = "from frodctl.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
#: In a folder with the `files`.
COMMANDS = (
    "--help",
    "env",
    "decompose base -o out.safetensors --target-modules all-linear",
    "merge base adapter out",
    "merge base self-contained out",
    "merge base peft out",
    "merge base adapter out --scale 0.5 --also peft:0.5",
    "merge base adapter out --as lora --rank 8",
    "extract base other out --rank 8",
    "extract base other out --as frod --basis basis.safetensors",
    "inspect base",
    "inspect base --spectrum",
    "inspect base --estimate",
    "inspect other --against base",
    "inspect other --against base --spectrum",
    "inspect basis.safetensors",
    "inspect basis.safetensors --spectrum",
    "inspect basis.safetensors --base base",
    "inspect adapter",
    "inspect adapter --spectrum",
    "inspect adapter --base base",
    "inspect adapter --base base --merged other",
    "inspect peft --base base",
)


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code, *arguments],
        cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(frodctl.__file__).parents[1])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its basis, adapters of frodctl's and of PEFT's, and a merged model; made with torch."""
    root = tmp_path_factory.mktemp("files")
    base = peft_models.save_base(root / "base", "llama", torch.bfloat16)
    frodctl.decompose(base, root / "basis.safetensors", target_modules="q_proj,down_proj", sparsity=0.05)
    model = frodctl.attach(peft_models.task_model("llama", base), root / "basis.safetensors")
    perturb(model)
    frodctl.save_adapter(model, root / "adapter")
    frodctl.save_adapter(model, root / "self-contained", self_contained=True)
    peft_models.trained_adapter(root / "peft", "llama", base)
    frodctl.merge(base, root / "adapter", root / "other", basis=root / "basis.safetensors")
    return root


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """The files under the same names, in a folder that may be written to."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands(command: str, folder: Path) -> None:
    done = python(COMMAND, *command.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr


def test_what_they_write_is_what_they_write_with_torch(folder: Path) -> None:
    """Merged where torch is imported, as `other` was, and where it is not."""
    done = python(COMMAND, "merge", "base", "adapter", "out", "--basis", "basis.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("other", "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_library_is_imported(tmp_path: Path) -> None:
    done = python("import frodctl\nfrodctl.decompose, frodctl.merge, frodctl.inspect, frodctl.open_basis", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_torch_is_kept_away(tmp_path: Path) -> None:
    """Else the others would say nothing."""
    assert "torch was to be imported" in python("import frodctl\nfrodctl.attach", cwd=tmp_path).stderr

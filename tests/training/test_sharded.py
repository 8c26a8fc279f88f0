"""Training with every parameter sharded over two processes (FSDP 1 and 2), or every batch, is training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import frodctl
from frodctl.errors import UsageError
from frodctl.training.saving import trained_state
from tests.training.conftest import Cases, mixture
from tests.training.sharded import attached, train

KINDS = ("bert", "mixture")
Files = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def files(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A checkpoint and its basis of each kind."""
    bert = cases("bert")
    return {"bert": (bert.base, bert.basis), "mixture": mixture(tmp_path_factory.mktemp("mixture") / "files")}


@pytest.fixture(scope="module")
def folder(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved that accelerate launched, in a folder of each kind."""
    folder = tmp_path_factory.mktemp("ranks")
    inputs = [str(folder)]
    for kind in KINDS:
        (folder / kind).mkdir()
        inputs += [kind, *map(str, files[kind])]
    options = (
        "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "-m", "tests.training.sharded"]
    done = subprocess.run(
        [*launch, *inputs], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_and_save_one_adapter(kind: str, files: Files, folder: Path, tmp_path: Path) -> None:
    found = folder / kind
    alone = attached(kind, *files[kind])
    losses = train(alone, kind)
    frodctl.save_adapter(alone, tmp_path / "alone")
    assert json.loads((found / "losses.json").read_text()) == pytest.approx(losses, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for way in ("gathered", "given", "pretrained"):
        check_alike(load_file(found / way / "adapter_model.safetensors"), expected)
    loaded = frodctl.load_adapter(untrained(kind, files), found / "gathered", files[kind][1]).state_dict()
    again = load_file(found / "pretrained" / "model.safetensors")
    assert again.keys() == trained_state(alone).keys()
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in again.items())


def test_two_processes_by_fsdps_first_version(files: Files, folder: Path, tmp_path: Path) -> None:
    kind = "bert"
    alone = attached(kind, *files[kind])
    losses = train(alone, kind)
    frodctl.save_adapter(alone, tmp_path / "alone")
    assert json.loads((folder / kind / "flattened.json").read_text()) == pytest.approx(losses, rel=1e-5)
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    check_alike(load_file(folder / kind / "summoned" / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_half_a_batch_each(kind: str, files: Files, folder: Path, tmp_path: Path) -> None:
    """By DistributedDataParallel and by accelerate. Experts may have got tokens in one process alone."""
    alone = attached(kind, *files[kind])
    train(alone, kind)
    frodctl.save_adapter(alone, tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for way in ("replicated", "accelerated"):
        check_alike(load_file(folder / kind / way / "adapter_model.safetensors"), expected)


@pytest.mark.long
def test_two_processes_by_deepspeed(files: Files, tmp_path: Path) -> None:
    """ZeRO's stages 2 and 3, where it is installed."""
    pytest.importorskip("deepspeed")
    alone = attached("bert", *files["bert"])
    train(alone, "bert")
    frodctl.save_adapter(alone, tmp_path / "alone")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.training.zero", str(tmp_path), *map(str, files["bert"])]
    environ = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for stage in (2, 3):
        check_alike(load_file(tmp_path / f"zero-{stage}" / "adapter_model.safetensors"), expected)


def untrained(kind: str, files: Files) -> Any:
    model = attached(kind, *files[kind])
    frodctl.training.detach(model)
    return model


def check_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_a_state_without_the_adapter(cases: Cases, tmp_path: Path) -> None:
    case = cases("bert")
    with pytest.raises(UsageError, match=r"no .*\.delta"):
        frodctl.save_adapter(case.trained(), tmp_path / "adapter", state_dict=case.model().state_dict())
    assert not (tmp_path / "adapter").exists()

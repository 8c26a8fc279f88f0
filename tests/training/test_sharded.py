"""Training with every parameter sharded over two processes (`fully_shard`) is training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import frodctl
from frodctl.errors import UsageError
from frodctl.training.saving import trained_state
from tests.training.conftest import Cases
from tests.training.sharded import train


def test_two_processes_train_and_save_one_adapter(cases: Cases, tmp_path: Path) -> None:
    case = cases("bert")
    alone = case.attached().eval()
    losses = train(alone)
    frodctl.save_adapter(alone, tmp_path / "alone")
    command = [sys.executable, "-m", "tests.training.sharded"]
    root, inputs = Path(__file__).parents[2], [str(tmp_path), str(case.base), str(case.basis)]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [
        subprocess.Popen([*command, str(rank), *inputs], stderr=log.open("w"), cwd=root)
        for rank, log in enumerate(logs)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0], [log.read_text() for log in logs]
    finally:
        for process in ranks:
            process.kill()
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(losses, rel=1e-5)
    assert found[-1] != pytest.approx(found[0], rel=1e-3)
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for way in ("gathered", "given", "pretrained"):
        saved = load_file(tmp_path / way / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(saved[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())), (way, key)
    loaded = frodctl.load_adapter(case.model(), tmp_path / "gathered", case.basis).state_dict()
    again = load_file(tmp_path / "pretrained" / "model.safetensors")
    assert again.keys() == trained_state(alone).keys()
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in again.items())


def test_a_state_without_the_adapter(cases: Cases, tmp_path: Path) -> None:
    case = cases("bert")
    with pytest.raises(UsageError, match=r"no .*\.delta"):
        frodctl.save_adapter(case.trained(), tmp_path / "adapter", state_dict=case.model().state_dict())
    assert not (tmp_path / "adapter").exists()

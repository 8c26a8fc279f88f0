"""The commands and training where torch computes: on its CPU, and on a GPU where there is one.

What holds of single routines and of the joint basis is tested on all of them by `tests/method`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frodctl
from frodctl.errors import OutOfResources
from frodctl.jobs.progress import Progress
from frodctl.method.kernels.device import Device
from tests.devices import DEVICES
from tests.jobs.test_decompose import check_identities
from tests.jobs.test_ranks import CORPUS, same_up_to_rounding

BASIS = CORPUS / "basis.safetensors"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def on_cpu(folder: Path) -> dict[str, torch.Tensor]:
    return {name: X for path in sorted(folder.glob("*.safetensors")) for name, X in load_file(path).items()}


def test_decompose(device: str, example: Path, tmp_path: Path) -> None:
    frodctl.decompose(example, tmp_path / "here.safetensors", target_modules="all-linear", device="cpu")
    there = frodctl.decompose(example, tmp_path / "there.safetensors", target_modules="all-linear", device=device)
    assert there.device == device
    check_identities(example, there.output)
    same_up_to_rounding(tmp_path / "here.safetensors", there.output, relative=1e-5)


@pytest.mark.parametrize("form", ["delta", "reconstruct"])
def test_merge(device: str, form: str, example: Path, tmp_path: Path) -> None:
    """To the rounding of bfloat16; what was not trained, to the byte."""
    for name, where in (("here", "cpu"), ("there", device)):
        frodctl.merge(example, CORPUS / "lean", tmp_path / name, basis=BASIS, form=form, device=where)
    here, there, base = (on_cpu(folder) for folder in (tmp_path / "here", tmp_path / "there", example))
    assert here.keys() == there.keys()
    for name, X in here.items():
        change = (X.double() - base[name].double()).norm()
        assert (there[name].double() - X.double()).norm() <= 0.01 * change, name


def test_spectra(device: str, example: Path) -> None:
    here, there = (frodctl.inspect(example, spectrum=True, device=where).targets[0] for where in ("cpu", device))
    for ours, theirs in zip(here.rows, there.rows, strict=True):
        for key in ("spectral_norm", "stable_rank", "effective_rank"):
            assert theirs.values[key] == pytest.approx(ours.values[key], rel=1e-4)


@pytest.mark.parametrize("form", ["input", "weight"])
def test_training(device: str, form: str, example: Path) -> None:
    """The base model's logits before the first step, to the last bit, and the loss falls."""
    model: Any = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).to(device).eval()
    ids = torch.arange(24, device=device).reshape(2, 12)
    before = model(ids).logits
    frodctl.attach(model, BASIS, form=form)
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class Full(Device):
    """A device that runs out of memory as it factors a matrix, as often as is said."""

    def __init__(self, name: str, times: int) -> None:
        super().__init__(name)
        self.times = times

    def potrf(self, A: torch.Tensor) -> bool:
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().potrf(A)


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_once_or_for_good(
    device: str, times: int, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frodctl.jobs.resources.kernels_of", lambda name: Full(name, times))
    said: list[Progress] = []
    output = tmp_path / "basis.safetensors"

    def decompose() -> None:
        frodctl.decompose(example, output, target_modules="v_proj", device=device, progress=said.append)

    if times == 1:
        decompose()
        check_identities(example, output)
    else:
        with pytest.raises(OutOfResources, match=f"out of memory on {device}"):
            decompose()
        assert not output.exists()
    assert sum("v_proj again" in report.text for report in said) == 1

"""Merging into a base whose weights have scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import frodctl
from tests.checkpoint.test_scaled import scaled_llama
from tests.conftest import LLAMA_CONFIG, save_checkpoint
from tests.jobs.conftest import tensors
from tests.jobs.test_merge import write_adapter


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_merge_is_that_of_the_values(dtype: str, tmp_path: Path) -> None:
    """Layers 0 and 1 are changed, 2 is copied; auto takes the dtype of the norm, which has no scales."""
    base, values = scaled_llama(tmp_path / "base", "deepseek", 3)
    norm = {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    dense = save_checkpoint(tmp_path / "dense", values | norm, LLAMA_CONFIG)
    basis = frodctl.decompose(base, tmp_path / "basis.safetensors", target_modules="all-linear", layers="0,1").output
    adapter = write_adapter(tmp_path / "adapter", base, basis, 0.1)
    frodctl.merge(base, adapter, tmp_path / "merged", basis=basis, dtype=dtype)
    expected = "bfloat16" if dtype == "auto" else dtype
    frodctl.merge(dense, adapter, tmp_path / "expected", basis=basis, dtype=expected)
    found, wanted = tensors(tmp_path / "merged"), tensors(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {str(tensor.dtype) for name, tensor in found.items() if "norm" not in name} == {f"torch.{expected}"}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_killed_merge_is_taken_up(tmp_path: Path) -> None:
    """What the journal says that tensors were made from are the values, as they are read."""
    base, _ = scaled_llama(tmp_path / "base", "channel")
    basis = frodctl.decompose(base, tmp_path / "basis.safetensors", target_modules="q_proj").output
    adapter = write_adapter(tmp_path / "adapter", base, basis, 0.1)

    def stop(progress: frodctl.Progress) -> None:
        if progress.text.startswith("reading the result again"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frodctl.merge(base, adapter, tmp_path / "merged", basis=basis, progress=stop)
    result = frodctl.merge(base, adapter, tmp_path / "merged", basis=basis)
    assert result.resumed_tensors == 2 * 4 + 1

"""Quantized checkpoints are recognised by their config or by their tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.source import Location, open_checkpoint
from frodctl.errors import InvalidInput
from tests.conftest import LLAMA_CONFIG, llama_layers, save_checkpoint

LAYER, EXPERTS = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts"
INT32, UINT8, FP8 = torch.ones(4, 8, dtype=torch.int32), torch.ones(64, 1, dtype=torch.uint8), torch.float8_e4m3fn
SCALE = torch.ones(4)
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "gptq": {f"{LAYER}.qweight": INT32, f"{LAYER}.qzeros": INT32, f"{LAYER}.scales": SCALE, f"{LAYER}.g_idx": INT32},
    "awq": {f"{LAYER}.qweight": INT32, f"{LAYER}.qzeros": INT32, f"{LAYER}.scales": SCALE},
    "bitsandbytes 4 bit": {
        f"{LAYER}.weight": UINT8,
        f"{LAYER}.weight.absmax": SCALE,
        f"{LAYER}.weight.quant_map": SCALE,
        f"{LAYER}.weight.quant_state.bitsandbytes__nf4": UINT8,
    },
    "bitsandbytes 8 bit": {f"{LAYER}.weight": torch.ones(4, 8, dtype=torch.int8), f"{LAYER}.SCB": SCALE},
    "fp8": {f"{LAYER}.weight": torch.ones(4, 8).to(FP8), f"{LAYER}.weight_scale_inv": SCALE},
    "fp8 without scales": {f"{LAYER}.weight": torch.ones(4, 8).to(FP8)},
    "compressed-tensors": {f"{LAYER}.weight_packed": INT32, f"{LAYER}.weight_scale": SCALE},
    "mxfp4": {f"{EXPERTS}.gate_up_proj_blocks": UINT8, f"{EXPERTS}.gate_up_proj_scales": UINT8},
    "fp8 experts": {f"{EXPERTS}.gate_up_proj": torch.ones(2, 4, 8).to(FP8)},
    "hqq": {f"{LAYER}.W_q": UINT8, f"{LAYER}.scale": SCALE, f"{LAYER}.zero": SCALE},
}  # fmt: skip


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_the_tensors_alone_tell(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    packed = {name: tensor.clone() for name, tensor in tensors.items()}
    save_checkpoint(tmp_path, {**llama_layers(1), **packed}, LLAMA_CONFIG)
    with pytest.raises(InvalidInput, match=r"quantized.*full-precision") as caught:
        refuse_quantized(open_checkpoint(Location(str(tmp_path))))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "in text_config"])
def test_the_config_alone_tells(tmp_path: Path, method: str, nested: bool) -> None:
    settings: dict[str, Any] = {"quantization_config": {"quant_method": method, "bits": 4}}
    config = {**LLAMA_CONFIG, **({"text_config": settings} if nested else settings)}
    save_checkpoint(tmp_path, llama_layers(1), config)
    with pytest.raises(InvalidInput, match=method):
        refuse_quantized(open_checkpoint(Location(str(tmp_path))))


@pytest.mark.parametrize("settings", [{}, {"quantization_config": None}])
def test_an_ordinary_checkpoint_passes(tmp_path: Path, settings: dict[str, Any]) -> None:
    buffers = {"model.position_ids": torch.arange(4), "model.layers.0.attn.bias": torch.ones(2, 2, dtype=torch.uint8)}
    save_checkpoint(tmp_path, {**llama_layers(1), **buffers}, {**LLAMA_CONFIG, **settings})
    refuse_quantized(open_checkpoint(Location(str(tmp_path))))

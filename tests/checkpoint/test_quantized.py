"""Quantized checkpoints are recognised by their config or by their tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import frodctl
from frodctl.checkpoint.codec import DTYPE_BITS, TensorSpec, write_file
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Location
from frodctl.errors import InvalidInput
from frodctl.formats.basis_file import open_basis
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
    "fp8 with other scales": {f"{LAYER}.weight": torch.ones(4, 8).to(FP8), f"{LAYER}.weight_scale": torch.ones(2, 8)},
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


def test_float64_is_not_narrow(tmp_path: Path) -> None:
    """A buffer in float64, and a checkpoint of nothing else: it is decomposed as its float32 copy is."""
    buffer = {"model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    save_checkpoint(tmp_path / "buffer", {**llama_layers(2), **buffer}, LLAMA_CONFIG)
    refuse_quantized(open_checkpoint(Location(str(tmp_path / "buffer"))))
    for dtype in (torch.float32, torch.float64):
        save_checkpoint(tmp_path / str(dtype), {name: t.to(dtype) for name, t in llama_layers(2).items()}, LLAMA_CONFIG)
        frodctl.decompose(str(tmp_path / str(dtype)), tmp_path / f"{dtype}.safetensors", precision="float64")
    one, other = (open_basis(tmp_path / f"{dtype}.safetensors") for dtype in (torch.float32, torch.float64))
    assert one.metadata.V_digests == other.metadata.V_digests


@pytest.mark.parametrize("dtype", [name for name, bits in DTYPE_BITS.items() if name[0] == "F"])
def test_float_dtypes_below_16_bits_are_narrow(dtype: str, tmp_path: Path) -> None:
    spec = TensorSpec(f"{LAYER}.weight", dtype, (4, 8))
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_file(file, [spec], {}, iter([bytes(spec.nbytes)]))
    checkpoint = open_checkpoint(Location(str(tmp_path)))
    if DTYPE_BITS[dtype] >= 16:
        refuse_quantized(checkpoint)
    else:
        with pytest.raises(InvalidInput, match="quantized"):
            refuse_quantized(checkpoint)

"""Weights of 8 bits with scales: their values, whichever command reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frodctl
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Location
from frodctl.checkpoint.stream import digest, read_tensor
from frodctl.errors import InvalidInput
from frodctl.formats.basis_file import open_basis
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint

FP8, BLOCK = torch.float8_e4m3fn, (16, 24)  #: that divides neither 32 nor 48 both ways
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """compressed-tensors' account of such weights."""
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


#: What config.json says; the scales' name, dtype and shape for a weight (m, n); rows and columns of each.
FORMS: dict[str, tuple[dict[str, Any], str, torch.dtype, Any, Any]] = {
    "deepseek": (DEEPSEEK, "weight_scale_inv", torch.float32, None, BLOCK),
    "block": (compressed("block", block_structure=list(BLOCK)), "weight_scale", torch.bfloat16, None, BLOCK),
    "channel": (compressed("channel"), "weight_scale", torch.bfloat16, lambda m, n: (m, 1), (1, 10**6)),
    "tensor": (compressed("tensor"), "weight_scale", torch.float32, lambda m, n: (1,), (10**6, 10**6)),
    "scalar": (compressed("tensor"), "weight_scale", torch.float16, lambda m, n: (), (10**6, 10**6)),
}


def scaled_llama(folder: Path, form: str, count: int = 2) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint in one of the forms, and what its weights stand for, element by element."""
    settings, name, dtype, shape_of, (height, width) = FORMS[form]
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}
    values = {}
    for weight, W in llama_layers(count).items():
        m, n = W.shape
        grid = -(-m // height), -(-n // width)
        scales = (torch.rand(grid, generator=generator) / 50 + 1e-4).to(dtype)
        codes = (W * 50).to(FP8)
        wide = scales.float().numpy()
        by_hand = [
            [np.float32(code) * wide[i // height, j // width] for j, code in enumerate(row)]
            for i, row in enumerate(codes.float().numpy())
        ]
        values[weight] = torch.tensor(np.array(by_hand))
        module = weight.removesuffix(".weight")
        stored |= {weight: codes, f"{module}.{name}": scales.reshape(shape_of(m, n) if shape_of else grid)}
        stored[f"{module}.input_scale"] = torch.ones(())
    return save_checkpoint(folder, stored, {**LLAMA_CONFIG, "quantization_config": settings}), values


@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_products_bit_for_bit(tmp_path: Path, form: str) -> None:
    folder, values = scaled_llama(tmp_path, form)
    checkpoint = open_checkpoint(Location(str(folder)))
    refuse_quantized(checkpoint)
    assert set(checkpoint.tensors) == {*values, "model.norm.weight"}
    assert checkpoint.parameters() == 32 + sum(W.numel() for W in values.values())
    for name, expected in values.items():
        info = checkpoint.tensors[name]
        for buffer in (None, np.full(info.nbytes + 8, 255, np.uint8)):
            found = read_tensor(folder, info, buffer)
            assert found.dtype == np.float32
            assert found.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("form", ["deepseek", "channel"])
def test_the_basis_is_that_of_the_values(tmp_path: Path, form: str) -> None:
    folder, values = scaled_llama(tmp_path / "scaled", form)
    save_checkpoint(tmp_path / "dense", values, LLAMA_CONFIG)
    for name in ("scaled", "dense"):
        frodctl.decompose(tmp_path / name, tmp_path / f"{name}.safetensors", target_modules="all-linear")
    scaled, dense = (open_basis(tmp_path / f"{name}.safetensors") for name in ("scaled", "dense"))
    assert scaled.metadata.V_digests == dense.metadata.V_digests
    assert scaled.metadata.modules == dense.metadata.modules
    assert {f"{m.name}.weight": m.digest for m in scaled.metadata.modules} == {
        name: digest(W.numpy()) for name, W in values.items()
    }
    assert frodctl.open_basis(tmp_path / "scaled.safetensors").metadata.modules[0].dtype == "F32"
    found = frodctl.inspect(folder, spectrum=True).targets[0].rows
    alone = frodctl.inspect(tmp_path / "dense", spectrum=True).targets[0].rows
    assert [row.values["spectral_norm"] for row in found] == [row.values["spectral_norm"] for row in alone]


def test_inspect_tells_how_they_are_stored(frodctl: Run, tmp_path: Path) -> None:
    folder, values = scaled_llama(tmp_path / "scaled", "deepseek")
    save_checkpoint(tmp_path / "dense", values, LLAMA_CONFIG)
    target = json.loads(frodctl("inspect", folder, "--json").stdout)["targets"][0]
    rows = {row["name"]: row for row in target["tensors"]}
    assert {name: rows[name]["dtype"] for name in values} == dict.fromkeys(values, "F8_E4M3")
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert (down["parameters"], down["bytes"]) == (32 * 48, 32 * 48 + 4 * 2 * 2)
    assert target["summary"]["bytes_by_dtype"].keys() == {"F8_E4M3", "F32", "BF16"}
    assert target["summary"]["decompose"]["categories"]
    compared = frodctl("inspect", folder, "--against", tmp_path / "dense", "--json", "--include", "*proj*")
    compared = json.loads(compared.stdout)["targets"][0]["tensors"]
    assert {(row["dtype"], row["other_dtype"], row["relative_difference"]) for row in compared} == {
        ("F8_E4M3", "F32", 0.0)
    }


def test_scales_may_be_in_another_file(tmp_path: Path) -> None:
    folder, values = scaled_llama(tmp_path, "block", 1)
    checkpoint = open_checkpoint(Location(str(folder)))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + ('scale' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    divided = open_checkpoint(Location(str(folder)))
    assert [path.name for path in divided.files()] == sorted(set(files.values()))
    for name, expected in values.items():
        assert read_tensor(folder, divided.tensors[name]).tobytes() == expected.numpy().tobytes()
    assert divided.parameters() == checkpoint.parameters()


@pytest.mark.parametrize(
    "change",
    [
        lambda t, module: t.pop(f"{module}.weight_scale_inv"),
        lambda t, module: t.update({f"{module}.weight_scale_inv": torch.ones(3, 1)}),
        lambda t, module: t.update({f"{module}.weight_scale_inv": torch.ones(2, 2, dtype=torch.float64)}),
        lambda t, module: t.update({f"{module}.weight_zero_point": torch.ones(2, 2).to(FP8)}),
    ],
    ids=["no scales", "shape", "dtype", "zero point"],
)
def test_other_scales_are_refused(tmp_path: Path, change: Any) -> None:
    from safetensors.torch import load_file

    folder, _ = scaled_llama(tmp_path, "deepseek", 1)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.0.mlp.down_proj")
    save_checkpoint(folder, tensors)
    checkpoint = open_checkpoint(Location(str(folder)))
    with pytest.raises(InvalidInput, match=r"mlp.down_proj.weight.*full-precision"):
        refuse_quantized(checkpoint)

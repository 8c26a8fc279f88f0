"""What llama.cpp's converter needs of a merged checkpoint, as far as its package ships it: names and a file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

import frodctl
from tests.jobs.conftest import tensors
from tests.jobs.test_merge import write_adapter


def test_a_merged_model_as_gguf(example: Path, tmp_path: Path) -> None:
    basis = frodctl.decompose(example, tmp_path / "basis.safetensors", target_modules="q_proj,down_proj").output
    frodctl.merge(example, write_adapter(tmp_path / "adapter", example, basis, 0.1), tmp_path / "out", basis=basis)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    merged = {str(names.get_name(name, (".weight",))): W for name, W in tensors(tmp_path / "out").items()}
    assert len(merged) == 74
    assert {"token_embd.weight", "output_norm.weight", "blk.7.ffn_down.weight"} <= merged.keys()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, W in merged.items():
        raw = W.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {str(tensor.name): tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert found.keys() == merged.keys()
    for name, W in merged.items():
        values = gguf.dequantize(found[name].data, found[name].tensor_type)
        assert np.array_equal(values, W.float().numpy())

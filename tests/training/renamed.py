"""Tiny models that transformers loads under other names than their checkpoints have, or in other pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter

_VISION: dict[str, Any] = {"image_size": 32, "num_labels": 3, "initializer_range": 0.1}
_BLOCKS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT: dict[str, Any] = {"vocab_size": 64, "initializer_range": 0.1, "pad_token_id": 0}


def _config(family: str) -> Any:
    if family == "vit":
        return transformers.ViTConfig(patch_size=8, intermediate_size=48, **_VISION, **_BLOCKS)
    if family in ("dinov2", "dinov2_swiglu"):
        swiglu = family.endswith("swiglu")
        return transformers.Dinov2Config(patch_size=8, mlp_ratio=2, use_swiglu_ffn=swiglu, **_VISION, **_BLOCKS)
    if family == "swin":
        return transformers.SwinConfig(
            patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0, **_VISION
        )
    if family == "segformer":
        sizes = {"depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "sr_ratios": [2, 1]}
        return transformers.SegformerConfig(
            num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], **sizes, **_VISION
        )
    if family == "nemotron_h":
        return transformers.NemotronHConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=8,
            layers_block_type=["linear_attention", "full_attention", "mlp"] * 2, **_TEXT,
        )  # fmt: skip
    if family == "qwen2_vl":
        text = {"intermediate_size": 48, "num_key_value_heads": 2, "rope_parameters": _MROPE, **_BLOCKS, **_TEXT}
        vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
        tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    if family in ("llama4_text", "gpt_oss", "granitemoe", "qwen3_moe"):
        return _mixture(family)
    return transformers.Phi3Config(intermediate_size=48, num_key_value_heads=4, **_BLOCKS, **_TEXT)


def _mixture(family: str) -> Any:
    if family == "llama4_text":
        return transformers.Llama4TextConfig(
            intermediate_size=48, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
            num_key_value_heads=2, head_dim=8, **_BLOCKS, **_TEXT,
        )  # fmt: skip
    if family == "gpt_oss":
        kinds = ["full_attention"] * _BLOCKS["num_hidden_layers"]
        return transformers.GptOssConfig(
            intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8,
            layer_types=kinds, **_BLOCKS, **_TEXT,
        )  # fmt: skip
    if family == "granitemoe":
        return transformers.GraniteMoeConfig(
            intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **_BLOCKS, **_TEXT
        )
    return transformers.Qwen3MoeConfig(
        intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_key_value_heads=2, head_dim=8, **_BLOCKS, **_TEXT,
    )  # fmt: skip


_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_CLASSES = {
    "vit": transformers.ViTForImageClassification,
    "dinov2": transformers.Dinov2ForImageClassification,
    "dinov2_swiglu": transformers.Dinov2ForImageClassification,
    "swin": transformers.SwinForImageClassification,
    "segformer": transformers.SegformerForImageClassification,
    "nemotron_h": transformers.NemotronHForCausalLM,
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen3_moe": transformers.Qwen3MoeForCausalLM,
    "gpt_oss": transformers.GptOssForCausalLM,
    "granitemoe": transformers.GraniteMoeForCausalLM,
    "llama4_text": transformers.Llama4ForCausalLM,
    "phi3": transformers.Phi3ForCausalLM,
}


def save_base(family: str, folder: Path) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    model: Any = _CLASSES[family](_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def live(family: str, folder: Path) -> Any:
    """The model of a checkpoint."""
    model: Any = _CLASSES[family].from_pretrained(folder)
    return model.eval()


def inputs(family: str) -> dict[str, Tensor]:
    """What every layer of the model has a part in."""
    generator = torch.Generator().manual_seed(1)
    if family == "qwen2_vl":
        ids = torch.tensor([[1, 62, 60, 60, 60, 60, 63, 5, 6, 7]])
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        kinds = (ids == 60).long()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if family in _CLASSES and "Image" in _CLASSES[family].__name__:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(1, 60, (2, 12), generator=generator)}


def logits(model: Any, family: str) -> Tensor:
    """What the model says of a fixed input."""
    with torch.no_grad():
        found: Tensor = model(**inputs(family)).logits
    return found


@contextmanager
def phi3_in_parts() -> Iterator[None]:
    """Within it checkpoints of Phi-3 have q, k, v and gate, up apart, which the model joins."""
    rows = [Concatenate(dim=0)]
    attention = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    mapping = [
        WeightConverter(attention, "self_attn.qkv_proj.weight", rows),
        WeightConverter(["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.gate_up_proj.weight", rows),
    ]
    conversion_mapping.register_checkpoint_conversion_mapping("Phi3ForCausalLM", mapping)
    try:
        yield
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("Phi3ForCausalLM")
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("Phi3ForCausalLM")

"""Checkpoints for the benchmarks: the shapes of real models, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

#: SmolLM2-135M's: 30 Llama layers.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def make_llama(folder: Path, config: dict[str, object] = SMOLLM2_135M) -> Path:
    """A Llama checkpoint of these shapes in bfloat16, unless it is there already."""
    if (folder / "model.safetensors").exists():
        return folder
    hidden, ffn = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    head = hidden // int(str(config["num_attention_heads"]))
    kv = head * int(str(config["num_key_value_heads"]))
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(int(str(config["vocab_size"])), hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for i in range(int(str(config["num_hidden_layers"]))):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for role, shape in shapes.items():
            tensors[f"model.layers.{i}.{role}.weight"] = weight(*shape)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder

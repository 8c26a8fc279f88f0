"""Checkpoints for the benchmarks: the shapes of real models, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import frodctl
from frodctl.arrays import to_torch

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
#: TinyLlama-1.1B's: 22 Llama layers.
TINYLLAMA_1B = SMOLLM2_135M | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
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

    vocabulary = int(str(config["vocab_size"]))
    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(vocabulary, hidden)
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


def make_matrices(folder: Path, count: int, rows: int, columns: int) -> Path:
    """A checkpoint of that many matrices of one shape in bfloat16, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{i}.mlp.down_proj.weight": (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()
        for i in range(count)
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_adapter(folder: Path, model: Path, basis_file: Path) -> Path:
    """An adapter in PEFT's layout over a basis, as PEFT initialises it but with its numbers changed at random.

    V is rounded to bfloat16, as PEFT rounds it. PEFT, whose U fits the basis that it computes anew as it loads, merges
    this adapter into other weights than frodctl does, by the same work.
    """
    basis = frodctl.open_basis(basis_file)
    indices = basis.indices()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for category, positions in indices.items():
        n = basis.width(category)
        state[f"base_model.frod_V.{category}"] = to_torch(basis.tensor(f"V.{category}")).bfloat16()
        state[f"base_model.frod_s_indices.{category}"] = to_torch(positions).contiguous()
        state[f"base_model.frod_s_size.{category}"] = torch.tensor([n, n])
    for record in basis.metadata.modules:
        scales = to_torch(basis.tensor(f"lambda.{record.name}"))
        values = torch.randn(indices[record.category].shape[1], generator=generator)
        key = f"base_model.model.{record.name}"
        state[f"{key}.frod_lambda_l"] = scales * (1 + 0.02 * torch.randn(scales.shape, generator=generator))
        state[f"{key}.frod_lambda_s_values"] = 0.02 * float(scales.mean()) * values
    config = {
        "peft_type": "FROD",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "target_modules": sorted({record.name.rsplit(".", 1)[-1] for record in basis.metadata.modules}),
        "sparse_rate": 0.01,
        "save_projection": True,
        "progressbar": False,
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_own_adapter(folder: Path, model: Path, basis_file: Path) -> Path:
    """An adapter of frodctl's over a basis, its numbers changed at random."""
    live = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    frodctl.attach(live, basis_file)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in live.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.002)
    frodctl.save_adapter(live, folder)
    return folder


def make_sharded_llama(folder: Path, layers: int, shard_bytes: int = 2_000_000_000) -> Path:
    """A Llama checkpoint of hidden size 2048 in shards of 2 GB, its weights pieces of one random pool."""
    config = SMOLLM2_135M | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": 128256,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    pool = (0.02 * torch.randn(128256 * 2048 + 4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    shapes = {f"model.layers.{i}.{role}.weight": shape for i in range(layers) for role, shape in _ROLES.items()}
    shapes["model.embed_tokens.weight"] = (128256, 2048)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        if sum(tensor.nbytes for tensor in shards[-1].values()) + 2 * rows * columns > shard_bytes:
            shards.append({})
        shards[-1][name] = pool[number : number + rows * columns].view(rows, columns).clone()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


_ROLES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}

"""Tiny models of three families, and adapters for them that PEFT itself trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import FrodConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

FAMILIES = ("llama", "bert", "gpt2")
_SIZES: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32}


def base_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights: the checkpoint that will be fine-tuned."""
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        config: Any = LlamaConfig(
            hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=True, initializer_range=0.1, **_SIZES,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    elif family == "bert":
        config = BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.1,
            **_SIZES,
        )  # fmt: skip
        model = BertModel(config)
    else:
        config = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=32, vocab_size=64, initializer_range=0.1)
        model = GPT2LMHeadModel(config)
    made: PreTrainedModel = model.to(dtype).eval()
    return made


def save_base(folder: Path, family: str, dtype: torch.dtype, tokenizer: Path | None = None) -> Path:
    """The checkpoint, with a tokenizer if a folder with one is given."""
    base_model(family, dtype).save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def task_model(family: str, base: Path) -> PreTrainedModel:
    """The model that is trained: the base, for BERT with a new classifier of three labels."""
    torch.manual_seed(1)
    classes: dict[str, Any] = {
        "llama": LlamaForCausalLM,
        "bert": BertForSequenceClassification,
        "gpt2": GPT2LMHeadModel,
    }
    more = {"num_labels": 3} if family == "bert" else {}
    model: PreTrainedModel = classes[family].from_pretrained(base, dtype="auto", **more)
    model.eval()
    return model


def frod_config(family: str, **changes: Any) -> FrodConfig:
    """Linear layers of several shapes; for BERT a classifier and biases too."""
    settings: dict[str, dict[str, Any]] = {
        "llama": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"},
        "bert": {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS", "bias": "all"},
        "gpt2": {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"},
    }
    return FrodConfig(**{"sparse_rate": 0.05, "progressbar": False, **settings[family], **changes})


def train(model: Any, steps: int = 4) -> Any:
    """A few steps of real training, at a rate that moves the weights visibly."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        ids = torch.randint(0, 64, (8, 16))
        classify = model.config.architectures is not None and "Classification" in type(model.get_base_model()).__name__
        labels = torch.randint(0, 3, (8,)) if classify else ids
        model(input_ids=ids, labels=labels).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:  # so that every trained number moves, whatever the depth
                parameter.grad = (
                    parameter.grad / (parameter.grad.norm() + 1e-6) * parameter.detach().norm().clamp(min=1)
                )
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model


def trained_adapter(folder: Path, family: str, base: Path, **changes: Any) -> Any:
    """Train an adapter on the base with PEFT and save it; the live model."""
    model = train(get_peft_model(task_model(family, base), frod_config(family, **changes)))
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    """What the model says of a fixed input, in float64."""
    ids = torch.arange(48).reshape(3, 16) % 64
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result.double()

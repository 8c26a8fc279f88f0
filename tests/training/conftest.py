"""Tiny checkpoints with their bases, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import frodctl
from tests import peft_models

TARGETS = {"llama": "all-linear", "bert": "query,value,dense", "gpt2": "c_attn,c_fc,c_proj"}


@dataclass(frozen=True)
class Case:
    """A checkpoint of a family, and its shared-basis file."""

    family: str
    base: Path
    basis: Path

    def model(self) -> Any:
        """The live model in the checkpoint's dtype; for BERT with a new head."""
        return peft_models.task_model(self.family, self.base)

    def attached(self, **options: Any) -> Any:
        """The model with an adapter that changes nothing yet."""
        head = {"modules_to_save": ["classifier"]} if self.family == "bert" else {}
        return frodctl.attach(self.model(), self.basis, **{**head, **options})

    def trained(self, **options: Any) -> Any:
        """The model with an adapter that changes a lot."""
        model = self.attached(**options)
        perturb(model)
        return model


Cases = Callable[..., Case]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    made: dict[tuple[str, torch.dtype], Case] = {}

    def case(family: str, dtype: torch.dtype = torch.float32) -> Case:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp(f"{family}-{str(dtype)[6:]}")
            base = peft_models.save_base(root / "base", family, dtype)
            basis = root / "basis.safetensors"
            frodctl.decompose(str(base), basis, target_modules=TARGETS[family], sparsity=0.05, seed=3)
            made[family, dtype] = Case(family, base, basis)
        return made[family, dtype]

    return case


def mamba(root: Path) -> tuple[Path, Path]:
    """A tiny checkpoint of Mamba, which reads the weight of its ``dt_proj``, and its basis."""
    if not root.exists():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=3, time_step_rank=8)
        MambaForCausalLM(config).save_pretrained(root / "base")
        frodctl.decompose(str(root / "base"), root / "b.safetensors", target_modules="all-linear", sparsity=0.05)
    return root / "base", root / "b.safetensors"


def mixture(root: Path) -> tuple[Path, Path]:
    """A tiny checkpoint of Qwen3's mixture of experts, and its basis."""
    if not root.exists():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is read where it is set
            vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).save_pretrained(root / "base")
        frodctl.decompose(str(root / "base"), root / "b.safetensors", target_modules="all-linear", sparsity=0.05)
    return root / "base", root / "b.safetensors"


def perturb(model: Any, size: float = 0.1, seed: int = 5) -> None:
    """Give every trained number a random value, of this size relative to the scales (or to a head's weights)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * size * (0.5 if name.endswith((".delta", ".values")) else 0.1))


def batch(family: str, seed: int = 0, rows: int = 4, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Input ids and labels for a training step."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids % 3 if family == "none" else ids}


def labelled(family: str, seed: int = 0, rows: int = 4, tokens: int = 16) -> dict[str, torch.Tensor]:
    """As `batch`, with labels that suit the family's task."""
    found = batch(family, seed, rows, tokens)
    return found | ({"labels": found["input_ids"][:, 0] % 3} if family == "bert" else {})

"""Bases of three families with adapters that PEFT trained on them, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import frodctl
from tests import peft_models


@dataclass(frozen=True)
class Case:
    """A base, an adapter that PEFT trained on it, the live model, and where PEFT's own merge of it is."""

    family: str
    dtype: torch.dtype
    base: Path
    adapter: Path
    logits: torch.Tensor
    peft_merged: Path

    def merged(self, out: Path, **options: Any) -> Any:
        return frodctl.merge(str(self.base), str(self.adapter), out, **options)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Callable[[str, torch.dtype], Case]:
    """Cases by family and dtype, each trained once."""
    made: dict[tuple[str, torch.dtype], Case] = {}

    def case(family: str, dtype: torch.dtype) -> Case:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp(f"{family}-{str(dtype)[6:]}")
            base = peft_models.save_base(root / "base", family, dtype, tokenizer=minilm)
            live = peft_models.trained_adapter(root / "adapter", family, base)
            logits = peft_models.logits(live)
            live.merge_and_unload().save_pretrained(root / "peft")
            made[family, dtype] = Case(family, dtype, base, root / "adapter", logits, root / "peft")
        return made[family, dtype]

    return case


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def operators(case: Case) -> dict[str, torch.Tensor]:
    """W' of every targeted weight as PEFT trained it, in float64 from the files, by name in the base."""
    base, adapter = tensors(case.base), load_file(case.adapter / "adapter_model.safetensors")
    found = {}
    for key, scales in adapter.items():
        if not key.endswith(".frod_lambda_l"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".frod_lambda_l")
        name = f"{path.removeprefix('bert.') if case.family == 'bert' else path}.weight"
        parts = path.split(".")
        category = "attention_output" if path.endswith("attention.output.dense") else "_".join(parts[-2:])
        V = adapter[f"base_model.frod_V.{category}"]
        rows, columns = adapter[f"base_model.frod_s_indices.{category}"]
        W = base[name].T if case.family == "gpt2" else base[name]
        B = np.linalg.solve(V.double().numpy(), W.double().numpy().T).T
        norms = np.linalg.norm(B, axis=0)
        U = torch.from_numpy(np.where(norms > 1e-12, B / norms, 0)).float().to(V.dtype).double()
        M = torch.diag(scales.to(V.dtype).double())
        M[rows, columns] += adapter[key.replace("lambda_l", "lambda_s_values")].to(V.dtype).double()
        result = U @ M @ V.double().T
        found[name] = result.T if case.family == "gpt2" else result
    return found

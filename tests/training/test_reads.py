"""What a model's code does with a layer, from its source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from frodctl.training.reads import weight_uses


def on_meta(kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**options)
    model = next(
        getattr(transformers, name) for name in (f"{kind}ForCausalLM", f"{kind}Model") if hasattr(transformers, name)
    )
    with torch.device("meta"):
        return model(config)


@pytest.mark.parametrize(("kind", "path", "expected"), [
    ("Mamba", "backbone.layers.0.mixer.dt_proj", {"values"}),
    ("Mamba", "backbone.layers.0.mixer.in_proj", {"layer"}),
    ("Mamba", "backbone.layers.0.mixer.x_proj", {"values", "layer"}),  # in a fused kernel
    ("FalconMamba", "backbone.layers.0.mixer.dt_proj", {"values", "layer"}),  # called where it is quantized
    ("Mamba2", "backbone.layers.0.mixer.out_proj", {"values", "layer"}),
    ("T5", "encoder.block.0.layer.1.DenseReluDense.wo", {"description", "layer"}),
    ("T5", "encoder.block.0.layer.1.DenseReluDense.wi", {"layer"}),
    ("Llama", "model.layers.0.self_attn.q_proj", {"layer"}),
])  # fmt: skip
def test_of_transformers(kind: str, path: str, expected: set[str]) -> None:
    options = {"num_hidden_layers": 1, "num_layers": 1} if kind == "T5" else {"num_hidden_layers": 1}
    assert weight_uses(on_meta(kind, **options), path) == expected


def test_of_torch() -> None:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)
    assert weight_uses(layer, "layers.0.self_attn.out_proj") == {"values"}
    assert weight_uses(layer, "layers.0.linear1") == {"values", "layer"}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(2, 2) for _ in range(4))
        self.several = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.first.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.first.weight.dtype) @ self.second.weight.T + self.second.bias
        x = self.several[1](x) if self.several[0].weight.device == x.device else x
        return self.third(x) if self.third.weight is not None else self.first(x)


class Derived(Base):
    def helper(self) -> torch.Tensor:
        return self.third.weight + 1


@pytest.mark.parametrize(("path", "expected"), [
    ("first", {"description", "layer"}),
    ("second", {"values"}),
    ("third", {"description", "layer"}),
    ("several.0", {"description", "layer"}),
    ("several.1", {"description", "layer"}),
    ("fourth", set()),
])  # fmt: skip
def test_of_one_s_own(path: str, expected: set[str]) -> None:
    assert weight_uses(Base(), path) == expected
    assert weight_uses(nn.Sequential(Derived()), f"0.{path}") == expected


def test_without_a_source() -> None:
    space: dict[str, Any] = {"nn": nn, "__name__": "nowhere"}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.inner.weight", space)
    made = space["Made"]()
    made.inner = nn.Linear(2, 2)
    assert weight_uses(made, "inner") == set()

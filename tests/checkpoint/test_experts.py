"""How much of what is trained takes part in a token, where there are experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from frodctl.jobs.decompose import DecomposeOptions, plan_decompose
from frodctl.method.budget import trainable
from tests.conftest import Run, save_checkpoint

EXPERTS, LAYERS, HIDDEN, INNER = 4, 2, 16, 8


def mixture(folder: Path, *, fused: bool, **config: Any) -> Path:
    """Attention, and experts that are apart or fused."""
    generator = torch.Generator().manual_seed(0)
    shapes = {}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        at = f"model.layers.{layer}.mlp.experts"
        if fused:
            shapes[f"{at}.down_proj"] = (EXPERTS, HIDDEN, INNER)
        else:
            shapes |= {f"{at}.{e}.down_proj.weight": (HIDDEN, INNER) for e in range(EXPERTS)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return save_checkpoint(folder, weights, {"model_type": "qwen3_moe", "hidden_size": HIDDEN, **config})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("key", ["num_experts_per_tok", "moe_k"])
def test_experts_count_by_the_share_that_a_token_has(fused: bool, key: str, tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", fused=fused, **{key: 1})
    plan = plan_decompose(base, None, DecomposeOptions.of(target_modules="all-linear"), dry_run=True)
    experts, attention = sorted(plan.categories, key=lambda category: category.n)
    assert experts.trainable_per_token == LAYERS * trainable(INNER, 0.01)
    assert experts.trainable_parameters == EXPERTS * experts.trainable_per_token
    assert attention.trainable_per_token == attention.trainable_parameters
    assert plan.trainable_per_token == experts.trainable_per_token + attention.trainable_per_token


def test_a_config_that_does_not_say(frodctl: Run, tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", fused=True)
    result = frodctl("decompose", base, "--target-modules", "all-linear", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["trainable_per_token"] is None
    assert "does not say how many a token has" in result.stderr


def test_a_dry_run_says_both_numbers(frodctl: Run, tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", fused=True, num_experts_per_tok=2)
    result = frodctl("decompose", base, "--target-modules", "all-linear", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["trainable_per_token"] == sum(row["trainable_per_token"] for row in document["categories"])
    assert "parameters take part in a token" in result.stderr
    without = frodctl("decompose", base, "--target-modules", "q_proj", "--dry-run")
    assert "take part in a token" not in without.stderr

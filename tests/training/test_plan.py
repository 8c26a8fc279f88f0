"""What a step costs, said before it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen3MoeForCausalLM

import frodctl
from frodctl import training
from frodctl.errors import InvalidInput, UsageError
from frodctl.method.step_cost import Shape, full_flops, input_flops, weight_flops
from frodctl.training.layer import Basis, FrodLinear
from tests.training.conftest import Cases, mixture


def costs(model: nn.Module, tokens: int, **options: Any) -> dict[str, training.StepCost]:
    return {cost.way: cost for cost in training.step_costs(model, tokens, **options)}


def test_square_layers() -> None:
    """In units of 2 n² operations a token: 3 for full fine-tuning, 6 by the input, 3 and a few n by W'."""
    n, tokens = 100, 1000
    shape = Shape(n, n, 0)
    unit = 2.0 * n * n
    assert full_flops(shape, tokens) == 3 * unit * tokens
    assert input_flops(shape, tokens) == 6 * unit * tokens
    assert weight_flops(shape, tokens) == unit * (3 * tokens + 4 * n)
    assert weight_flops(shape, tokens, keeps_U=True) == unit * (3 * tokens + 2 * n)
    assert weight_flops(shape, tokens, keeps_U=True, passes=4) == unit * (3 * tokens + 5 * n)
    assert weight_flops(shape, tokens, backward=False) == unit * (tokens + 2 * n)
    assert input_flops(shape, tokens, backward=False) == unit * 3 * tokens
    assert input_flops(shape._replace(positions=n), tokens) == 6 * unit * tokens + 6 * n * tokens
    assert weight_flops(Shape(2 * n, n, 0), tokens) == unit * (6 * tokens + 4 * n + 2 * n)


def test_bytes_are_those_of_the_tensors(cases: Cases) -> None:
    model = cases("llama").trained(form="weight+U").train()
    tokens = 4 * 32 * 16
    found = costs(model, tokens, micro_batches=4)
    ids = torch.arange(tokens // 4).reshape(-1, 32) % 64
    with training.accumulating(model):
        model(input_ids=ids, labels=ids).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, FrodLinear)]
    updates = [update for layer in layers if (update := layer.update())]
    bases = [module for module in model.modules() if isinstance(module, Basis)]
    expected = found["weight+U"]
    assert expected.basis_bytes == sum(basis.V.nbytes + basis.D.nbytes for basis in bases)
    assert expected.weight_bytes == sum(u.kept._weight.nbytes for u in updates if u.kept._weight is not None)
    assert expected.dual_bytes == sum(u.kept._columns[1].nbytes for u in updates if u.kept._columns is not None)
    assert expected.waiting_bytes == sum(u.waiting._total.nbytes for u in updates if u.waiting._total is not None)
    assert expected.trained_bytes == sum(3 * p.nbytes for u in updates for p in u.parameters())
    assert found["weight"].dual_bytes == found["input"].weight_bytes == found["full"].basis_bytes == 0
    assert costs(model, tokens)["weight"].waiting_bytes == 0


def test_the_choice_is_the_cheaper_one(cases: Cases) -> None:
    model = cases("llama").attached().train()
    layer = model.model.layers[0].self_attn.q_proj
    for tokens in (8, 4096):
        found = costs(model, tokens)
        by_weight = layer._weight_side(layer.update(), torch.ones(tokens, 32))
        assert by_weight == (found["weight"].flops < found["input"].flops)
    assert by_weight


def test_experts_count_for_the_tokens_that_they_have() -> None:
    """In units of 2 n² operations a token: as a layer for each of its experts, but Vᵀx is one for all of them."""
    n, tokens = 100, 1000
    unit = 2.0 * n * n * tokens
    shape = Shape(n, n, 0, experts=8, chosen=3)
    assert full_flops(shape, tokens) == 3 * 3 * unit
    assert input_flops(shape, tokens) == 2 * (3 + 1 + 3) * unit
    assert input_flops(shape._replace(own_input=True), tokens) == 3 * 6 * unit
    assert input_flops(shape._replace(in_rows=True), tokens) == 2 * (3 + 1 + 3 * 1 + 8 * n / tokens) * unit
    assert input_flops(shape._replace(in_rows=True), 1) == 2 * (3 + 1 + 2 * 3) * 2.0 * n * n


def test_experts_of_a_model(tmp_path: Path) -> None:
    base, basis = mixture(tmp_path / "files")
    model = frodctl.attach(Qwen3MoeForCausalLM.from_pretrained(base), basis, target_modules=r".*experts.*")
    found = costs(model, 100)
    layers, experts, chosen, hidden, inner = 2, 4, 2, 32, 24
    assert found["full"].flops == 6 * 100 * layers * chosen * 3 * hidden * inner
    assert found["full"].trained_bytes == 3 * 4 * layers * experts * 3 * hidden * inner
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["input"].trained_bytes == found["weight"].trained_bytes == 3 * 4 * trained
    model.model.layers[0].mlp.experts.base_layer.config = PreTrainedConfig()
    with pytest.raises(InvalidInput, match="does not say how many"):
        costs(model, 100)


def test_shown(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    training.print_step_cost(cases("llama").attached(), "4096", micro_batches=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["form", "input", "weight", "weight+U", "LoRA, r = 16", "full"]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[2] == "1.00"


@pytest.mark.parametrize("value", [0, -1, 1.5, None, "x", True])
@pytest.mark.parametrize("name", ["tokens", "micro_batches"])
def test_what_is_no_count(name: str, value: Any, cases: Cases) -> None:
    with pytest.raises(UsageError, match=f"`{name}`"):
        training.step_costs(cases("llama").attached(), **{"tokens": 1, name: value})


def test_nothing_attached() -> None:
    with pytest.raises(UsageError, match="attach first"):
        training.step_costs(nn.Linear(2, 2), 10)

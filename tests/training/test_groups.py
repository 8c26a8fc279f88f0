"""Learning rates by category."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import frodctl
from frodctl.errors import UsageError
from tests.training.conftest import Cases, batch


def test_rates_by_category(cases: Cases) -> None:
    """η_λ = ρ_λ/√N and η_S = ρ_S/√(s n N), for N = 3 layers that are about alike and s n² = nnz."""
    model = cases("bert").attached(sparsity={"self_query": 0.0})
    groups = frodctl.parameter_groups(model, rho_lambda=2e-3, rho_sparse=5e-4, lr=1e-5, weight_decay=0.1)
    opened = frodctl.open_basis(cases("bert").basis)
    categories = set(opened.metadata.V_digests)
    assert {group["name"] for group in groups} == {f"lambda.{c}" for c in categories} | {
        f"sparse.{c}" for c in categories - {"self_query"}
    } | {"rest"}
    for category, indices in opened.indices().items():
        layers = sum(record.category == category for record in opened.metadata.modules)
        per_row = indices.shape[1] / opened.width(category)
        for name, rate in {"lambda": 2e-3 / layers**0.5, "sparse": 5e-4 / (per_row * layers) ** 0.5}.items():
            found = [group for group in groups if group["name"] == f"{name}.{category}"]
            assert sum(len(group["params"]) for group in found) in (layers, 0)
            for group in found:
                assert group["lr"] == pytest.approx(rate, rel=0.2)
                assert group["weight_decay"] == 0
    rest = groups[-1]
    assert (rest["lr"], rest["weight_decay"]) == (1e-5, 0.1)
    assert {p.shape for p in rest["params"]} == {(3, 32), (3,)}
    grouped = [id(p) for group in groups for p in group["params"]]
    empty = {id(p) for p in model.parameters() if not p.numel()}
    assert sorted(grouped) == sorted({id(p) for p in model.parameters() if p.requires_grad} - empty)


def test_weight_decay_pulls_towards_the_pretrained_weight(cases: Cases) -> None:
    case = cases("llama")
    model = case.trained()
    with torch.no_grad():
        base, before = case.model()(**batch("llama")).logits, model(**batch("llama")).logits
    groups = frodctl.parameter_groups(model, rho_lambda=1.0, rho_sparse=1.0, frod_weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        after = model(**batch("llama")).logits
    assert (after - base).norm() < 0.9 * (before - base).norm()


def test_only_the_active_adapter(cases: Cases) -> None:
    case = cases("llama")
    model = frodctl.attach(case.attached(), case.basis, adapter_name="second", target_modules="q_proj")
    assert {group["name"] for group in frodctl.parameter_groups(model)} == {
        "lambda.self_attn_q_proj",
        "sparse.self_attn_q_proj",
    }


def test_nothing_attached(cases: Cases) -> None:
    with pytest.raises(UsageError, match="no adapter is attached"):
        frodctl.parameter_groups(cases("llama").model())


@pytest.mark.parametrize("rate", [
    float("nan"), float("inf"), -1e-3, "-1", "nan", "fast", "", True, b"", [], {}, object(), torch.zeros(2),
])  # fmt: skip
@pytest.mark.parametrize("name", ["rho_lambda", "rho_sparse", "lr", "weight_decay", "frod_weight_decay"])
def test_what_is_no_rate(name: str, rate: Any, cases: Cases) -> None:
    with pytest.raises(UsageError, match=f"`{name}`"):
        frodctl.parameter_groups(cases("llama").attached(), **{name: rate})


def test_text_for_a_rate(cases: Cases) -> None:
    """As everywhere; it does not reach the optimizer as text."""
    model = cases("llama").attached()
    given, plain = (frodctl.parameter_groups(model, rho_lambda=rho, rho_sparse=0) for rho in ("2e-3", 2e-3))
    assert [group["lr"] for group in given] == [group["lr"] for group in plain]


@pytest.mark.parametrize("model", [None, 1.5, "x", [], {}, object(), True, b"", torch.nn.Linear(2, 2)])
def test_what_is_no_model_with_an_adapter(model: Any) -> None:
    with pytest.raises(UsageError, match="attach first"):
        frodctl.parameter_groups(model)

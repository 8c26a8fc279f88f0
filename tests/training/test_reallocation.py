"""Positions that move in training: the least ones go, the steepest come, and what stays is as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import frodctl
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.training.attached import frod_layers
from frodctl.training.layer import Update
from tests import peft_models
from tests.training.conftest import Case, Cases, labelled

SHARE = 0.25


def batches(family: str = "llama") -> list[dict[str, Tensor]]:
    return [labelled(family, seed) for seed in range(2)]


def trained(case: Case) -> tuple[Any, torch.optim.Optimizer]:
    """A model after a few steps of Adam, and the optimizer."""
    model = case.attached()
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model, steps=4), amsgrad=True)
    for batch in batches(case.family):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def updates(model: Any) -> dict[str, Update]:
    return {path: layer.update() for path, layer in frod_layers(model).items()}


def dense(update: Update, values: Tensor, indices: Tensor) -> Tensor:
    """An n × n matrix with these values."""
    found = torch.zeros(update.basis.n, update.basis.n)
    found[indices[0], indices[1]] = values.detach()
    return found


def by_category(model: Any, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the layers."""
    found: dict[str, Tensor] = {}
    for path, update in updates(model).items():
        found[update.basis.category] = of[path] + found.get(update.basis.category, 0)
    return found


@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_the_least_go_and_the_steepest_come(family: str, cases: Cases) -> None:
    model, optimizer = trained(cases(family))
    before = {path: dense(u, u.values, u.pattern.indices()) for path, u in updates(model).items()}
    held = {path: dense(u, torch.ones(u.pattern.nnz), u.pattern.indices()) for path, u in updates(model).items()}
    parameters = [id(u.values) for u in updates(model).values()]
    gradients = {path: torch.zeros(u.basis.n, u.basis.n) for path, u in updates(model).items()}
    plain = merged(model)
    for batch in batches(family):
        plain.zero_grad()
        plain(**batch).loss.backward()
        for path, layer in frod_layers(model).items():
            base, u = layer.base_layer, layer.update()
            W, G = base.weight.detach(), plain.get_submodule(path).weight.grad
            W, G = (W.T, G.T) if type(base).__name__ == "Conv1D" else (W, G)
            U = W @ u.basis.D * u.inverse_scales
            gradients[path] += (U.T @ G @ u.basis.V).square()
    weights = {path: (S * updates(model)[path].basis.V.norm(dim=0)).square() for path, S in before.items()}
    counts = {u.basis.category: u.pattern.nnz for u in updates(model).values()}

    found = frodctl.reallocate(model, batches(family), optimizer, share=SHARE)

    assert [id(u.values) for u in updates(model).values()] == parameters
    weight, gradient = by_category(model, weights), by_category(model, gradients)
    for path, u in updates(model).items():
        category, n = u.basis.category, u.basis.n
        assert torch.equal(u.pattern.indices(), found[category])
        now, old = dense(u, torch.ones(u.pattern.nnz), found[category]).bool(), held[path].bool()
        assert now.sum() == counts[category]
        assert not now.diagonal().any()
        gone, come = old & ~now, now & ~old
        assert gone.sum() == come.sum() == round(SHARE * counts[category])
        assert weight[category][gone].max() <= weight[category][old & now].min()
        others = ~now & ~old & ~torch.eye(n, dtype=torch.bool)
        assert gradient[category][come].min() >= 0.999 * gradient[category][others].max()
        assert torch.equal(dense(u, u.values, found[category]), torch.where(now, before[path], 0))


def merged(model: Any) -> Any:
    """A plain model that computes the same, all of whose weights have gradients."""
    plain = copy.deepcopy(model)
    frodctl.training.merge_(plain)
    return plain.requires_grad_(True)


def test_moments_go_with_their_values(cases: Cases) -> None:
    model, optimizer = trained(cases("llama"))
    before = {
        path: (u.pattern.indices(), {key: state.clone() for key, state in optimizer.state[u.values].items()})
        for path, u in updates(model).items()
    }
    frodctl.reallocate(model, batches(), optimizer, share=SHARE)
    for path, u in updates(model).items():
        indices, states = before[path]
        now = u.pattern.indices()
        stays = dense(u, torch.ones(u.pattern.nnz), indices)[now[0], now[1]].bool()
        assert 0 < stays.sum() < u.pattern.nnz
        for name, state in optimizer.state[u.values].items():
            if name == "step":
                assert torch.equal(state, states[name])
                continue
            assert torch.equal(state[stays], dense(u, states[name], indices)[now[0], now[1]][stays])
            new = 0.0 if name == "exp_avg" else float(state[stays].mean())
            assert state[~stays].tolist() == pytest.approx([new] * int((~stays).sum()))


def test_trained_on_saved_loaded_and_merged(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama")
    model, optimizer = trained(case)
    frodctl.reallocate(model, batches(), optimizer)
    model(**labelled("llama")).loss.backward()
    optimizer.step()
    assert all(u.values.all() for u in updates(model).values())
    expected = peft_models.logits(model)
    frodctl.save_adapter(model, tmp_path / "adapter")
    loaded = frodctl.load_adapter(case.model(), tmp_path / "adapter", case.basis)
    assert (peft_models.logits(loaded) - expected).abs().max() <= 1e-5
    frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "out", basis=case.basis)
    plain = type(case.model()).from_pretrained(tmp_path / "out").eval()
    assert (peft_models.logits(plain) - expected).abs().max() <= 1e-5


def test_refused_with_everything_as_it_was(cases: Cases) -> None:
    model, optimizer = trained(cases("llama"))
    others = torch.optim.Adam([u.delta for u in updates(model).values()])
    before = {path: (u.pattern, u.values.detach().clone(), u.form) for path, u in updates(model).items()}

    def nan(m: Any, batch: Any) -> Tensor:
        return torch.as_tensor(m(**batch).loss * float("nan"))

    for error, said, arguments, options in (
        (UsageError, "does not train", (batches(), others), {}),
        (UsageError, "`optimizer`", (batches(), None), {}),
        (UsageError, "`batches`", (None, optimizer), {}),
        (UsageError, "no batch", ([], optimizer), {}),
        (UsageError, "`share`", (batches(), optimizer), {"share": 0}),
        (UsageError, "`share`", (batches(), optimizer), {"share": 1.5}),
        (UsageError, "`loss`", (batches(), optimizer), {"loss": 1}),
        (InvalidInput, "NaN", (batches(), optimizer), {"loss": nan}),
    ):
        with pytest.raises(error, match=said):
            frodctl.reallocate(model, *arguments, **options)
    for path, (pattern, values, form) in before.items():
        update = updates(model)[path]
        assert update.pattern is pattern
        assert update.form == form
        assert torch.equal(update.values, values)
        assert not {"shifted", "weight"} & set(update.__dict__)
    with pytest.raises(FrodctlError, match="attach"):
        frodctl.reallocate(cases("llama").model(), batches(), optimizer)

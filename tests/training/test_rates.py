"""Rates by the relative size of a step: what they do not depend on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import frodctl
from frodctl.errors import UsageError
from frodctl.training.attached import frod_layers
from frodctl.training.rates import RHO as RHO_UNKNOWN
from frodctl.training.rates import relative_step, unit_rates
from tests.training.conftest import Cases, batch

N, M = 96, 128  # in_features, out_features
RHO = 2e-3
Weights = list[Tensor]


class Stack(nn.Module):
    """Layers side by side that read one input, each with a gain for its output."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(N, M, bias=False)}) for _ in gains)
        self.gains = gains

    def forward(self, x: Tensor) -> Tensor:
        outputs = [gain * layer["proj"](x) for gain, layer in zip(self.gains, self.layers, strict=True)]
        return torch.stack(outputs)


def weights(count: int) -> Weights:
    """With spectra as weights have them, falling off; float64."""
    generator = torch.Generator().manual_seed(3)
    fall = torch.linspace(0, -1.5, N, dtype=torch.float64).exp()
    return [torch.randn(M, N, generator=generator, dtype=torch.float64) * fall for _ in range(count)]


def attached(folder: Path, given: Weights, gains: list[float] | None = None, sparsity: float = 0.01) -> Stack:
    folder.mkdir()
    model = Stack(gains or [1.0] * len(given)).double()
    for layer, weight in zip(model.layers, given, strict=True):
        layer["proj"].weight.data = weight.clone()
    save_file(model.state_dict(), folder / "model.safetensors")
    frodctl.decompose(folder, folder / "basis.safetensors", target_modules="proj", sparsity=sparsity)
    frodctl.attach(model, folder / "basis.safetensors")
    return model


def train(model: Stack, steps: int = 1, rows: int = 256, **rates: float) -> list[float]:
    """The losses of a regression towards random outputs, which are the same for every model."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, N, generator=generator, dtype=torch.float64)
    target = torch.randn(rows, M, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model, **{"rho_lambda": RHO, "rho_sparse": RHO, **rates}))
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def relative_changes(model: Any) -> list[float]:
    """‖ΔW‖/‖W‖ of every layer."""
    changes = []
    for layer in frod_layers(model).values():
        W = layer.base_layer.weight
        update = layer.update()
        assert update is not None
        changes.append(float((update.merged_weight(layer.base_layer) - W).norm() / W.norm()))
    return changes


def first_step(model: Stack) -> list[float]:
    train(model)
    return relative_changes(model)


def test_a_first_step_is_as_long_as_rho_says(tmp_path: Path) -> None:
    for name, rates in {"lambda": {"rho_sparse": 0.0}, "sparse": {"rho_lambda": 0.0}}.items():
        model = attached(tmp_path / name, weights(6))
        train(model, **rates)
        assert relative_changes(model) == pytest.approx([RHO] * 6, rel=0.25)


OTHERS = {
    "a layer times 100, its output divided by 100": (
        [*weights(2), 100 * weights(3)[2], *weights(6)[3:]], [1, 1, 0.01, 1, 1, 1], 0.01,
    ),
    "every layer twice": (weights(6) + weights(6), [1.0] * 12, 0.01),
    "twice as many layers": (weights(12), [1.0] * 12, 0.01),
    "4 times as sparse": (weights(6), [1.0] * 6, 0.04),
}  # fmt: skip


@pytest.mark.parametrize(("given", "gains", "sparsity"), OTHERS.values(), ids=OTHERS)
def test_a_first_step_is_as_long_whatever_the_model_is(
    given: Weights, gains: list[float], sparsity: float, tmp_path: Path
) -> None:
    plain = first_step(attached(tmp_path / "plain", weights(6)))
    found = first_step(attached(tmp_path / "other", given, gains, sparsity))
    assert found[:6] == pytest.approx(plain, rel=0.1)
    assert found == pytest.approx([plain[0]] * len(found), rel=0.1)


@pytest.mark.parametrize("count", [1, 4])
def test_a_category_times_100_trains_alike(count: int, tmp_path: Path) -> None:
    """The joint basis is that of the weights' ratios, so the course is the same to rounding."""
    given = weights(count)
    plain = attached(tmp_path / "plain", given)
    scaled = attached(tmp_path / "scaled", [100 * weight for weight in given], [0.01] * count)
    losses = train(plain, steps=40)
    assert train(scaled, steps=40) == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < 0.95 * losses[0]
    assert relative_changes(scaled) == pytest.approx(relative_changes(plain), rel=1e-3)


def test_the_best_rate_of_a_search_moves_with_the_rule(tmp_path: Path) -> None:
    """By powers of 2 of ρ, it is the same or the next one."""
    powers = range(2, 7)

    def best(given: Weights, gains: list[float], sparsity: float, name: str) -> int:
        ends = {}
        for power in powers:
            model = attached(tmp_path / f"{name}-{power}", given, gains, sparsity)
            rho = 0.01 * 2.0**power
            ends[power] = train(model, steps=20, rho_lambda=rho, rho_sparse=rho)[-1]
        return min(powers, key=lambda power: ends[power])

    plain = best(weights(6), [1.0] * 6, 0.01, "plain")
    assert powers[0] < plain < powers[-1]
    for name, other in OTHERS.items():
        assert abs(best(*other, name) - plain) <= 1, name


def test_null_scales_and_no_sparse_values(cases: Cases) -> None:
    """Rows where λ is 0 do not move W, and no S means no rate."""
    model = cases("llama").attached(sparsity=0.0)
    groups = frodctl.parameter_groups(model, rho_lambda=RHO)
    assert {group["name"].split(".")[0] for group in groups} == {"lambda"}
    update = next(iter(frod_layers(model).values())).update()
    assert update is not None
    half = len(update.base_scales) // 2
    before = unit_rates(update)
    norms = update.basis.V.square().sum(0)
    update.base_scales[half:] = 0
    left = (update.base_scales.square() @ norms).sqrt() / norms[:half].sum().sqrt()
    assert unit_rates(update) == pytest.approx((float(left), 0.0), rel=1e-5)
    assert before.sparse == 0
    update.base_scales[:] = 0
    assert unit_rates(update) == (0, 0)


def test_shorter_runs_take_longer_steps(cases: Cases) -> None:
    model = cases("llama").attached()

    def rates(**given: Any) -> list[float]:
        return [group["lr"] for group in frodctl.parameter_groups(model, **given)]

    hundred, more, unknown = rates(steps=100), rates(steps=10_000), rates()
    assert more == pytest.approx([rate * relative_step(10_000) / relative_step(100) for rate in hundred])
    assert more == pytest.approx([rate * relative_step(10_000) / RHO_UNKNOWN for rate in unknown])
    assert rates(steps=100, rho_lambda=0.5) != hundred
    assert rates(steps="100") == hundred


def test_a_longer_run_goes_further_by_the_root_of_its_steps() -> None:
    assert relative_step(40_000) == pytest.approx(relative_step(10_000) / 2, rel=0.01)
    lengths = [1, 10, 100, 1000, 10_000]
    assert all(relative_step(a) > relative_step(b) for a, b in pairwise(lengths))
    assert all(a * relative_step(a) < b * relative_step(b) for a, b in pairwise(lengths))
    assert relative_step(1) < 0.05


@pytest.mark.parametrize("steps", [0, -1, 1.5, "many", True, float("inf"), [], {}])
def test_what_is_no_number_of_steps(steps: Any, cases: Cases) -> None:
    with pytest.raises(UsageError, match="`steps`"):
        frodctl.parameter_groups(cases("llama").attached(), steps=steps)


def test_the_default_is_the_rule(cases: Cases) -> None:
    """The loss falls on a model at once, with no rate given."""
    model = cases("llama").attached()
    data = batch("llama")
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model, steps=20))
    losses = []
    for _ in range(20):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))

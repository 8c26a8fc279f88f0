"""A picture of how much an adapter changed each expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

import frodctl
from frodctl.cli import plot
from frodctl.cli.heat import heat_maps
from tests.training.conftest import mixture, perturb

EXPERT, LAYER = 2, 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, its basis, and an adapter that leaves one expert of one layer alone."""
    root = tmp_path_factory.mktemp("heat")
    base, basis = mixture(root / "mixture")
    model = frodctl.attach(Qwen3MoeForCausalLM.from_pretrained(base), basis)
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"layers.{LAYER}.mlp.experts.adapters" in name:
                parameter[EXPERT] = 0
    frodctl.save_adapter(model, root / "adapter")
    return base, basis, root / "adapter"


@pytest.mark.parametrize("with_base", [False, True])
def test_layers_by_experts(with_base: bool, files: tuple[Path, Path, Path]) -> None:
    base, basis, adapter = files
    targets = list(frodctl.inspect(adapter, basis=basis, base=base if with_base else None, spectrum=True).targets)
    maps = heat_maps(targets)
    assert sorted(found.role.rpartition(".")[2] for found in maps) == ["down_proj", "gate_proj", "up_proj"]
    rows = {row.values["name"]: row.values for row in targets[0].rows}
    for found in maps:
        assert found.changes.keys() == {(layer, expert) for layer in range(2) for expert in range(4)}
        assert found.changes[LAYER, EXPERT] == pytest.approx(0, abs=1e-6)
        assert min(change for at, change in found.changes.items() if at != (LAYER, EXPERT)) > 1e-3
        row = rows[f"model.layers.0.mlp.experts.3.{found.role.rpartition('.')[2]}"]
        expected = row["relative_change"] if with_base else np.hypot(row["scales_change_norm"], row["sparse_norm"])
        assert found.changes[0, 3] == pytest.approx(expected)


def test_drawn_with_the_figures_as_colours(files: tuple[Path, Path, Path]) -> None:
    _, basis, adapter = files
    targets = list(frodctl.inspect(adapter, basis=basis, spectrum=True).targets)
    figure = plot.figure(targets)
    assert figure is not None
    found = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    (map_,) = (one for one in heat_maps(targets) if one.role.endswith("down_proj"))
    cells = np.asarray(found["change of experts.down_proj"].images[0].get_array())
    assert cells.shape == (2, 4)
    assert all(cells[at] == pytest.approx(change) for at, change in map_.changes.items())


def test_an_adapter_without_experts_has_none(example: Path, tmp_path: Path) -> None:
    basis = tmp_path / "basis.safetensors"
    frodctl.decompose(example, basis, target_modules="q_proj")
    assert not heat_maps(list(frodctl.inspect(basis).targets))

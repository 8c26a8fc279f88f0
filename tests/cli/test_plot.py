"""Pictures, by what is in them: each curve belongs to one target and one role, and is told apart from the others."""

from __future__ import annotations

import random
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import frodctl
from frodctl.cli import plot
from frodctl.errors import UsageError
from frodctl.jobs.inspect import TargetResult
from tests.cli.test_output import HOSTILE
from tests.conftest import LLAMA_CONFIG, llama_layers, save_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one architecture and other depths, in folders of one name."""
    root = tmp_path_factory.mktemp("models")
    return [
        save_checkpoint(root / name / "model", llama_layers(count, seed=count), LLAMA_CONFIG)
        for name, count in (("a", 5), ("b", 3))
    ]


def inspected(*targets: Path, **options: Any) -> list[TargetResult]:
    return list(frodctl.inspect(*targets, spectrum=True, **options).targets)


def axes(targets: list[TargetResult]) -> dict[str, Any]:
    drawn = plot.figure(targets)
    assert drawn is not None
    return {axis.get_title(): axis for axis in drawn.axes if axis.get_visible()}


def caption(targets: list[TargetResult]) -> str:
    drawn = plot.figure(targets)
    assert drawn is not None
    return str(drawn.get_suptitle())


def values(line: Any) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_each_spectrum_is_drawn_once_by_role(models: list[Path]) -> None:
    targets = inspected(*models)
    panels = axes(targets)
    for role in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        rows = [row for target in targets for row in target.rows if role in row.values["name"]]
        found = sorted(values(line)[1] for line in panels[role].lines)
        assert found == sorted(row.singular_values.tolist() for row in rows)
    assert len(panels) == 5


def test_models_are_told_apart_and_layers_shaded_within_each(models: list[Path]) -> None:
    targets = inspected(*models)
    drawn = plot.figure(targets)
    assert drawn is not None
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/model", "b/model"]
    dashes = [line.get_linestyle() for line in legend.get_lines()]
    assert dashes[0] != dashes[1]
    for axis in drawn.axes[:4]:
        lines = {style: [line for line in axis.lines if line.get_linestyle() == style] for style in dashes}
        assert [len(found) for found in lines.values()] == [5, 3]
        for found in lines.values():
            brightness = [sum(line.get_color()[:3]) for line in found]
            assert brightness == sorted(brightness)
            assert len(set(brightness)) == len(brightness)
    assert caption(targets) == "a/model, b/model: singular values of W\nthe first layer dark, the last one light"


@pytest.mark.parametrize("sort", [None, "stable_rank", "-effective_rank"])
def test_the_rank_by_depth_is_a_line_for_each_model_and_role_that_never_runs_back(
    models: list[Path], sort: str | None
) -> None:
    targets = inspected(*models, sort=sort)
    lines = [values(line) for line in axes(targets)["rank by depth"].lines]
    assert len(lines) == 2 * 4
    assert sorted(x for x, _ in lines) == [list(range(3))] * 4 + [list(range(5))] * 4
    ranks = sorted(row.values["effective_rank"] / len(row.singular_values) for target in targets for row in target.rows)
    assert sorted(y for _, ys in lines for y in ys) == pytest.approx(ranks)


def test_a_picture_does_not_depend_on_the_order_of_rows(models: list[Path]) -> None:
    targets = inspected(*models)
    shuffled = [replace(t, rows=tuple(random.Random(0).sample(t.rows, len(t.rows)))) for t in targets]
    for title, axis in axes(targets).items():
        other = axes(shuffled)[title]
        assert [(values(a), a.get_color()) for a in axis.lines] == [(values(b), b.get_color()) for b in other.lines]


def test_experts_of_a_layer_share_a_point(tmp_path: Path) -> None:
    weights = {f"layers.{i}.experts.{e}.w1.weight": torch.randn(6, 6) for i in (2, 7) for e in range(3)}
    save_file(weights, tmp_path / "m.safetensors")
    (target,) = inspected(tmp_path / "m.safetensors")
    (line,) = axes([target])["rank by depth"].lines
    shares = [row.values["effective_rank"] / 6 for row in target.rows]
    assert values(line) == ([2, 7], pytest.approx([sum(shares[:3]) / 3, sum(shares[3:]) / 3]))


def test_a_basis_has_no_layers_to_shade(models: list[Path], tmp_path: Path) -> None:
    bases = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for model, basis in zip(models, bases, strict=True):
        frodctl.decompose(model, basis, target_modules="all-linear")
    for targets in (inspected(bases[0]), inspected(*bases)):
        panels = axes(targets)
        assert list(panels) == ["V of every category", "sharing of the basis"]
        for axis in panels.values():
            assert len(axis.lines) == 4 * len(targets)
            assert len({line.get_color() for line in axis.lines}) == 4
            assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == len(axis.lines)
            assert len(axis.get_legend().get_texts()) == 4
        assert "layer dark" not in caption(targets)
    assert caption(inspected(bases[0])) == "one.safetensors: singular values of V, and how layers share it"
    mixed = inspected(models[0], bases[0])
    assert len(axes(mixed)) == 7


def test_a_comparison_shows_which_layers_differ(models: list[Path], tmp_path: Path) -> None:
    changed = llama_layers(5, seed=5)
    for layer in (1, 4):
        changed[f"model.layers.{layer}.self_attn.q_proj.weight"] += 1
    other = save_checkpoint(tmp_path / "changed", changed, LLAMA_CONFIG)
    targets = inspected(models[0], against=other)
    panels = axes(targets)
    assert list(panels) == ["self_attn.q_proj", "rank by depth"]
    (line,) = panels["rank by depth"].lines
    assert values(line)[0] == [1, 4]
    assert caption(targets).startswith("changed − model: singular values of the difference")


def test_what_is_left_out_of_a_picture_is_said(tmp_path: Path) -> None:
    weights = {f"layers.{i}.{chr(97 + r)}.weight": torch.randn(3, 3) for r in range(20) for i in range(2)}
    save_file(weights, tmp_path / "m.safetensors")
    assert "4 roles of fewer layers are not shown" in caption(inspected(tmp_path / "m.safetensors"))


def test_nothing_to_draw(tmp_path: Path, models: list[Path]) -> None:
    save_file({"norm": torch.ones(3), "zero": torch.zeros(3, 3)}, tmp_path / "m.safetensors")
    assert plot.figure(inspected(tmp_path / "m.safetensors")) is None
    with pytest.raises(UsageError, match="nothing to draw"):
        plot.draw(str(tmp_path / "x.png"), inspected(tmp_path / "m.safetensors"))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_any_names_can_be_drawn(suffix: str, tmp_path: Path) -> None:
    """Formulas that are none, comments that would end, letters without a glyph, tags."""
    roles = [*HOSTILE, "$x^{", "a$\\frac{$b", "\\$", "_hidden", "-->", "<script>", "&amp;", "層", "%s"]
    weights = {f"layers.{i}.{role}.weight": torch.randn(3, 3) for role in roles for i in range(2)}
    folder = tmp_path / "$m$_<b>"
    save_checkpoint(folder, weights)
    shown = [replace(t, rows=t.rows[start::2]) for t in inspected(folder) for start in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw(str(tmp_path / f"x.{suffix}"), shown)
    if suffix != "png":
        text = (tmp_path / f"x.{suffix}").read_text()
        ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
        assert "<script" not in text
        assert "<b>" not in text


PATHS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "."]), min_size=1, max_size=4).map("/".join), min_size=1)


@given(PATHS)
def test_short_names_tell_targets_apart(paths: list[str]) -> None:
    targets = [TargetResult(path, "checkpoint", (), {}) for path in paths]
    shown = plot.shown_names(targets)
    assert len(set(shown)) == len(shown) == len(paths)
    if len(set(paths)) == len(paths):
        assert all(path.endswith(name) for path, name in zip(paths, shown, strict=True))

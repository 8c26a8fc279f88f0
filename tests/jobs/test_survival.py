"""How much of an adapter's update is in a merged checkpoint, against figures made here from the files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frodctl
from frodctl.errors import InvalidInput, UsageError
from tests import peft_models
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint
from tests.jobs.conftest import Case, operators, tensors
from tests.jobs.test_merge import renamed, write_adapter

Cases = Callable[[str, torch.dtype], Case]


@pytest.mark.parametrize("family", peft_models.FAMILIES)
@pytest.mark.parametrize("merged", [torch.bfloat16, torch.float16], ids=str)
def test_every_family(family: str, merged: torch.dtype, cases: Cases, tmp_path: Path) -> None:
    """Names may have got a prefix with a head, and the weights another dtype."""
    case = cases(family, torch.float32)
    case.merged(tmp_path / "merged", dtype=str(merged)[6:])
    (target,) = frodctl.inspect(case.adapter, base=case.base, merged=tmp_path / "merged").targets
    base, exact, found = tensors(case.base), operators(case), tensors(tmp_path / "merged")
    rows = {row.values["name"].removeprefix("bert."): row.values for row in target.rows}
    assert {f"{name}.weight" for name in rows} == set(exact)
    sums = np.zeros(3)
    for name, W in exact.items():
        delta, kept = W - base[name].double(), found[renamed(case, name)].double() - base[name].double()
        row = rows[name.removesuffix(".weight")]
        terms = [float((x * y).sum()) for x, y in ((delta, delta), (kept, delta), (kept - delta, kept - delta))]
        assert row["survival"] == pytest.approx(terms[1] / terms[0], rel=1e-5)
        assert row["survival_distance"] == pytest.approx((terms[2] / terms[0]) ** 0.5, rel=1e-3)
        sums += terms
    assert target.summary["survival"] == pytest.approx(sums[1] / sums[0], rel=1e-5)
    least = min(rows.values(), key=lambda row: row["survival"])
    assert (target.summary["least_survival"], target.summary["least_survival_module"]) == (
        least["survival"], least["name"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bfloat16 base, adapters over it that change a lot and a millionth, and what they were merged into."""
    root = tmp_path_factory.mktemp("own")
    base = save_checkpoint(root / "base", llama_layers(2, dtype=torch.bfloat16), LLAMA_CONFIG)
    frodctl.decompose(base, root / "basis.safetensors", target_modules="all-linear", sparsity=0.05)
    for name, change in (("large", 0.1), ("tiny", 1e-5)):
        write_adapter(root / name, base, root / "basis.safetensors", change)
        frodctl.merge(base, root / name, root / f"{name}-merged", basis=root / "basis.safetensors")
    return {path.name: path for path in root.iterdir()}


def test_a_small_update_is_lost_in_rounding(own: dict[str, Path], frodctl: Run) -> None:
    """By the bar's exit code, the same in every format; what survives passes."""

    def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return frodctl("inspect", own[name], "--base", own["base"], "--merged", own[f"{name}-merged"], *flags)

    assert run("large", "--min-survival", "90%").returncode == 0
    for form in ("tsv", "json", "jsonl", "csv", "human"):
        done = run("tiny", "--min-survival", "0.9", "--format", form)
        assert done.returncode == 5, form
        assert "of the update of model.layers." in done.stderr
    assert run("tiny").returncode == 0
    document = json.loads(run("tiny", "--json").stdout)["targets"][0]
    assert document["summary"]["survival"] < 0.5
    assert all(row["survival"] < 0.9 < row["survival_distance"] + 0.5 for row in document["tensors"])


def test_an_adapter_that_was_not_merged_is_not_there(own: dict[str, Path]) -> None:
    (target,) = frodctl.inspect(own["large"], base=own["base"], merged=own["base"]).targets
    assert {row.values["survival"] for row in target.rows} == {0.0}
    assert {row.values["survival_distance"] for row in target.rows} == {1.0}


def test_the_ranks_of_an_update_are_shown(own: dict[str, Path], frodctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hold 90, 95 and 99 % of it, and what of it is in the merged checkpoint."""
    import frodctl as library

    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["inspect", own["large"], "--base", own["base"], "--spectrum", "--merged", own["large-merged"]]
    shown = frodctl(*arguments, "--format", "human").stdout
    assert all(title in shown for title in ("90 %", "95 %", "99 %", "survives"))
    (target,) = library.inspect(own["large"], base=own["base"], spectrum=True).targets
    for row in target.rows:
        energy = np.cumsum(row.singular_values**2) / np.sum(row.singular_values**2)
        for share in (90, 95, 99):
            assert row.values[f"delta_energy_rank_{share}"] == int(np.searchsorted(energy, share / 100)) + 1


def test_what_cannot_be_compared(own: dict[str, Path], tmp_path: Path, frodctl: Run) -> None:
    import frodctl as library

    for options, text in (
        ({"merged": own["base"]}, "goes with an adapter and its `base`"),
        ({"merged": own["base"], "base": own["base"]}, "goes with an adapter, and this is none"),
    ):
        target = own["basis.safetensors"] if "base" in options else own["large"]
        with pytest.raises(UsageError, match=text):
            library.inspect(target, **options)
    weights = tensors(own["base"])
    name = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({key: W for key, W in weights.items() if key != name}, "is not there"),
        (weights | {name: weights[name][:3]}, r"is BF16 \[3, 32\]"),
    ]
    for number, (changed, text) in enumerate(cases):
        other = save_checkpoint(tmp_path / str(number), changed, LLAMA_CONFIG)
        with pytest.raises(InvalidInput, match=text):
            library.inspect(own["large"], base=own["base"], merged=other)
    assert frodctl("inspect", own["large"], "--min-survival", "0.9").returncode == 2

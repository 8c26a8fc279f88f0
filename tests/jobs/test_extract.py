"""What is extracted from a fine-tuned checkpoint, against numpy's SVD and the adapter that it was made by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import frodctl
from frodctl.arrays import to_torch
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from tests import peft_models
from tests.conftest import LLAMA_CONFIG, PEAK_MEMORY, llama_layers, save_checkpoint
from tests.jobs.conftest import tensors
from tests.jobs.test_lora import factors
from tests.jobs.test_merge import write_adapter


def tuned(base: Path, folder: Path, size: float = 0.1, seed: int = 5) -> Path:
    """A copy of a checkpoint with every matrix changed at random."""
    generator = torch.Generator().manual_seed(seed)
    weights = tensors(base)
    for name, W in weights.items():
        if W.ndim == 2:
            weights[name] = (W + size * W.std() * torch.randn(W.shape, generator=generator)).to(W.dtype)
    return save_checkpoint(folder, weights, json.loads((base / "config.json").read_text()))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of tall, wide and square layers in float32, its basis, and a random fine-tune."""
    root = tmp_path_factory.mktemp("own")
    base = save_checkpoint(root / "base", llama_layers(4), LLAMA_CONFIG)
    frodctl.decompose(base, root / "basis.safetensors", target_modules="all-linear", sparsity=0.05, seed=2)
    tuned(base, root / "tuned")
    return {name: root / name for name in ("base", "tuned")} | {"basis": root / "basis.safetensors"}


# LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_best_of_its_rank(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """And what PEFT makes of it at full rank is the fine-tuned model."""
    base = peft_models.save_base(tmp_path / "base", family, dtype)
    tuned(base, tmp_path / "tuned", 0.02)
    result = frodctl.extract(base, tmp_path / "tuned", tmp_path / "lora", rank=6)
    before, after, found = tensors(base), tensors(tmp_path / "tuned"), factors(tmp_path / "lora")
    assert len(found) == len(result.rows()) == (21 if family == "llama" else 12)
    for row in result.rows():
        name = f"{row['module']}.weight"
        delta = (after[name].double() - before[name].double()).numpy()
        delta = delta.T if family == "gpt2" else delta
        B, A = found[row["module"]]
        least = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[6:])
        assert np.linalg.norm(delta - B @ A) == pytest.approx(least, rel=1e-6)
        assert row["distance"] == pytest.approx(least / np.linalg.norm(delta), rel=1e-6)
    assert any("different too" in warning for warning in result.plan.warnings)  # the embeddings
    if dtype == torch.float32:
        targets = "all-linear"
        frodctl.extract(base, tmp_path / "tuned", tmp_path / "full", rank=32, target_modules=targets)
        same = {
            name: W if "embed" in name or "wte" in name or "wpe" in name else after[name] for name, W in before.items()
        }
        save_file(same, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
        model = PeftModel.from_pretrained(peft_models.task_model(family, base), tmp_path / "full").eval()
        expected = peft_models.logits(peft_models.task_model(family, tmp_path / "tuned"))
        assert (peft_models.logits(model) - expected).abs().max() <= 1e-5


def test_only_what_differs_and_what_is_asked_for(own: dict[str, Path], tmp_path: Path) -> None:
    weights = tensors(own["base"])
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] + 1
    weights["model.layers.2.self_attn.q_proj.weight"] = weights["model.layers.2.self_attn.q_proj.weight"] * 2
    other = save_checkpoint(tmp_path / "other", weights, LLAMA_CONFIG)
    result = frodctl.extract(own["base"], other, tmp_path / "lora", rank=4)
    assert [row["module"] for row in result.rows()] == ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    assert result.rows()[0]["kept"] == pytest.approx(1)  # of rank 1
    one = frodctl.extract(own["base"], other, tmp_path / "one", rank=4, target_modules="up_proj")
    assert one.plan.warnings == ("model.layers.2.self_attn.q_proj.weight: different too, but not in the adapter",)
    with pytest.raises(InvalidInput, match="nothing to extract"):
        frodctl.extract(own["base"], own["base"], tmp_path / "none", rank=4)
    with pytest.raises(UsageError, match="nothing is called k_prj"):
        frodctl.extract(own["base"], other, tmp_path / "none", rank=4, target_modules="k_prj")
    assert not (tmp_path / "none").exists()


def test_checkpoints_that_do_not_belong_together(own: dict[str, Path], tmp_path: Path) -> None:
    weights = tensors(own["tuned"])
    name = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({key: W for key, W in weights.items() if key != name}, f"has no {name}"),
        (weights | {name: torch.ones(3, 32)}, r"is F32 \[3, 32\]"),
        (weights | {name: weights[name] * float("nan")}, "NaN or Inf"),
    ]
    for number, (changed, text) in enumerate(cases):
        other = save_checkpoint(tmp_path / str(number), changed, LLAMA_CONFIG)
        with pytest.raises(InvalidInput, match=text):
            frodctl.extract(own["base"], other, tmp_path / "out", rank=4)
    experts = save_checkpoint(
        tmp_path / "experts", {"layers.0.experts.up_proj": torch.randn(2, 8, 6)}, {"hidden_size": 6}
    )
    with pytest.raises(InvalidInput, match="several experts"):
        frodctl.extract(experts, experts, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


# FRoD


def test_what_an_adapter_made_comes_back(own: dict[str, Path], tmp_path: Path) -> None:
    """δ and S, at the positions that it was trained at."""
    write_adapter(tmp_path / "adapter", own["base"], own["basis"], 0.1)
    frodctl.merge(own["base"], tmp_path / "adapter", tmp_path / "merged", basis=own["basis"])
    options = {"as_": "frod", "basis": own["basis"], "positions": "basis"}
    result = frodctl.extract(own["base"], tmp_path / "merged", tmp_path / "again", **options)
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    opened = frodctl.open_basis(own["basis"])
    for record in opened.metadata.modules:
        prefix = f"base_model.model.{record.name}"
        start = to_torch(opened.tensor(f"lambda.{record.name}")).double()
        delta, exact = (state[f"{prefix}.frod_lambda_l"].double() - start for state in (found, expected))
        assert (delta - exact).norm() <= 1e-4 * exact.norm(), record.name
        S, exact = (state[f"{prefix}.frod_lambda_s_values"].double() for state in (found, expected))
        assert (S - exact).norm() <= 1e-4 * exact.norm(), record.name
    assert max(row["distance"] for row in result.rows()) < 1e-4


def test_the_residual_is_orthogonal_to_every_position(own: dict[str, Path], tmp_path: Path) -> None:
    """Computed here in float64 from the files alone; and merge gives what the figures say."""
    result = frodctl.extract(own["base"], own["tuned"], tmp_path / "out", as_="frod", basis=own["basis"], sparsity=0.1)
    frodctl.merge(own["base"], tmp_path / "out", tmp_path / "merged", basis=own["basis"])
    opened = frodctl.open_basis(own["basis"])
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before, after, merged = (tensors(path) for path in (own["base"], own["tuned"], tmp_path / "merged"))
    rows = {row["module"]: row for row in result.rows()}
    for record in opened.metadata.modules:
        W, V = before[f"{record.name}.weight"].double(), to_torch(opened.tensor(f"V.{record.category}")).double()
        start = to_torch(opened.tensor(f"lambda.{record.name}")).double()
        U = W @ torch.linalg.inv(V).T / start
        prefix = f"base_model.model.{record.name}"
        M = torch.diag(state[f"{prefix}.frod_lambda_l"].double() - start)
        positions = tuple(state[f"base_model.indices.{record.category}"])
        M[positions] += state[f"{prefix}.frod_lambda_s_values"].double()
        delta = after[f"{record.name}.weight"].double() - W
        gradient, whole = U.T @ (U @ M @ V.T - delta) @ V, U.T @ delta @ V
        at = torch.cat([gradient[positions], gradient.diagonal()]), torch.cat([whole[positions], whole.diagonal()])
        assert at[0].norm() <= 1e-5 * at[1].norm(), record.name
        assert rows[record.name]["residual"] <= 1e-8
        found = merged[f"{record.name}.weight"].double() - W
        assert rows[record.name]["distance"] == pytest.approx(float((found - delta).norm() / delta.norm()), rel=1e-4)
        assert rows[record.name]["nnz"] == len(positions[0]) == int(0.1 * len(start) ** 2)


def test_chosen_positions_explain_more_than_those_of_the_seed(own: dict[str, Path], tmp_path: Path) -> None:
    kept = {}
    for positions in ("best", "basis"):
        out = tmp_path / positions
        result = frodctl.extract(own["base"], own["tuned"], out, as_="frod", basis=own["basis"], positions=positions)
        kept[positions] = result.overall.kept
        assert frodctl.inspect(out, base=own["base"], basis=own["basis"]).targets[0].kind == "adapter"
    assert kept["best"] > 1.2 * kept["basis"] > 0


def test_a_budget_is_kept(own: dict[str, Path], tmp_path: Path) -> None:
    plan = frodctl.extract(
        own["base"], own["tuned"], tmp_path / "out", as_="frod", basis=own["basis"], budget="12%", dry_run=True
    )
    total = sum(W.numel() for W in tensors(own["base"]).values())
    assert 0.11 * total < plan.trained_parameters <= 0.12 * total
    result = frodctl.extract(own["base"], own["tuned"], tmp_path / "out", as_="frod", basis=own["basis"], budget="12%")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in state.items() if "lambda" in name) == plan.trained_parameters
    assert {k: v for k, v in plan.as_dict().items() if k in ("sparsity", "basis")}.items() <= result.as_dict().items()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"as_": "frod"}, "needs a `basis`"),
        ({"as_": "frod", "rank": 4}, "`rank` is of a LoRA adapter"),
        ({"rank": 4, "budget": 0.1}, "`budget` is of a FRoD adapter"),
        ({"as_": "frod", "basis": "basis", "budget": 1e-6}, "budget"),
        ({"as_": "frod", "basis": "basis", "budget": 0.1, "sparsity": 0.1}, "exclude each other"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], text: str, own: dict[str, Path], tmp_path: Path) -> None:
    given = options | ({"basis": own["basis"]} if "basis" in options else {})
    with pytest.raises(UsageError, match=text):
        frodctl.extract(own["base"], own["tuned"], tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_another_base_than_the_basis_has(own: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FrodctlError, match="digests differ"):
        frodctl.extract(own["tuned"], own["base"], tmp_path / "out", as_="frod", basis=own["basis"])
    assert not (tmp_path / "out").exists()


PROGRAM = f"""
import sys
import frodctl
{PEAK_MEMORY}
root = sys.argv[1]
options = dict(as_="frod", basis=root + "/basis.safetensors") if sys.argv[2] == "frod" else dict(rank=16)
frodctl.extract(root + "/base", root + "/tuned", root + "/" + sys.argv[2], **options)
print(peak())
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"lora": [], "frod": []}
    for count in (4, 10):  # of which some are read ahead
        root = tmp_path / str(count)
        weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 384) for i in range(count)}
        base = save_checkpoint(root / "base", weights, LLAMA_CONFIG)
        tuned(base, root / "tuned")
        frodctl.decompose(base, root / "basis.safetensors", target_modules="up_proj", sparsity=0.01)
        for kind, found in peaks.items():
            command = [sys.executable, "-c", PROGRAM, str(root), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            found.append(int(done.stdout))
    for found in peaks.values():
        assert found[1] - found[0] < 2 * 512 * 384 * 4, peaks

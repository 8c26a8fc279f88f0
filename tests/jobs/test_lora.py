"""LoRA adapters of FRoD's: the nearest there are, as PEFT, vLLM and llama.cpp read them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from peft import PeftModel
from safetensors.torch import load_file

import frodctl
from frodctl.errors import InvalidInput, UsageError
from frodctl.jobs.progress import Progress
from tests import peft_models
from tests.conftest import LLAMA_CONFIG, PEAK_MEMORY, llama_layers, save_checkpoint
from tests.jobs.conftest import Case, operators, tensors
from tests.jobs.test_merge import write_adapter

#: At least min(m, n) of every layer that the tiny models have.
FULL = 32
Cases = Callable[[str, torch.dtype], Case]


def factors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B and A in float64, by module."""
    state = {name: tensor.double().numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    ending = ".lora_A.weight"
    paths = [name.removesuffix(ending) for name in state if name.endswith(ending)]
    return {p.removeprefix("base_model.model."): (state[f"{p}.lora_B.weight"], state[p + ending]) for p in paths}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def changes(case: Case) -> dict[str, np.ndarray]:
    """ΔW as PEFT trained it, in nn.Linear's orientation, by module of the live model."""
    base = tensors(case.base)
    prefix = "bert." if case.family == "bert" else ""
    found = {}
    for name, exact in operators(case).items():
        delta = (exact - base[name].double()).numpy()
        found[prefix + name.removesuffix(".weight")] = delta.T if case.family == "gpt2" else delta
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", peft_models.FAMILIES)
class TestEveryFamily:
    def test_the_best_of_its_rank(self, family: str, dtype: torch.dtype, cases: Cases, tmp_path: Path) -> None:
        case = cases(family, dtype)
        result = case.merged(tmp_path / "lora", as_="lora", rank=5)
        found, exact = factors(tmp_path / "lora"), changes(case)
        assert set(found) == set(exact) == {row["module"] for row in result.rows()}
        for row in result.rows():
            (B, A), delta = found[row["module"]], exact[row["module"]]
            assert (B.shape, A.shape) == ((row["m"], 5), (5, row["n"]))
            sigma = np.linalg.svd(delta, compute_uv=False)
            distance = np.linalg.norm(delta - B @ A)
            assert distance == pytest.approx(np.linalg.norm(sigma[5:]), rel=1e-6)
            norm = np.linalg.norm(delta)
            assert row["distance"] == pytest.approx(distance / norm, rel=1e-6)
            assert row["kept"] == pytest.approx(np.sum(sigma[:5] ** 2) / norm**2, rel=1e-6)
            assert row["delta_norm"] == pytest.approx(norm, rel=1e-6)

    def test_at_full_rank_it_is_the_merged_model(
        self, family: str, dtype: torch.dtype, cases: Cases, tmp_path: Path
    ) -> None:
        case = cases(family, dtype)
        case.merged(tmp_path / "lora", as_="lora", rank=FULL)
        case.merged(tmp_path / "dense")
        exact = changes(case)
        for module, (B, A) in factors(tmp_path / "lora").items():
            assert np.linalg.norm(exact[module] - B @ A) <= 3e-6 * np.linalg.norm(exact[module])  # W' is in float32
        model = PeftModel.from_pretrained(peft_models.task_model(family, case.base), tmp_path / "lora")
        found = peft_models.logits(model.eval())
        merged = peft_models.logits(peft_models.task_model(family, tmp_path / "dense"))
        if dtype == torch.float32:
            assert (found - merged).abs().max() <= 1e-5
        else:
            base = peft_models.logits(peft_models.task_model(family, case.base))
            assert (found - case.logits).norm() < 0.1 * (base - case.logits).norm()

    def test_the_limits_of_those_who_read_it(
        self, family: str, dtype: torch.dtype, cases: Cases, tmp_path: Path
    ) -> None:
        """As vLLM's PEFTHelper and MaxLoRARanks have them, and llama.cpp's convert_lora_to_gguf.py."""
        case = cases(family, dtype)
        result = case.merged(tmp_path / "lora", as_="lora", rank=16)
        found = config(tmp_path / "lora")
        state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        assert found["peft_type"] == "LORA"
        assert found["r"] == found["lora_alpha"] == 16
        assert found["rank_pattern"] == found["alpha_pattern"] == {}
        assert not found["use_dora"]
        assert not found["use_rslora"]
        assert found["fan_in_fan_out"] == (family == "gpt2")
        assert set(found["target_modules"]) == set(changes(case))
        assert {tensor.dtype for name, tensor in state.items() if "lora_" in name} == {torch.float32}
        others = [name for name in state if ".lora_A.weight" not in name and ".lora_B.weight" not in name]
        refused = any("vLLM and llama.cpp refuse" in warning for warning in result.plan.warnings)
        if family == "bert":  # what PEFT's format has room for is kept, and it is said
            assert found["modules_to_save"] == ["classifier", "score"]
            assert found["bias"] == "all"
            assert refused
        else:
            assert found["modules_to_save"] is None
            assert found["bias"] == "none"
            assert others == []
            names = tensors(case.base)
            for name in state:
                module = (
                    name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
                )
                assert f"{module}.weight" in names
            assert not refused


def test_ranks_that_others_do_not_serve(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama", torch.float32)
    for options, text in (
        ({"rank": 513}, "vLLM serves no LoRA of rank 513"),
        ({"rank": 8, "rank_pattern": True}, "one rank for all layers"),
    ):
        plan = case.merged(tmp_path / "lora", as_="lora", dry_run=True, **options)
        assert any(text in warning for warning in plan.warnings)


def test_energy_finds_the_rank(cases: Cases, tmp_path: Path) -> None:
    """One for all with which each layer keeps the share, and none smaller; a pattern of the least of each; a bound."""
    case = cases("llama", torch.float32)
    needed = {}
    for module, delta in changes(case).items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        needed[module] = int(np.searchsorted(np.cumsum(squares), 0.8 * squares.sum())) + 1
    assert len(set(needed.values())) > 1
    one = case.merged(tmp_path / "one", as_="lora", energy="80%")
    assert set(one.ranks) == {max(needed.values())}
    assert min(row["kept"] for row in one.rows()) >= 0.8
    each = case.merged(tmp_path / "each", as_="lora", energy=0.8, rank_pattern=True)
    assert {row["module"]: row["rank"] for row in each.rows()} == needed
    capped = case.merged(tmp_path / "capped", as_="lora", energy=0.8, max_rank=2)
    assert set(capped.ranks) == {2}


def test_peft_reads_a_pattern_of_ranks(cases: Cases, tmp_path: Path) -> None:
    """Each layer as its factors say, its α being its rank."""
    case = cases("llama", torch.float32)
    case.merged(tmp_path / "lora", as_="lora", energy=0.8, rank_pattern=True)
    model = PeftModel.from_pretrained(peft_models.task_model("llama", case.base), tmp_path / "lora")
    for module, (B, A) in factors(tmp_path / "lora").items():
        found = model.base_model.model.get_submodule(module).get_delta_weight("default").double().numpy()
        assert np.linalg.norm(found - B @ A) <= 1e-6 * np.linalg.norm(B @ A), module


def test_scales_and_several_adapters(cases: Cases, tmp_path: Path) -> None:
    """Their changes add up, and what two cancel is nothing."""
    case = cases("llama", torch.float32)
    exact = changes(case)
    case.merged(tmp_path / "lora", as_="lora", rank=FULL, scale=0.5, also=[(str(case.adapter), 0.25)])
    for module, (B, A) in factors(tmp_path / "lora").items():
        assert np.linalg.norm(0.75 * exact[module] - B @ A) <= 3e-6 * np.linalg.norm(exact[module])
    nothing = case.merged(tmp_path / "nothing", as_="lora", rank=4, scale=0)
    assert {(row["delta_norm"], row["kept"], row["distance"]) for row in nothing.rows()} == {(0.0, None, None)}
    assert nothing.as_dict()["kept"] is None
    assert all(not B.any() and not A.any() for B, A in factors(tmp_path / "nothing").values())


@pytest.mark.parametrize(("dtype", "ulp"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_the_figures_are_of_the_factors_as_written(dtype: str, ulp: float, cases: Cases, tmp_path: Path) -> None:
    case = cases("llama", torch.float32)
    result = case.merged(tmp_path / "lora", as_="lora", rank=FULL, dtype=dtype)
    exact = changes(case)
    for row in result.rows():
        (B, A), delta = factors(tmp_path / "lora")[row["module"]], exact[row["module"]]
        assert row["distance"] == pytest.approx(np.linalg.norm(delta - B @ A) / np.linalg.norm(delta), rel=1e-3)
        assert ulp / 10 < row["distance"] < 2 * ulp
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in state.values()} == {f"torch.{dtype}"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, its basis, and an adapter of frodctl's over it."""
    root = tmp_path_factory.mktemp("own")
    base = save_checkpoint(root / "base", llama_layers(3, dtype=torch.bfloat16), LLAMA_CONFIG)
    frodctl.decompose(base, root / "basis.safetensors", target_modules="all-linear", sparsity=0.05)
    write_adapter(root / "adapter", base, root / "basis.safetensors", 0.1)
    return {name: root / name for name in ("base", "adapter")} | {"basis": root / "basis.safetensors"}


def test_adapters_of_frodctl(own: dict[str, Path], tmp_path: Path) -> None:
    """Against W' − W, which is read off the merged model in float32; the card and the JSON say the same."""
    result = frodctl.merge(own["base"], own["adapter"], tmp_path / "lora", as_="lora", rank=8)
    frodctl.merge(own["base"], own["adapter"], tmp_path / "dense", dtype="float32")
    base, dense = tensors(own["base"]), tensors(tmp_path / "dense")
    for row in result.rows():
        name = f"{row['module']}.weight"
        delta = (dense[name].double() - base[name].double()).numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert row["distance"] == pytest.approx(np.linalg.norm(sigma[8:]) / np.linalg.norm(sigma), rel=1e-5, abs=1e-6)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert all(f"| {row['module']} | 8 | {row['kept']:.2%} | {row['distance']:.2%} |" in card for row in result.rows())
    assert "max_lora_rank 8" in card
    assert str(tmp_path) not in card
    data = metadata_load(tmp_path / "lora" / "README.md")
    assert data["library_name"] == "peft"
    document = json.loads(json.dumps(result.as_dict()))
    assert (document["as"], document["rank"], document["kept"]) == ("lora", 8, result.overall.kept)
    plan = frodctl.merge(own["base"], own["adapter"], tmp_path / "plan", as_="lora", rank=8, dry_run=True)
    assert set(plan.as_dict()) <= set(document)
    assert set(plan.rows()[0]) == set(result.rows()[0]) == {column.key for column in plan.columns}
    assert plan.output_bytes == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size


def test_a_run_that_was_cut_is_taken_up(own: dict[str, Path], tmp_path: Path) -> None:
    """With the same bytes, and the figures of the layers that were finished."""

    def stop(report: Progress) -> None:
        if report.text == "truncating" and report.done == 7:
            raise KeyboardInterrupt

    def run(name: str, **options: Any) -> frodctl.LoraResult:
        return frodctl.merge(own["base"], own["adapter"], tmp_path / name, as_="lora", rank=8, **options)

    clean = run("clean")
    with pytest.raises(KeyboardInterrupt):
        run("cut", progress=stop)
    assert not (tmp_path / "cut").exists()
    result = run("cut")
    assert result.resumed_layers == 7
    assert result.rows() == clean.rows()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
    again = run("cut", force=True)
    assert again.resumed_layers == 0
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        run("cut", force=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"as_": "lora"}, "give `rank=64`, or `energy=95%`"),
        ({"as_": "lora", "rank": 4, "energy": 0.5}, "exclude each other"),
        ({"rank": 4}, "`rank` is of a LoRA adapter; it goes with `as_=lora`"),
        ({"energy": 0.5}, "`energy` is of a LoRA adapter"),
        ({"rank_pattern": True}, "`rank_pattern` is of a LoRA adapter"),
        ({"as_": "lora", "energy": 0}, "`energy`"),
    ],
)
def test_ranks_that_make_no_sense(options: Any, text: str, own: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=text):
        frodctl.merge(own["base"], own["adapter"], tmp_path / "lora", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_for_a_dtype(own: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="too large for float16"):
        frodctl.merge(own["base"], own["adapter"], tmp_path / "lora", as_="lora", rank=4, dtype="float16", scale=1e12)
    assert not list(tmp_path.iterdir())


PROGRAM = f"""
import sys
import frodctl
{PEAK_MEMORY}
root = sys.argv[1]
frodctl.merge(root + "/base", root + "/adapter", root + "/lora", as_="lora", rank=16, basis=root + "/basis.safetensors")
print(peak())
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = []
    for count in (4, 10):  # of which some are read ahead
        root = tmp_path / str(count)
        base = save_checkpoint(
            root / "base",
            {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(768, 512) for i in range(count)},
            LLAMA_CONFIG,
        )
        frodctl.decompose(base, root / "basis.safetensors", target_modules="up_proj")
        write_adapter(root / "adapter", base, root / "basis.safetensors", 0.1)
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(root)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 2 * 768 * 512 * 4, peaks

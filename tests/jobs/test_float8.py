"""A merge in 8 bits: as transformers loads it by compressed-tensors, and how much of the update is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CompressedTensorsConfig

import frodctl
from frodctl.errors import UsageError
from tests.conftest import Run
from tests.jobs.conftest import Case, operators, tensors
from tests.jobs.test_merge import renamed, write_adapter

Cases = Callable[[str, torch.dtype], Case]
DEQUANTIZED = CompressedTensorsConfig(dequantize=True)  # type: ignore[no-untyped-call]


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint's tensors stand for, in float64."""
    stored = tensors(folder)
    found = {name: tensor.double() for name, tensor in stored.items() if not name.endswith("_scale")}
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            m, n = found[name.removesuffix("_scale")].shape
            height, width = (1, n) if tensor.shape[1] == 1 and m == len(tensor) else (128, 128)
            spread = tensor.double().repeat_interleave(height, 0)[:m].repeat_interleave(width, 1)[:, :n]
            found[name.removesuffix("_scale")] *= spread
    return found


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, example: Path) -> dict[str, Path]:
    """The example, and adapters over it that change a lot and hardly anything."""
    root = tmp_path_factory.mktemp("own")
    basis = root / "basis.safetensors"
    frodctl.decompose(example, basis, target_modules="all-linear", exclude_modules="v_proj")
    for name, change in (("large", 0.1), ("tiny", 1e-5)):
        write_adapter(root / name, example, basis, change)
    return {"base": example, **{path.name: path for path in root.iterdir()}}


def merged(own: dict[str, Path], out: Path, adapter: str = "large", **options: Any) -> frodctl.MergeResult:
    found = frodctl.merge(
        own["base"], own[adapter], out, basis=own["basis.safetensors"], dtype=torch.float8_e4m3fn, **options
    )
    assert isinstance(found, frodctl.MergeResult)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(48).reshape(3, 16)).logits
    return found


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_transformers_loads_it(scales: str, own: dict[str, Path], tmp_path: Path) -> None:
    """Every weight is what it stands for here, rounded once, and so are the logits; compressed, too."""
    result = merged(own, tmp_path / "out", fp8_scales=scales)
    assert bool(result.plan.warnings) == (scales == "block")  # for there are sides of 64 and 320
    exact = dequantized(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=DEQUANTIZED
    )
    live = model.state_dict()
    assert all(torch.equal(live[name], W.bfloat16()) for name, W in exact.items())
    plain: Any = AutoModelForCausalLM.from_pretrained(own["base"], dtype=torch.bfloat16)
    plain.load_state_dict({name: W.bfloat16() for name, W in exact.items()}, strict=False)
    assert torch.equal(logits(model), logits(plain))
    compressed: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert (logits(compressed) - logits(plain)).norm() < 0.1 * logits(plain).norm()  # whose activations are in FP8
    assert all(torch.equal(compressed.state_dict()[name], W.bfloat16()) for name, W in exact.items())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_in_8_bits(family: str, cases: Cases, tmp_path: Path) -> None:
    """All linear layers of the blocks, whether they are trained or not; the others are ignored by name."""
    case = cases(family, torch.bfloat16)
    case.merged(tmp_path / "out", dtype="float8_e4m3")
    auto: Any = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=DEQUANTIZED)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    stored = tensors(tmp_path / "out")
    narrow = {name.removesuffix(".weight") for name, W in stored.items() if W.dtype == torch.float8_e4m3fn}
    ignored = set(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"])
    assert narrow == {name for name in linear if ".layers." in name or ".layer." in name}
    assert ignored - {"lm_head"} == linear - narrow - {"lm_head"}
    assert {W.dtype for name, W in stored.items() if name.removesuffix(".weight") not in narrow} == {torch.bfloat16}
    exact = dequantized(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], W.bfloat16()) for name, W in exact.items())


def test_a_model_without_such_layers_is_refused(cases: Cases, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 128"):
        cases("llama", torch.float32).merged(tmp_path / "out", dtype="float8_e4m3", fp8_scales="block")
    with pytest.raises(UsageError, match="no linear layers"):
        cases("gpt2", torch.float32).merged(tmp_path / "out", dtype="float8_e4m3")


def test_how_much_survives(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama", torch.float32)
    result = case.merged(tmp_path / "out", dtype="float8_e4m3")
    base, found = tensors(case.base), dequantized(tmp_path / "out")
    (target,) = frodctl.inspect(case.adapter, base=case.base, merged=tmp_path / "out").targets
    rows = {f"{row.values['name']}.weight": row.values for row in target.rows}
    for name, W in operators(case).items():
        delta, kept = W - base[name].double(), found[renamed(case, name)] - base[name].double()
        share, distance = (
            float((kept * delta).sum() / delta.square().sum()),
            float((kept - delta).norm() / delta.norm()),
        )
        ours = result.survival[renamed(case, name)]
        assert (ours.kept, ours.distance) == (pytest.approx(share, rel=1e-4), pytest.approx(distance, rel=1e-4))
        assert rows[name]["survival"] == pytest.approx(ours.kept, rel=1e-4)
    assert target.summary["least_survival"] == pytest.approx(result.least[1], rel=1e-4)
    assert all(row["least_survival"] >= result.least[1] for row in result.rows())
    assert len(result.as_dict()["survival"]) == len(rows)


def test_an_update_that_is_too_small_is_told(own: dict[str, Path], frodctl: Run, tmp_path: Path) -> None:
    arguments = ["merge", own["base"], own["tiny"], "out", "--basis", own["basis.safetensors"]]
    done = frodctl(*arguments, "--dtype", "float8_e4m3")
    assert done.returncode == 0
    assert "of the update of model.layers." in done.stderr
    assert "survives in 8 bits" in done.stderr
    columns = done.stdout.splitlines()[0].split("\t")
    assert columns[-3:] == ["survival", "least_survival", "survival_distance"]
    checked = ["inspect", own["tiny"], "--base", own["base"], "--basis", own["basis.safetensors"]]
    assert frodctl(*checked, "--merged", "out", "--min-survival", "90%").returncode == 5
    large = frodctl("merge", own["base"], own["large"], "large", *arguments[4:], "--dtype", "float8_e4m3")
    assert "survives" not in large.stderr
    assert ", 56 in 8 bits" in large.stderr


def test_a_killed_merge_is_taken_up_with_what_it_found(own: dict[str, Path], tmp_path: Path) -> None:
    def stop(progress: frodctl.Progress) -> None:
        if progress.total and progress.done > progress.total / 2:
            raise KeyboardInterrupt

    whole = merged(own, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merged(own, tmp_path / "out", progress=stop)
    again = merged(own, tmp_path / "out")
    assert 0 < again.resumed_tensors < 2 * 56 + 18
    assert again.survival == whole.survival
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_values_that_no_number_of_8_bits_can_hold(own: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in own["base"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    shard = next(f for f in base.glob("*.safetensors") if "model.layers.0.self_attn.v_proj.weight" in load_file(f))
    weights = load_file(shard)
    weights["model.layers.0.self_attn.v_proj.weight"][3, 4] = torch.inf
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(frodctl.InvalidInput, match=r"v_proj.weight holds 1 values that are NaN or Inf"):
        merged({**own, "base": base}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"fp8_scales": "block"},
        {"fp8_scales": "row", "dtype": "float8_e4m3"},
        {"dtype": "float8_e4m3", "as_": "lora", "rank": 4},
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], own: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fp8_scales|LoRA"):
        frodctl.merge(own["base"], own["large"], tmp_path / "out", basis=own["basis.safetensors"], **options)

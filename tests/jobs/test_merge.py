"""Merging against the operator that PEFT trained, computed here in float64 from the files alone."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
)

import frodctl
from frodctl.arrays import to_torch
from frodctl.checkpoint import codec, manifest
from frodctl.checkpoint.records import ADAPTER_FILES
from frodctl.errors import InvalidInput, UsageError
from frodctl.jobs.merge import MergeOptions, plan_merge, run_merge
from frodctl.jobs.progress import Progress
from tests import peft_models
from tests.conftest import edit_unseen, snapshot
from tests.jobs.conftest import Case, operators, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def renamed(case: Case, name: str) -> str:
    """A base tensor's name in the merged checkpoint, which for BERT is that of the model with the head."""
    return f"bert.{name}" if case.family == "bert" else name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", peft_models.FAMILIES)
class TestTheOperatorThatWasTrained:
    def test_weights(self, family: str, dtype: torch.dtype, cases: Any, tmp_path: Path) -> None:
        case = cases(family, dtype)
        case.merged(tmp_path / "out")
        ours, theirs, base = tensors(tmp_path / "out"), tensors(case.peft_merged), tensors(case.base)
        expected = operators(case)
        assert len(expected) >= 6
        for name, exact in expected.items():
            found = ours[renamed(case, name)]
            assert found.dtype == dtype
            distance = (found.double() - exact).norm()
            if dtype == torch.float32:
                assert distance <= 1e-6 * exact.norm(), name
            else:
                rounded = exact.to(dtype).double()
                assert distance <= 1.02 * (rounded - exact).norm(), name
                ulp = ULP[dtype] * exact.abs().clamp(min=0.1 * float(exact.square().mean().sqrt()))
                assert ((found.double() - exact).abs() <= 8 * ulp).all(), name
                assert distance <= (theirs[renamed(case, name)].double() - exact).norm(), name
            assert not torch.equal(found, base[name])

    def test_everything_else(self, family: str, dtype: torch.dtype, cases: Any, tmp_path: Path) -> None:
        """Untouched tensors keep their bytes; the head and the biases are the trained ones."""
        case = cases(family, dtype)
        result = case.merged(tmp_path / "out")
        ours, base = tensors(tmp_path / "out"), tensors(case.base)
        theirs = tensors(case.peft_merged)
        weights = operators(case)
        assert {k for k in ours} == {renamed(case, name) for name in base} | set(result.plan.added)
        for name, tensor in ours.items():
            original = name.removeprefix("bert.") if family == "bert" else name
            if original not in weights and name in theirs:
                assert torch.equal(tensor, theirs[name].to(dtype)), name
        if family == "bert":
            assert result.plan.added == ["classifier.bias", "classifier.weight"]
            assert not torch.equal(ours["bert.encoder.layer.0.attention.self.query.bias"],
                                   base["encoder.layer.0.attention.self.query.bias"])  # fmt: skip
        else:
            assert result.plan.added == []

    def test_the_model_runs(self, family: str, dtype: torch.dtype, cases: Any, tmp_path: Path) -> None:
        case = cases(family, dtype)
        case.merged(tmp_path / "out")
        auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
        model, loading = auto.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
        assert model.dtype == dtype
        base = peft_models.logits(peft_models.task_model(family, case.base))
        found = peft_models.logits(model.eval())
        if dtype == torch.float32:
            assert (found - case.logits).abs().max() <= 1e-5
        assert (found - case.logits).norm() < 0.1 * (base - case.logits).norm()
        AutoModel.from_pretrained(tmp_path / "out")
        tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("one two", return_tensors="pt")
        assert tokens["input_ids"].shape[1] >= 2
        if family != "bert":
            ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert ids.shape == (1, 7)


def test_the_forms_and_scales_agree(cases: Any, tmp_path: Path) -> None:
    """In float32 both forms are one operator, and W + Σ s (W' − W) holds for any of them."""
    case = cases("llama", torch.float32)
    base, exact = tensors(case.base), operators(case)
    settings: dict[str, tuple[dict[str, Any], float]] = {
        "delta": ({"form": "delta"}, 1.0),
        "half": ({"scale": 0.5}, 0.5),
        "half-delta": ({"scale": 0.5, "form": "delta"}, 0.5),
        "against": ({"scale": -1.5}, -1.5),
        "twice": ({"scale": 0.75, "also": [(str(case.adapter), 0.5)]}, 1.25),
        "both-ways": ({"form": "delta", "also": [(str(case.adapter), -1.0)]}, 0.0),
    }
    for label, (options, scale) in settings.items():
        case.merged(tmp_path / label, **options)
        found = tensors(tmp_path / label)
        for name, target in exact.items():
            expected = base[name].double() + scale * (target - base[name].double())
            assert (found[name].double() - expected).norm() <= 2e-6 * expected.norm(), (label, name)


def test_scale_0_copies_the_base(cases: Any, tmp_path: Path) -> None:
    case = cases("gpt2", torch.bfloat16)
    result = case.merged(tmp_path / "out", scale=0)
    assert len(result.unchanged) == len(operators(case))
    assert_same_bytes(case.base, tmp_path / "out")


def assert_same_bytes(first: Path, second: Path) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.view(torch.uint8).equal(theirs[name].view(torch.uint8)), name


def test_saved_modules_are_not_scaled_and_it_is_said(cases: Any, tmp_path: Path) -> None:
    case = cases("bert", torch.float32)
    result = case.merged(tmp_path / "out", scale=0.5)
    assert any("unscaled" in warning for warning in result.plan.warnings)
    head = load_file(case.adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(tensors(tmp_path / "out")["classifier.weight"], head)


# Adapters in frodctl's own form, whose V is in a shared-basis file


@pytest.fixture(scope="session")
def based(tmp_path_factory: pytest.TempPathFactory, cases: Any) -> dict[str, Path]:
    """Paths of a base with a −0.0 in it, its basis, and an untrained adapter over it."""
    root = tmp_path_factory.mktemp("based")
    base = root / "base"
    shutil.copytree(cases("llama", torch.bfloat16).base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, :2] = torch.tensor([-0.0, 0.0])
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    basis = root / "basis.safetensors"
    frodctl.decompose(str(base), basis, target_modules="q_proj,down_proj", sparsity=0.05, seed=7)
    write_adapter(root / "adapter", base, basis)
    return {"base": base, "basis": basis, "adapter": root / "adapter"}


def write_adapter(
    folder: Path, base: Path, basis_file: Path, change: float = 0.0, holding_basis: bool = False, **provenance: Any
) -> Path:
    """An adapter as frodctl writes it, with random changes of this relative size."""
    opened = frodctl.open_basis(basis_file)
    metadata = opened.metadata
    generator = torch.Generator().manual_seed(3)
    state = {}
    for record in metadata.modules:
        start = to_torch(opened.tensor(f"lambda.{record.name}"))
        nnz = opened.indices()[record.category].shape[1]
        key = f"base_model.model.{record.name}"
        state[f"{key}.frod_lambda_l"] = start * (1 + change * torch.randn(start.shape, generator=generator))
        state[f"{key}.frod_lambda_s_values"] = change * float(start.mean()) * torch.randn(nnz, generator=generator)
        if holding_basis:
            state[f"{key}.frod_lambda_0"] = start
    for category in metadata.V_digests if holding_basis else ():
        state[f"base_model.frod_V.{category}"] = to_torch(opened.tensor(f"V.{category}"))
        state[f"base_model.frod_s_indices.{category}"] = to_torch(opened.indices()[category]).contiguous()
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    own = {
        "form": "delta",
        "basis": dict(metadata.V_digests),
        "base": {record.name: record.digest for record in metadata.modules},
        "seed": metadata.seed,
        "sparsity": dict(metadata.sparsity),
    } | provenance
    config = {"peft_type": "FROD", "base_model_name_or_path": str(base), "save_projection": True, "frodctl": own}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sign(folder)


def sign(folder: Path) -> Path:
    """Record the digests of the tensors that an adapter of frodctl's form has."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    config["frodctl"].pop("digest", None)
    config["frodctl"]["digests"] = {name: _sha256(tensor) for name, tensor in state.items() if "frod_V" not in name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("holding_basis", [False, True])
def test_an_untrained_adapter_changes_no_byte(holding_basis: bool, based: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], holding_basis=holding_basis)
    basis = {} if holding_basis else {"basis": based["basis"]}
    result = frodctl.merge(str(based["base"]), str(adapter), tmp_path / "out", **basis)
    assert len(result.unchanged) == 6
    assert_same_bytes(based["base"], tmp_path / "out")


@pytest.mark.parametrize("holding_basis", [False, True])
def test_the_delta_form(holding_basis: bool, based: dict[str, Path], tmp_path: Path) -> None:
    """W + W V⁻ᵀ diag(λ)⁻¹ (S + diag(λ' − λ)) Vᵀ in float64, rounded once."""
    adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], 0.1, holding_basis=holding_basis)
    basis = {} if holding_basis else {"basis": based["basis"]}
    frodctl.merge("-", str(adapter), tmp_path / "out", **basis)
    opened = frodctl.open_basis(based["basis"])
    state, base = load_file(adapter / "adapter_model.safetensors"), tensors(based["base"])
    for record in opened.metadata.modules:
        V = to_torch(opened.tensor(f"V.{record.category}")).double()
        start = to_torch(opened.tensor(f"lambda.{record.name}")).double()
        M = torch.diag(state[f"base_model.model.{record.name}.frod_lambda_l"].double() - start)
        rows, columns = opened.indices()[record.category]
        M[rows, columns] += state[f"base_model.model.{record.name}.frod_lambda_s_values"].double()
        W = base[f"{record.name}.weight"].double()
        exact = W + torch.linalg.solve(V, W.T).T / start @ M @ V.T
        found = tensors(tmp_path / "out")[f"{record.name}.weight"].double()
        assert (exact - W).norm() > 0.01 * W.norm()
        assert (found - exact).norm() <= 1.001 * (exact.bfloat16().double() - exact).norm()


class TestWhichBasis:
    """An adapter without V is merged with the basis it names, or not at all."""

    def merge(self, based: dict[str, Path], adapter: Path, out: Path, **options: Any) -> Any:
        return frodctl.merge(str(based["base"]), str(adapter), out, **options)

    def test_none(self, based: dict[str, Path], tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"])
        with pytest.raises(InvalidInput, match=r"give the one that it was trained with \(`basis`\)$"):
            self.merge(based, adapter, tmp_path / "out")

    def test_recomputing_cannot_give_it(self, based: dict[str, Path], tmp_path: Path) -> None:
        """PEFT's routine gives another V than the one whose digest the adapter has."""
        adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], 0.1)
        with pytest.raises(InvalidInput, match="gives another V than the one whose digest"):
            self.merge(based, adapter, tmp_path / "out", recompute_projection=True)
        assert not (tmp_path / "out").exists()

    def test_another(self, based: dict[str, Path], tmp_path: Path) -> None:
        other = tmp_path / "other.safetensors"
        frodctl.decompose(str(based["base"]), other, target_modules="q_proj,down_proj", alpha=0.1)
        with pytest.raises(InvalidInput, match=r"V\.\w+ is not the one"):
            self.merge(based, based["adapter"], tmp_path / "out", basis=other)
        assert not (tmp_path / "out").exists()

    def test_one_without_the_category(self, based: dict[str, Path], tmp_path: Path) -> None:
        other = tmp_path / "other.safetensors"
        frodctl.decompose(str(based["base"]), other, target_modules="q_proj")
        with pytest.raises(InvalidInput, match=r"no V\.mlp_down_proj"):
            self.merge(based, based["adapter"], tmp_path / "out", basis=other, trust_basis=True)

    def test_one_that_is_not_named(self, based: dict[str, Path], tmp_path: Path) -> None:
        adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], 0.1, basis={})
        with pytest.raises(InvalidInput, match="`trust_basis=True`"):
            self.merge(based, adapter, tmp_path / "out", basis=based["basis"])
        self.merge(based, adapter, tmp_path / "out", basis=based["basis"], trust_basis=True)

    def test_one_whose_bytes_were_changed(self, based: dict[str, Path], tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.safetensors"
        data = bytearray(based["basis"].read_bytes())
        place = frodctl.open_basis(based["basis"]).header.tensors["V.mlp_down_proj"][1]
        data[place + 3] ^= 1
        damaged.write_bytes(data)
        adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], 0.1)
        with pytest.raises(InvalidInput, match="damaged"):
            self.merge(based, adapter, tmp_path / "out", basis=damaged)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "damaged.safetensors"]

    def test_an_adapter_of_peft_needs_trust(self, cases: Any, tmp_path: Path) -> None:
        """With PEFT's own V in the basis file the merge is that of the whole adapter."""
        case = cases("llama", torch.float32)
        state = load_file(case.adapter / "adapter_model.safetensors")
        basis = tmp_path / "basis.safetensors"
        frodctl.decompose(str(case.base), basis, target_modules="q_proj,v_proj,up_proj,down_proj")
        content = load_file(basis)
        metadata = json.loads(_metadata(basis)["frodctl"])
        del metadata["digest"]
        for category in metadata["basis"]:
            content[f"V.{category}"] = state[f"base_model.frod_V.{category}"]
            metadata["basis"][category] = _sha256(content[f"V.{category}"])
        save_file(content, basis, {"format": "pt", "frodctl": json.dumps(metadata)})
        lean = tmp_path / "lean"
        shutil.copytree(case.adapter, lean)
        kept = {key: value for key, value in state.items() if not key.startswith(("base_model.frod_",))}
        save_file(kept, lean / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(InvalidInput, match="`trust_basis=True`"):
            frodctl.merge(str(case.base), str(lean), tmp_path / "no", basis=basis)
        frodctl.merge(str(case.base), str(lean), tmp_path / "out", basis=basis, trust_basis=True)
        case.merged(tmp_path / "whole")
        assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def _sha256(tensor: torch.Tensor) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_the_projection_is_what_peft_does(family: str, cases: Any, tmp_path: Path) -> None:
    """An adapter saved without V: on the machine it was trained on the merge is that of the live model."""
    case = cases(family, torch.float32)
    live = peft_models.trained_adapter(tmp_path / "adapter", family, case.base, save_projection=False)
    with pytest.raises(InvalidInput, match="`recompute_projection=True`"):
        frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out")
    result = frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "out", recompute_projection=True)
    assert any("recomputes it here" in warning for warning in result.plan.warnings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert (peft_models.logits(model) - peft_models.logits(live)).abs().max() <= 1e-5


def _lean(case: Any, folder: Path, dtype: torch.dtype, cast: bool = True, **changes: Any) -> torch.Tensor:
    """Train over the base loaded in that dtype, save the adapter without V, and give the live model's logits."""
    model = peft_models.task_model(case.family, case.base).to(dtype)
    config = peft_models.frod_config(case.family, save_projection=False, **changes)
    live = peft_models.train(peft.get_peft_model(model, config, autocast_adapter_dtype=cast))
    live.save_pretrained(folder)
    return peft_models.logits(live)


def test_the_dtype_that_the_base_had_in_training(cases: Any, tmp_path: Path) -> None:
    """A bfloat16 checkpoint, trained in float32: nothing in the adapter tells, so it is said what is taken."""
    case = cases("llama", torch.bfloat16)
    trained = _lean(case, tmp_path / "adapter", torch.float32)

    def error(out: Path, **options: Any) -> float:
        result = frodctl.merge(
            case.base, tmp_path / "adapter", out, recompute_projection=True, dtype="float32", **options
        )
        said = [text for text in result.plan.warnings if "`projection_dtype`" in text]
        assert len(said) == 1
        assert ("float32" if options else "the dtype of the base") in said[0]
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        return float((peft_models.logits(model) - trained).abs().max())

    assert error(tmp_path / "told", projection_dtype="float32") <= 1e-5
    assert error(tmp_path / "guessed") > 1e-3
    with pytest.raises(UsageError, match="projection_dtype"):
        frodctl.merge(case.base, tmp_path / "adapter", tmp_path / "no", projection_dtype="int8")


@pytest.mark.parametrize(
    ("dtype", "options", "found"),
    [
        (torch.bfloat16, {"cast": False}, "BF16"),  # scales as the base
        (torch.bfloat16, {"modules_to_save": ["norm"]}, "BF16"),  # what was trained as a whole as the base
        (torch.float32, {"modules_to_save": ["norm"]}, "F32"),
        (torch.bfloat16, {}, None),
        (torch.float32, {}, None),
    ],
)
def test_what_tells_the_dtype(
    dtype: torch.dtype, options: dict[str, Any], found: str | None, cases: Any, tmp_path: Path
) -> None:
    case = cases("llama", torch.bfloat16)
    trained = _lean(case, tmp_path / "adapter", dtype, **options)
    result = frodctl.merge(
        case.base, tmp_path / "adapter", tmp_path / "out", recompute_projection=True, dtype="float32"
    )
    assert result.plan.sources[0].projection_dtype == found
    if found == "F32":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert (peft_models.logits(model) - trained).abs().max() <= 1e-5


# Adapters in all the shapes that PEFT writes


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.[12]\..*(k|o)_proj"},
        {"layers_to_transform": [0, 2]},
        {"sparse_rate": 0.0},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_kinds_of_adapters(changes: dict[str, Any], cases: Any, tmp_path: Path) -> None:
    base = cases("llama", torch.float32).base
    live = peft_models.trained_adapter(tmp_path / "adapter", "llama", base, **changes)
    frodctl.merge(str(base), str(tmp_path / "adapter"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert (peft_models.logits(model) - peft_models.logits(live)).abs().max() <= 1e-5


def test_trained_biases_of_the_targets_alone(cases: Any, tmp_path: Path) -> None:
    """The second of PEFT's key forms: base_layer.bias."""
    base = cases("bert", torch.float32).base
    live = peft_models.trained_adapter(tmp_path / "adapter", "bert", base, bias="frod_only")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith(".base_layer.bias") for key in keys)
    frodctl.merge(str(base), str(tmp_path / "adapter"), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert (peft_models.logits(model) - peft_models.logits(live)).abs().max() <= 1e-5


def test_a_named_adapter_a_pickled_one_and_scales_in_the_base_dtype(cases: Any, tmp_path: Path) -> None:
    base = cases("llama", torch.bfloat16).base
    model = peft.get_peft_model(
        peft_models.task_model("llama", base), peft_models.frod_config("llama"), adapter_name="math",
        autocast_adapter_dtype=False,
    )  # fmt: skip
    peft_models.train(model).save_pretrained(tmp_path / "named")
    state = load_file(tmp_path / "named" / "math" / "adapter_model.safetensors")
    assert state["base_model.model.model.layers.0.self_attn.q_proj.frod_lambda_l"].dtype == torch.bfloat16
    frodctl.merge(str(base), str(tmp_path / "named"), tmp_path / "one")
    frodctl.merge(str(base), str(tmp_path / "named"), tmp_path / "two", adapter_name="math")
    with pytest.raises(UsageError, match="no adapter called code; there are: math"):
        frodctl.merge(str(base), str(tmp_path / "named"), tmp_path / "no", adapter_name="code")
    shutil.copytree(tmp_path / "named" / "math", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "pickled" / "adapter_model.bin")
    frodctl.merge(str(base), str(tmp_path / "pickled" / "adapter_model.bin"), tmp_path / "three")
    for other in ("two", "three"):
        assert_same_bytes(tmp_path / "one", tmp_path / other)
    shutil.copytree(tmp_path / "named" / "math", tmp_path / "named" / "code")
    with pytest.raises(UsageError, match="several adapters here"):
        frodctl.merge(str(base), str(tmp_path / "named"), tmp_path / "no")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_without_or_with_another_prefix(family: str, cases: Any, tmp_path: Path) -> None:
    """A base saved as the bare model, and one whose names have a prefix that the adapter's lack."""
    case = cases(family, torch.float32)
    prefix = {"llama": "model.", "gpt2": "transformer."}[family]
    stored = tensors(case.base)
    expected = operators(case)
    for label, rename in (
        ("bare", lambda name: name.removeprefix(prefix)),
        ("wrapped", lambda name: f"wrapped.{name}"),
    ):
        base = tmp_path / label
        shutil.copytree(case.base, base)
        save_file({rename(name): tensor for name, tensor in stored.items()}, base / "model.safetensors")
        frodctl.merge(str(base), str(case.adapter), tmp_path / f"{label}-out")
        found = tensors(tmp_path / f"{label}-out")
        for name, exact in expected.items():
            assert (found[rename(name)].double() - exact).norm() <= 1e-6 * exact.norm()
    both = tmp_path / "both"
    shutil.copytree(case.base, both)
    twice = {f"{tower}.{name}": tensor.clone() for tower in ("a", "b") for name, tensor in stored.items()}
    save_file(twice, both / "model.safetensors")
    with pytest.raises(InvalidInput, match="matches nothing, or several"):
        frodctl.merge(str(both), str(case.adapter), tmp_path / "no")


def test_a_pickled_base(cases: Any, tmp_path: Path) -> None:
    """pytorch_model.bin, its head one storage with the embedding: the same weights come out, as safetensors."""
    case = cases("gpt2", torch.bfloat16)
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    state = tensors(base)
    (base / "model.safetensors").unlink()
    head = state["transformer.wte.weight"]
    torch.save(state | {"lm_head.weight": head}, base / "pytorch_model.bin")
    frodctl.merge(str(base), str(case.adapter), tmp_path / "out")
    case.merged(tmp_path / "expected")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert torch.equal(found.pop("lm_head.weight"), head)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_square_conv1d_weights_without_a_config(cases: Any, tmp_path: Path) -> None:
    """Nothing but PEFT's flag tells that they are stored transposed."""
    base = cases("gpt2", torch.float32).base
    live = peft_models.trained_adapter(tmp_path / "adapter", "gpt2", base, target_modules=["attn.c_proj"])
    merged = live.merge_and_unload().state_dict()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "model.safetensors", bare)
    frodctl.merge(str(bare), str(tmp_path / "adapter"), tmp_path / "out")
    found = tensors(tmp_path / "out")
    for layer in range(3):
        name = f"transformer.h.{layer}.attn.c_proj.weight"
        assert (found[name] - merged[name]).norm() <= 1e-6 * merged[name].norm()


def test_the_head_that_peft_trains_unasked(tmp_path: Path) -> None:
    """DistilBERT's pre_classifier ends with "classifier", which is how PEFT reads modules_to_save."""
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=32)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    frod = peft.FrodConfig(task_type="SEQ_CLS", target_modules=["q_lin", "lin1"], progressbar=False)
    live = peft_models.train(peft.get_peft_model(model, frod))
    live.save_pretrained(tmp_path / "adapter")
    result = frodctl.merge(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "out")
    assert result.plan.added == [
        f"{name}.{kind}" for name in ("classifier", "pre_classifier") for kind in ("bias", "weight")
    ]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == 3
    assert (peft_models.logits(merged) - peft_models.logits(live)).abs().max() <= 1e-5


def test_a_head_of_another_size(cases: Any, tmp_path: Path) -> None:
    """A base that has a head for other labels already."""
    case = cases("bert", torch.float32)
    case.merged(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    live = peft_models.train(peft.get_peft_model(model, peft_models.frod_config("bert")))
    live.save_pretrained(tmp_path / "adapter")
    result = frodctl.merge(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "out")
    assert result.plan.added == []
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == 5
    assert (peft_models.logits(merged) - peft_models.logits(live)).abs().max() <= 1e-5


@pytest.mark.parametrize("front", ["date: 2024-02-30", "license: [", "- 1", "x: " + "[" * 3000])
def test_a_card_that_cannot_be_read_stops_nothing(front: str, cases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(cases("gpt2", torch.float32).base, base)
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    frodctl.merge(str(base), str(cases("gpt2", torch.float32).adapter), tmp_path / "out")
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("task", "tag"),
    [("SequenceClassification", "text-classification"), ("TokenClassification", "token-classification"),
     ("QuestionAnswering", "question-answering")],
)  # fmt: skip
@pytest.mark.parametrize("ours", [True, False])
def test_another_kind_of_model(task: str, tag: str, ours: bool, minilm: Path, tmp_path: Path) -> None:
    """A sentence encoder with a head is none any more: its card and files do not say so."""
    base = tmp_path / "base"
    shutil.copytree(minilm, base)
    (base / "README.md").write_text("---\nlicense: mit\npipeline_tag: sentence-similarity\n---\n")
    (base / "config_sentence_transformers.json").write_text("{}")
    (base / "vocabulary").mkdir()
    (base / "vocabulary" / "words.txt").write_text("kept")
    assert (base / "modules.json").is_file()
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(base)
    if ours:
        frodctl.decompose(base, tmp_path / "b.safetensors", target_modules="query")
        head = "qa_outputs" if task == "QuestionAnswering" else "classifier"
        frodctl.save_adapter(
            frodctl.attach(model, tmp_path / "b.safetensors", modules_to_save=[head]), tmp_path / "adapter"
        )
    else:
        kind = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}.get(task, "QUESTION_ANS")
        config = peft.FrodConfig(target_modules=["query"], task_type=kind, progressbar=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline_tag: {tag}\n" in card
    assert "license: mit" in card
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not found & {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    assert not any(name.startswith(("1_", "2_")) for name in found)
    assert {"vocabulary/words.txt", "tokenizer.json", "config.json"} <= found
    _, loading = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]


def test_a_head_of_an_unknown_kind_has_no_tag(tmp_path: Path) -> None:
    """The base's tag is the base's; what a class of one's own is for, nobody knows."""
    base = peft_models.save_base(tmp_path / "base", "bert", torch.float32)
    (base / "README.md").write_text("---\npipeline_tag: sentence-similarity\n---\n")
    model = transformers.BertForNextSentencePrediction.from_pretrained(base)
    frodctl.decompose(base, tmp_path / "b.safetensors", target_modules="query")
    adapted = frodctl.attach(model, tmp_path / "b.safetensors", modules_to_save=["cls"])
    frodctl.save_adapter(adapted, tmp_path / "adapter")
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert "pipeline_tag" not in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(model).__name__]


# The folder


def test_shards_and_index(cases: Any, tmp_path: Path) -> None:
    case = cases("llama", torch.float32)
    case.merged(tmp_path / "one")
    result = case.merged(tmp_path / "many", max_shard_size=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    stored = {file: load_file(tmp_path / "many" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in stored[file]}
    sizes = {file: sum(t.nbytes for t in content.values()) for file, content in stored.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 20_000 or len(stored[file]) == 1 for file, size in sizes.items())
    assert result.output_bytes == sum((tmp_path / "many" / file).stat().st_size for file in files)
    assert_same_bytes(tmp_path / "one", tmp_path / "many")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_a_part_of_a_diffusers_pipeline_keeps_diffusers_file_names(cases: Any, tmp_path: Path) -> None:
    case, pipeline = cases("llama", torch.float32), tmp_path / "pipeline"
    part = shutil.copytree(case.base, pipeline / "transformer")
    (pipeline / "model_index.json").write_text('{"transformer": ["diffusers", "Transformer2DModel"]}')
    (part / "model.safetensors").rename(part / "diffusion_pytorch_model.safetensors")
    config = json.loads((part / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
    (part / "config.json").write_text(json.dumps(config))
    case.merged(tmp_path / "alone")
    for size, name in (("5GB", "safetensors"), (20_000, "safetensors.index.json")):
        out = tmp_path / str(size)
        frodctl.merge(pipeline, case.adapter, out, subfolder="transformer", max_shard_size=size)
        assert (out / f"diffusion_pytorch_model.{name}").is_file()
        assert not list(out.glob("model*"))
        assert_same_bytes(tmp_path / "alone", out)
    with pytest.raises(InvalidInput, match="no weights here, but in transformer: choose one with `subfolder`"):
        frodctl.merge(pipeline, case.adapter, tmp_path / "out")


def test_a_sharded_base_and_an_adapter_over_it(example: Path, tmp_path: Path) -> None:
    """The example: three shards become one file, which loads and speaks."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(example, dtype="auto"), peft_models.frod_config("llama")
    )
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "adapter")
    frodctl.merge(str(example), str(tmp_path / "adapter"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = merged.generate(**tokenizer("The list", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ids[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str, cases: Any, tmp_path: Path) -> None:
    case = cases("llama", torch.float32)
    case.merged(tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    found, base, exact = tensors(tmp_path / "out"), tensors(case.base), operators(case)
    for name, tensor in found.items():
        assert tensor.dtype == wanted
        if name not in exact:
            assert torch.equal(tensor, base[name].to(wanted))
        else:
            assert (tensor.double() - exact[name]).norm() <= 1.001 * (exact[name].to(wanted) - exact[name]).norm()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_the_rest_of_the_folder(minilm: Path, tmp_path: Path) -> None:
    """sentence-transformers' folders come along; weights, caches, other adapters and the old card do not."""
    base = tmp_path / "base"
    shutil.copytree(minilm, base)
    (base / "modeling_custom.py").write_text("raise SystemExit('never run')")
    (base / "LICENSE").write_text("MIT")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nold words")
    for name in ("pytorch_model.bin", "tf_model.h5", "adapter_config.json", "optimizer.pt", ".cache/x", "onnx/m.onnx",
                 "onnx/config.json", "checkpoint-5/config.json", "runs/events"):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    model = peft.get_peft_model(
        AutoModel.from_pretrained(minilm), peft.FrodConfig(target_modules=["query"], progressbar=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    frodctl.merge(str(base), str(tmp_path / "adapter"), tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    originals = {str(p.relative_to(minilm)) for p in minilm.rglob("*") if p.is_file() and p.name[0] != "."}
    assert found == originals | {"modeling_custom.py", "LICENSE", "chat_template.jinja", "README.md", manifest.FILE}
    for name in found - {"README.md", "model.safetensors", "config.json", manifest.FILE}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "old words" not in card
    assert f"frodctl {frodctl.__version__}" in card
    assert str(tmp_path) not in card


# Resuming, checked by digests


def stopped(case: Case, out: Path, share: float, **options: Any) -> None:
    """A merge that ends after this share of the arithmetic; 1 for all but the last reading."""

    def stop(progress: Progress) -> None:
        if progress.text.startswith("reading") or (progress.total and progress.done >= share * progress.total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.merged(out, progress=stop, **options)


def private(case: Case, root: Path) -> Case:
    """The case with a base and an adapter of its own, to be changed."""
    shutil.copytree(case.base, root / "base")
    shutil.copytree(case.adapter, root / "adapter")
    return replace(case, base=root / "base", adapter=root / "adapter")


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"form": "delta"}], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_base_edited_in_secret_is_not_mixed_in(
    name: str, options: dict[str, Any], cases: Any, tmp_path: Path
) -> None:
    """A targeted weight and one that is copied, changed with size and time kept: as if they had always been so."""
    case = private(cases("llama", torch.float32), tmp_path)
    stopped(case, tmp_path / "out", 2, **options)
    weights = case.base / "model.safetensors"
    edit_unseen(weights, codec.read_header(weights).tensors[name][1] + 1)
    result = case.merged(tmp_path / "out", **options)
    assert result.resumed_tensors == len(tensors(case.base)) - 1
    case.merged(tmp_path / "whole", **options)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["adapter", "basis"])
def test_what_was_trained_edited_in_secret_is_not_mixed_in(
    kind: str, based: dict[str, Path], cases: Any, tmp_path: Path
) -> None:
    """What an earlier run finished came from another adapter or basis, of the same size and time."""
    adapter = write_adapter(tmp_path / "adapter", based["base"], based["basis"], 0.1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["frodctl"]["digests"]  # as earlier versions wrote it; else the edit is refused
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    basis = tmp_path / "basis.safetensors"
    shutil.copy(based["basis"], basis)
    case = replace(cases("llama", torch.bfloat16), base=based["base"], adapter=adapter)
    stopped(case, tmp_path / "out", 2, basis=basis)
    file = adapter / "adapter_model.safetensors" if kind == "adapter" else basis
    places = codec.read_header(file).tensors
    name = next(n for n in places if n.endswith("frod_lambda_l") or n.startswith("tau."))
    edit_unseen(file, places[name][1] + 1)
    result = case.merged(tmp_path / "out", basis=basis)
    assert result.resumed_tensors == 0
    case.merged(tmp_path / "whole", basis=basis)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


def test_a_projection_that_is_recomputed_goes_with_all_its_weights(cases: Any, tmp_path: Path) -> None:
    """V depends on every weight of the category: one changed in secret changes what is made of the others."""
    case = private(cases("llama", torch.float32), tmp_path)
    state = load_file(case.adapter / "adapter_model.safetensors")
    lean = {key: value for key, value in state.items() if not key.startswith("base_model.frod_V")}
    save_file(lean, case.adapter / "adapter_model.safetensors", {"format": "pt"})
    stopped(case, tmp_path / "out", 2, recompute_projection=True)
    weights = case.base / "model.safetensors"
    place = codec.read_header(weights).tensors["model.layers.1.mlp.up_proj.weight"][1] + 2
    edit_unseen(weights, place)
    case.merged(tmp_path / "out", recompute_projection=True)
    case.merged(tmp_path / "whole", recompute_projection=True)
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 2])
def test_a_journal_with_an_invalid_tail_stops_no_rerun(share: float, cases: Any, tmp_path: Path) -> None:
    case = cases("llama", torch.bfloat16)
    stopped(case, tmp_path / "out", share)
    journal = next((tmp_path / "out.partial").glob("*/journal.jsonl"))
    journal.write_bytes(journal.read_bytes() + b'\n[1]\n{"a": 2}\n\xff\xfe\x00')
    result = case.merged(tmp_path / "out")
    assert result.resumed_tensors >= (len(result.plan.dtypes) if share > 1 else 1)
    case.merged(tmp_path / "whole")
    assert_same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("link", ["out.partial", "KEY", "KEY/tree", "KEY/tree/model.safetensors", "KEY/journal.jsonl"])
def test_nothing_is_written_through_links_in_unfinished_work(link: str, cases: Any, tmp_path: Path) -> None:
    case = cases("llama", torch.bfloat16)
    stopped(case, tmp_path / "out", 0.5)
    key = next((tmp_path / "out.partial").iterdir()).name
    place = tmp_path / (link if link == "out.partial" else f"out.partial/{link.replace('KEY', key)}")
    victim = tmp_path / "victim"
    place.rename(victim)
    place.symlink_to(victim)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "out.partial"))):
        case.merged(tmp_path / "out")
    assert snapshot(tmp_path) == before


# Where output may be


def test_the_plan_of_a_dry_run_is_checked_as_it_runs(cases: Any, tmp_path: Path) -> None:
    case = cases("llama", torch.bfloat16)
    out = tmp_path / "folder"
    plans = {
        force: plan_merge(case.base, case.adapter, out, MergeOptions.of(force=force), dry_run=True)
        for force in (False, True)
    }
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref")
    (out / "thesis.txt").write_text("precious")
    before = snapshot(tmp_path)
    for plan in plans.values():  # nothing is promised of `force`
        with pytest.raises(UsageError, match=r"\.git/HEAD, thesis\.txt"):
            run_merge(plan)
        assert snapshot(tmp_path) == before
    for place in (case.base, case.adapter, case.base / "inner"):
        with pytest.raises(UsageError, match="which is read"):
            run_merge(plan_merge(case.base, case.adapter, place, MergeOptions.of(force=True), dry_run=True))
    remote = replace(plans[True], checkpoint=replace(plans[True].checkpoint, root=None))
    with pytest.raises(UsageError, match="headers alone"):
        run_merge(remote)
    shutil.rmtree(out)
    run_merge(plans[False])
    assert_same_bytes_but_targets(case, out)


def assert_same_bytes_but_targets(case: Case, out: Path) -> None:
    ours, base, targets = tensors(out), tensors(case.base), operators(case)
    assert all(torch.equal(ours[name], tensor) for name, tensor in base.items() if name not in targets)


def inputs(kind: str, root: Path, based: dict[str, Path]) -> dict[str, Path]:
    """Base, adapter and basis below ``root / "in"``, named as folders or as files, or all of links into ``root``."""
    for name in ("base", "adapter"):
        shutil.copytree(based[name], root / "in" / name)
    shutil.copy(based["basis"], root / "in" / "basis.safetensors")
    found = {name: root / "in" / name for name in ("base", "adapter")} | {"basis": root / "in" / "basis.safetensors"}
    if kind == "files":
        return found | {"base": found["base"] / "model.safetensors", "adapter": found["adapter"] / ADAPTER_FILES[1]}
    for file in [*found["base"].iterdir(), *found["adapter"].iterdir()] if kind == "links" else ():
        target = root / "cache" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        file.symlink_to(target)
    return found


@pytest.mark.parametrize("kind", ["folders", "files", "links"])
def test_no_path_to_an_input_is_an_output(
    kind: str, based: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to name a folder or a file of base, adapter and basis, what is above them and what is in them."""
    given = inputs(kind, tmp_path, based)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    outputs = [tmp_path, tmp_path / "in", work / "..", *given.values()]
    outputs += [given[name] / inner for name in ("base", "adapter") for inner in ("inner", "model.safetensors")]
    outputs += [tmp_path / "cache", tmp_path / "cache" / "base", tmp_path / "cache" / "adapter"] * (kind == "links")
    for number, path in enumerate([path for path in outputs if path.exists()]):
        (work / f"link{number}").symlink_to(path)
        outputs += [work / f"link{number}", work / f"link{number}" / "." / ".."]
        if path.is_file():
            os.link(path.resolve(), work / f"hard{number}")
            outputs.append(work / f"hard{number}")
    outputs += [Path(os.path.relpath(path, work)) for path in outputs]
    before = snapshot(tmp_path)
    for out, force in itertools.product(outputs, (False, True)):
        with pytest.raises(UsageError):
            frodctl.merge(given["base"], given["adapter"], out, basis=given["basis"], force=force)
    assert snapshot(tmp_path) == before


class TestForce:
    """What --force may replace, on the real thing; every kind of file is in tests/checkpoint/test_manifest.py."""

    def test_an_earlier_merge(self, cases: Any, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        case.merged(tmp_path / "out", max_shard_size=20_000)
        case.merged(tmp_path / "out", force=True)
        case.merged(tmp_path / "clean")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "clean").iterdir()}
        assert_same_bytes(tmp_path / "out", tmp_path / "clean")
        listed = json.loads((tmp_path / "out" / manifest.FILE).read_text())["files"]
        sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != manifest.FILE}
        assert listed == sizes

    def test_one_of_a_version_without_a_manifest(self, cases: Any, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        case.merged(tmp_path / "out", max_shard_size=20_000)
        (tmp_path / "out" / manifest.FILE).unlink()
        case.merged(tmp_path / "out", force=True)
        assert list(manifest.foreign(tmp_path / "out")) == []

    def test_a_checkpoint_of_save_pretrained(self, cases: Any, minilm: Path, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        AutoModelForCausalLM.from_pretrained(case.base).save_pretrained(tmp_path / "out", max_shard_size="20KB")
        AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "out")
        case.merged(tmp_path / "out", force=True)
        assert list(manifest.foreign(tmp_path / "out")) == []

    @pytest.mark.parametrize(
        "name", [".git/HEAD", "sub/a.docx", "train.py", "optimizer.pt", "checkpoint-1/config.json"]
    )
    def test_what_somebody_else_put_there(self, name: str, cases: Any, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        case.merged(tmp_path / "out")
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("precious")
        before = snapshot(tmp_path)
        with pytest.raises(UsageError, match=re.escape(name)):
            case.merged(tmp_path / "out", force=True)
        assert snapshot(tmp_path) == before

    def test_what_somebody_puts_there_during_the_run(self, cases: Any, tmp_path: Path) -> None:
        case = cases("llama", torch.bfloat16)
        case.merged(tmp_path / "out")

        def appear(progress: Progress) -> None:
            (tmp_path / "out" / "notes.txt").write_text("precious")

        with pytest.raises(UsageError, match=r"notes\.txt"):
            case.merged(tmp_path / "out", force=True, progress=appear)
        assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
        (tmp_path / "out" / "notes.txt").unlink()
        assert case.merged(tmp_path / "out", force=True).resumed_tensors == len(tensors(case.base))

    def test_the_manifest_is_not_copied_on(self, cases: Any, tmp_path: Path) -> None:
        """A merge over a merge has its own, and says what it is as before."""
        case = cases("llama", torch.float32)
        case.merged(tmp_path / "one", scale=0)
        frodctl.merge(tmp_path / "one", case.adapter, tmp_path / "two", max_shard_size=20_000)
        listed = json.loads((tmp_path / "two" / manifest.FILE).read_text())["files"]
        assert "model.safetensors.index.json" in listed
        assert manifest.FILE not in listed
        assert frodctl.inspect(tmp_path / "two").as_dict()["targets"][0]["kind"] == "checkpoint"


def test_a_link_to_blobs_of_nobody_is_not_copied(cases: Any, tmp_path: Path) -> None:
    """Of a base named as a folder, and as a file; ``../../blobs`` is the Hub's in the Hub's cache alone."""
    case = private(cases("llama", torch.float32), tmp_path / "work")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("secret")
    (case.base / "notes.txt").symlink_to("../../blobs/x")
    (case.base / "more.txt").symlink_to(tmp_path / "blobs" / "x")
    for number, base in enumerate((case.base, case.base / "model.safetensors")):
        result = frodctl.merge(base, case.adapter, tmp_path / str(number))
        assert result.output.is_dir()
        assert not {"notes.txt", "more.txt"} & {path.name for path in result.output.iterdir()}

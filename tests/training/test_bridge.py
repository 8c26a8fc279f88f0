"""PEFT's own FRoD model with the V that was trained, whatever V this machine would compute."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.frod import model as frod_model
from peft.tuners.frod.layer import FrodLayer

import frodctl
import frodctl.training
from frodctl.arrays import to_torch
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.training import peft as bridge
from tests import peft_models
from tests.training.conftest import Cases, batch

#: PEFT's routine as it is on this machine.
ROUTINE = frod_model._projection_from_weights


@pytest.fixture
def no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(frod_model, "_projection_from_weights", refuse)


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which half of V's columns have the other sign."""

    def flipped(matrices: list[torch.Tensor], alpha: float) -> torch.Tensor:
        V = ROUTINE(matrices, alpha)
        V[:, ::2] *= -1
        return V

    monkeypatch.setattr(frod_model, "_projection_from_weights", flipped)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_a_model_from_a_basis_file(family: str, cases: Cases, tmp_path: Path, no_decomposition: None) -> None:
    case = cases(family)
    model = bridge.get_peft_model(case.model(), case.basis)
    assert isinstance(model, peft.PeftModel)
    opened = frodctl.open_basis(case.basis)
    for category, indices in opened.indices().items():
        assert torch.equal(model.base_model.frod_V[category]["default"], to_torch(opened.tensor(f"V.{category}")))
        assert torch.equal(model.base_model.frod_s_indices[category]["default"], to_torch(indices))
    assert error(peft_models.logits(model.eval()), peft_models.logits(case.model())) <= 1e-4
    assert max(bridge.check(model).values()) <= 1e-6
    trained = peft_models.logits(peft_models.train(model))
    model.save_pretrained(tmp_path / "adapter")
    frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "merged")
    loaded = bridge.load(case.model(), tmp_path / "adapter")
    if family != "bert":  # whose head is not in this adapter, but in each model
        assert error(peft_models.logits(loaded.eval()), trained) <= 1e-6


@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_peft_s_adapter(family: str, cases: Cases, tmp_path: Path, no_decomposition: None) -> None:
    case = cases(family)
    theirs = bridge.get_peft_model(case.model(), case.basis, **options(family))
    trained = peft_models.logits(peft_models.train(theirs))
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = bridge.load(case.model(), tmp_path / "adapter")
    assert error(peft_models.logits(loaded.eval()), trained) <= 1e-6
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_u_is_the_one_that_peft_derives(family: str, dtype: torch.dtype, cases: Cases) -> None:
    """It solves with V for every layer; here V is inverted once."""
    case = cases(family, dtype)
    model = bridge.get_peft_model(case.model(), case.basis)
    peft_models.logits(model)  # U is derived
    layers = [module for module in model.modules() if isinstance(module, FrodLayer)]
    assert layers
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for layer in layers:
        weight, V = layer.get_base_layer().weight, layer.frod_V["default"]
        U, scales = layer._calculate_frod_u_and_lambda(V, weight.T if layer.fan_in_fan_out else weight)
        assert error(layer.frod_lambda_l["default"].detach(), scales.to(dtype)) <= 1e-6 + rounding / 8
        assert error(layer.frod_U["default"].float(), U.to(dtype).float()) <= 1e-6 + rounding / 8


def u_in_memory(model: torch.nn.Module) -> int:
    """In how many layers of a hundred there is a U."""
    layers = [module for module in model.modules() if isinstance(module, FrodLayer)]
    assert layers
    return sum(len(list(layer.frod_U.buffers())) for layer in layers) * 100 // len(layers)


class TestWhenUIsDerived:
    """At the first forward pass, whatever that is; before it the model is as any other."""

    def model(self, cases: Cases, dtype: torch.dtype = torch.float32) -> Any:
        case = cases("llama", dtype)
        found = bridge.get_peft_model(case.model(), case.basis)
        assert u_in_memory(found) == 0
        return found

    def test_first_use(self, cases: Cases) -> None:
        model = self.model(cases).eval()
        expected = peft_models.logits(cases("llama").model())
        assert error(peft_models.logits(model), expected) <= 1e-4
        assert u_in_memory(model) == 100
        assert torch.equal(peft_models.logits(model), peft_models.logits(model))

    def test_inference_before_training(self, cases: Cases) -> None:
        model = self.model(cases)
        with torch.inference_mode():
            model(**batch("llama"))
        model(**batch("llama")).loss.backward()
        assert max(bridge.check(model).values()) <= 1e-6

    def test_autocast_does_not_round_it(self, cases: Cases) -> None:
        model = self.model(cases)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch("llama"))
        assert u_in_memory(model) == 100
        assert max(bridge.check(model).values()) <= 1e-6

    @pytest.mark.filterwarnings("ignore")
    def test_compiled(self, cases: Cases) -> None:
        model = self.model(cases)
        expected = peft_models.logits(cases("llama").model())
        compiled = torch.compile(model, backend="aot_eager").eval()
        assert error(peft_models.logits(compiled), expected) <= 1e-4
        assert error(peft_models.logits(compiled), expected) <= 1e-4

    def test_a_copy_derives_its_own(self, cases: Cases) -> None:
        model = self.model(cases).eval()
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for layer in copied.modules():
                if isinstance(layer, FrodLayer):
                    layer.get_base_layer().weight.mul_(-1)
        peft_models.logits(model)
        assert u_in_memory(copied) == 0
        peft_models.logits(copied)
        pairs = [(a, b) for a, b in zip(model.modules(), copied.modules(), strict=True) if isinstance(a, FrodLayer)]
        assert all(torch.equal(a.frod_U["default"], -b.frod_U["default"]) for a, b in pairs)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_moving_to_a_gpu(self, cases: Cases) -> None:
        model = self.model(cases).eval().cuda()
        assert u_in_memory(model) == 100
        assert all(layer.frod_U["default"].is_cuda for layer in model.modules() if isinstance(layer, FrodLayer))
        assert error(peft_models.logits(model.cpu()), peft_models.logits(cases("llama").model())) <= 1e-4

    def test_another_dtype(self, cases: Cases) -> None:
        model = self.model(cases).double().eval()
        assert error(peft_models.logits(model), peft_models.logits(cases("llama").model().double())) <= 1e-4
        assert max(bridge.check(model).values()) <= 1e-6

    def test_it_belongs_to_the_base_though_another_adapter_is_merged(self, cases: Cases) -> None:
        model = self.model(cases)
        model.add_adapter("second", model.peft_config["default"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lambda_l.second"):
                    parameter.mul_(1.5)
        expected = bridge.check(copy.deepcopy(model))
        model.merge_adapter(["second"])
        assert u_in_memory(model) == 100  # of the second alone
        assert all(layer.frod_U["default"].numel() for layer in model.modules() if isinstance(layer, FrodLayer))
        model.unmerge_adapter()
        assert bridge.check(model) == pytest.approx(expected, abs=1e-6)

    def test_scales_set_before_it_stay(self, cases: Cases) -> None:
        model = self.model(cases, dtype=torch.bfloat16)
        scales = {name: p for name, p in model.named_parameters() if name.endswith("lambda_l.default")}
        with torch.no_grad():
            for parameter in scales.values():
                parameter.mul_(1.5)
        expected = {name: parameter.clone() for name, parameter in scales.items()}
        peft_models.logits(model)
        assert expected
        assert all(torch.equal(scales[name], before) for name, before in expected.items())

    def test_unloading_and_deleting(self, cases: Cases) -> None:
        expected = peft_models.logits(cases("llama").model())
        merged = self.model(cases).merge_and_unload().eval()
        assert error(peft_models.logits(merged), expected) <= 1e-4
        model = self.model(cases)
        model.delete_adapter("default")
        assert not any("default" in layer.frod_U for layer in model.modules() if isinstance(layer, FrodLayer))

    def test_loaded(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        trained = case.trained()
        frodctl.save_adapter(trained, tmp_path / "adapter")
        model = bridge.load(case.model(), tmp_path / "adapter", case.basis).eval()
        assert u_in_memory(model) == 0
        assert error(peft_models.logits(model), peft_models.logits(trained.eval())) <= 1e-5


def options(family: str) -> dict[str, Any]:
    return {"task_type": "SEQ_CLS", "bias": "all"} if family == "bert" else {}


def test_an_adapter_that_peft_loads_wrongly(cases: Cases, tmp_path: Path, another_machine: None) -> None:
    case = cases("llama")
    with pytest.MonkeyPatch.context() as here:
        here.setattr(frod_model, "_projection_from_weights", ROUTINE)
        trained = peft_models.logits(peft_models.trained_adapter(tmp_path / "adapter", "llama", case.base))
    wrong = peft.PeftModel.from_pretrained(case.model(), tmp_path / "adapter").eval()
    assert error(peft_models.logits(wrong), trained) > 0.1
    distances = bridge.check(wrong)
    assert min(distances.values()) > 1
    assert sorted(bridge.repair(wrong)) == sorted(distances)
    assert error(peft_models.logits(wrong), trained) <= 1e-6
    assert bridge.repair(wrong) == []
    loaded = bridge.load(case.model(), tmp_path / "adapter").eval()
    assert error(peft_models.logits(loaded), trained) <= 1e-6
    assert bridge.repair(loaded) == []


@pytest.mark.parametrize("self_contained", [False, True])
@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_frodctl_s_adapter(
    family: str, self_contained: bool, cases: Cases, tmp_path: Path, no_decomposition: None
) -> None:
    case = cases(family)
    model = case.trained()
    frodctl.save_adapter(model, tmp_path / "adapter", self_contained=self_contained)
    loaded = bridge.load(case.model(), tmp_path / "adapter", None if self_contained else case.basis, is_trainable=True)
    assert error(peft_models.logits(loaded.eval()), peft_models.logits(model.eval())) <= 1e-5
    assert any(p.requires_grad for p in loaded.parameters())


def test_refusals(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama")
    frodctl.save_adapter(case.trained(), tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere" / "adapter")
    config = json.loads((tmp_path / "elsewhere/adapter/adapter_config.json").read_text())
    config["frodctl"].pop("digest")
    config["frodctl"]["basis_file"] = "nowhere"
    (tmp_path / "elsewhere/adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="does not hold its basis"):
        bridge.load(case.model(), tmp_path / "elsewhere" / "adapter")
    other = tmp_path / "other.safetensors"
    frodctl.decompose(str(case.base), other, target_modules="all-linear", alpha=0.1)
    with pytest.raises(InvalidInput, match="is not the one that"):
        bridge.load(case.model(), tmp_path / "adapter", other)
    with pytest.raises(InvalidInput, match="has no such module"):
        bridge.get_peft_model(cases("gpt2").model(), case.basis)


@pytest.mark.parametrize(("field", "value"), [("sparse_rate", "x"), ("target_modules", {"a": 1}), ("sparse_rate", 2)])
def test_a_config_that_peft_cannot_take(field: str, value: Any, cases: Cases, tmp_path: Path) -> None:
    case = cases("llama")
    frodctl.save_adapter(case.trained(), tmp_path / "adapter", self_contained=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(InvalidInput, match="adapter"):
        bridge.load(case.model(), tmp_path / "adapter")


class TestAnotherPeft:
    """One whose internals moved is refused, not worked with."""

    def test_without_the_methods(self, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(frod_model.FrodModel, "_init_frod_projections")
        monkeypatch.delitem(sys.modules, "frodctl.training.peft_layers", raising=False)
        monkeypatch.delattr(frodctl.training, "peft_layers", raising=False)
        with pytest.raises(FrodctlError, match=r"as in 0\.21: pip install 'frodctl\[peft\]'"):
            bridge.get_peft_model(cases("llama").model(), cases("llama").basis)

    def test_that_decomposes_elsewhere(self, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = frod_model.FrodModel._init_frod_projections
        monkeypatch.setattr(
            frod_model.FrodModel, "_pre_injection_hook", lambda self, _, config, name: theirs(self, config, name)
        )
        with pytest.raises(FrodctlError, match="in another way"):
            bridge.get_peft_model(cases("llama").model(), cases("llama").basis)


@pytest.mark.parametrize("model", [None, 7, "nope", [], {}])
def test_what_is_no_model(model: Any, cases: Cases, tmp_path: Path) -> None:
    case = cases("llama")
    calls: list[Any] = [
        lambda: bridge.get_peft_model(model, case.basis),
        lambda: bridge.load(model, tmp_path),
        lambda: bridge.check(model),
        lambda: bridge.repair(model),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="`model`"):
            call()

"""With PEFT's V, λ', S and pattern the layer is PEFT's operator, and has its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.frod.layer import FrodLayer
from safetensors.torch import save_file

import frodctl
from frodctl.arrays import from_torch
from frodctl.checkpoint import names, stream
from frodctl.formats.basis_file import BasisMetadata, ModuleRecord, file_metadata
from frodctl.training.layer import FrodLinear
from tests import peft_models
from tests.training.conftest import Cases, labelled


def basis_of(model: Any, path: Path) -> Path:
    """PEFT's V as a shared-basis file."""
    tensors: dict[str, torch.Tensor] = {}
    records = []
    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, FrodLayer):
            category = names.peft_category(module)
            V = layer.frod_V["default"].contiguous()
            assert torch.equal(V.float().to(V.dtype), V)
            stored = layer.get_base_layer().weight.detach()
            W = stored.T if layer.fan_in_fan_out else stored
            scales = torch.linalg.solve(V.double(), W.double().T).T.norm(dim=0).float()
            tensors[f"V.{category}"] = V.float()  # PEFT computes it in float32
            tensors[f"tau.{category}"] = torch.ones(len(V), dtype=torch.float64)
            tensors[f"lambda.{module}"] = scales
            records.append(
                ModuleRecord(module, category, names.layer_index(module), tuple(stored.shape), layer.fan_in_fan_out,
                             stream.digest(from_torch(stored.contiguous())))
            )  # fmt: skip
    digests = {record.category: stream.digest(from_torch(tensors[f"V.{record.category}"])) for record in records}
    rates = dict.fromkeys(digests, 0.05)
    metadata = BasisMetadata("test", "test", None, 1e-3, 0, rates, "auto", digests, records)
    save_file(tensors, path, file_metadata(metadata))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("family", peft_models.FAMILIES)
def test_outputs_and_gradients(family: str, rows: int, dtype: torch.dtype, cases: Cases, tmp_path: Path) -> None:
    """In float64 what is left is PEFT's rounding of U to float32; in float32 both round along the way."""
    case = cases(family)
    theirs = get_peft_model(case.model().to(dtype), peft_models.frod_config(family, bias="none")).eval()
    ours = frodctl.attach(
        case.model().to(dtype),
        basis_of(theirs, tmp_path / "basis.safetensors"),
        modules_to_save=["classifier"] if family == "bert" else [],
    ).eval()
    pairs = [
        (layer, ours.get_submodule(module))
        for module, layer in theirs.get_base_model().named_modules()
        if isinstance(layer, FrodLayer)
    ]
    assert len(pairs) >= 6
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer, own in pairs:
            assert isinstance(own, FrodLinear)
            update = own.update()
            assert update is not None
            assert torch.equal(update.pattern.indices(), layer.frod_s_indices["default"])
            start = layer.frod_lambda_l["default"]
            assert (update.base_scales - start).norm() <= 1e-6 * update.base_scales.norm()
            change = 0.05 * torch.randn(update.delta.shape, generator=generator) * (update.base_scales > 0)
            values = 0.05 * torch.randn(update.values.shape, generator=generator)
            layer.frod_lambda_l["default"].copy_(update.base_scales + change)
            layer.frod_lambda_s_values["default"].copy_(values)
            update.delta.copy_(change)
            update.values.copy_(values)
    batch = labelled(family, rows=rows)
    for model in (theirs, ours):
        model.zero_grad()
    expected, found = theirs(**batch), ours(**batch)
    base = case.model().to(dtype)(**batch)
    assert (found.logits - base.logits).norm() > 0.05 * base.logits.norm() or family == "bert"
    assert (found.logits - expected.logits).norm() <= 1e-5 * expected.logits.norm()
    expected.loss.backward()
    found.loss.backward()
    gradients, references = [], []
    for layer, own in pairs:
        update = own.update()
        assert update is not None
        for gradient, reference in (
            (update.delta.grad, layer.frod_lambda_l["default"].grad),
            (update.values.grad, layer.frod_lambda_s_values["default"].grad),
        ):
            assert gradient is not None
            assert reference.norm() > 0
            assert dtype == torch.float32 or (gradient - reference).norm() <= 1e-6 * reference.norm()
            gradients.append(gradient)
            references.append(reference)
    assert (torch.cat(gradients) - torch.cat(references)).norm() <= 1e-5 * torch.cat(references).norm()

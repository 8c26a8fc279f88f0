"""Bases that are quantized: exact at the start, trained through, merged into what they were quantized from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaForCausalLM

import frodctl
from frodctl import training
from frodctl.errors import InvalidInput, UsageError
from frodctl.training.attached import frod_layers
from frodctl.training.layer import FrodLinear
from tests.training.conftest import Case, batch, mamba, perturb


def int8(model: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def nf4(model: Any) -> Any:
    from bitsandbytes.nn import Linear4bit

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            layer = Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4",
                compute_dtype=torch.float32,
            )  # fmt: skip
            layer.load_state_dict(module.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.to("cpu"))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**batch("llama", rows=8)).logits
    return result


@pytest.fixture(params=[int8, nf4], ids=["torchao-int8", "bitsandbytes-nf4"])
def quantize(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Llama wide enough for blocks of 64 weights."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, max_position_embeddings=32, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    frodctl.decompose(str(root / "base"), root / "basis.safetensors", target_modules="all-linear", sparsity=0.02)
    return Case("llama", root / "base", root / "basis.safetensors")


def test_the_start_and_the_gradients(quantize: Any, case: Case) -> None:
    base = quantize(case.model())
    expected = logits(base)
    assert 0 < (expected - logits(case.model())).norm() < 0.3 * expected.norm()  # it is quantized
    model = frodctl.attach(base, case.basis)
    assert torch.equal(logits(model), expected)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FrodLinear)
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0
    model(**batch("llama")).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name


def test_the_update_is_that_of_the_dequantized_weight(quantize: Any, case: Case) -> None:
    """W_q (x + D Q Vᵀ x), with W_q read off the layer by the identity."""
    model = frodctl.attach(quantize(case.model()), case.basis)
    perturb(model)
    layer = model.model.layers[0].mlp.up_proj
    update = layer.update()
    with torch.no_grad():
        W = layer.base_layer(torch.eye(128)).T.double()
        V, D = update.basis.V.double(), update.basis.D.double()
        changed = W + W @ D @ update.pattern.positions.dense(update.entries().double()) @ V.T
        x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
        found = layer(x)
    assert (found - x.double() @ W.T).norm() > 0.05 * found.norm()
    assert (found - x.double() @ changed.T).norm() <= 1e-5 * found.norm()


def test_the_loss_falls(quantize: Any, case: Case) -> None:
    model = frodctl.attach(quantize(case.model()), case.basis)
    optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, rho_lambda=0.02, rho_sparse=0.02))
    losses = []
    for _ in range(4):
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def test_saving_detaching_and_merging(quantize: Any, case: Case, tmp_path: Any) -> None:
    base = quantize(case.model())
    expected = logits(base)
    model = frodctl.attach(base, case.basis)
    perturb(model)
    trained = logits(model)
    frodctl.save_adapter(model, tmp_path / "adapter")
    fresh = frodctl.load_adapter(quantize(case.model()), tmp_path / "adapter", case.basis)
    assert (logits(fresh) - trained).abs().max() <= 1e-5
    with pytest.raises(UsageError, match="not a floating-point weight"):
        training.merge_(model)
    assert torch.equal(logits(model), trained)
    assert torch.equal(logits(training.detach(model)), expected)


def test_merging_into_the_full_precision_base(quantize: Any, case: Case, tmp_path: Any) -> None:
    """W_q (I + P) was trained, W (I + P) is merged: they differ by (W_q − W) (I + P), with P = D Q Vᵀ."""
    base, model = case.model(), frodctl.attach(quantize(case.model()), case.basis)
    yardstick = (logits(model) - logits(base)).norm()
    perturb(model)
    frodctl.save_adapter(model, tmp_path / "adapter")
    frodctl.merge(str(case.base), str(tmp_path / "adapter"), tmp_path / "merged", basis=case.basis)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in base.parameters()}
    for path, layer in frod_layers(model).items():
        update, n = layer.update(), base.get_submodule(path).in_features
        with torch.no_grad():
            trained, W_q = layer(torch.eye(n)).T.double(), layer.base_layer(torch.eye(n)).T.double()
        V, D = update.basis.V.double(), update.basis.D.double()
        I_P = torch.eye(n) + D @ update.pattern.positions.dense(update.entries().double()) @ V.T
        W, found = (m.get_submodule(path).weight.double() for m in (base, merged))
        assert (found - W @ I_P).norm() <= 1e-6 * found.norm()
        assert (trained - found - (W_q - W) @ I_P).norm() <= 1e-5 * found.norm()
    assert 0 < (logits(model) - logits(merged)).norm() < 2 * yardstick


def test_evaluation_between_steps_keeps_the_gradient(quantize: Any, case: Case) -> None:
    """bitsandbytes packs 4-bit weights for inference on the CPU, and then has none."""
    model = frodctl.attach(quantize(case.model().eval()), case.basis).eval()
    before = logits(model)
    layer = model.train().model.layers[0].mlp.up_proj
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        W = layer.base_layer(torch.eye(128)).T
    assert x.grad is not None
    assert torch.allclose(x.grad, W.sum(dim=0).expand(4, -1), atol=1e-4)
    model.eval()
    assert torch.equal(logits(model), before)
    assert not training.detach(model).model.layers[0].mlp.up_proj.training


def test_a_layer_without_a_gradient_is_refused(case: Case) -> None:
    class ForInference(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    model = case.model()
    layer = ForInference(128, 256, bias=False)
    layer.load_state_dict(model.model.layers[1].mlp.up_proj.state_dict())
    model.model.layers[1].mlp.up_proj = layer
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj: passes no gradient"):
        frodctl.attach(model, case.basis)


def test_another_model(quantize: Any, case: Case) -> None:
    model = case.model()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.mul_(1.3)
    with pytest.raises(InvalidInput, match=r"mlp\.up_proj: its weight is not the one"):
        frodctl.attach(quantize(model), case.basis)


def test_a_weight_that_is_read_instead_of_called(quantize: Any, tmp_path: Any) -> None:
    """Where it is packed there is no W' to give: Mamba's dt_proj is refused, and the rest is trained without it."""
    base, basis = mamba(tmp_path / "mamba")

    def model() -> Any:
        found = MambaForCausalLM.from_pretrained(base).eval()
        for block in found.backbone.layers:
            inner = nn.ModuleDict({"dt_proj": block.mixer.dt_proj})
            block.mixer.dt_proj = quantize(inner)["dt_proj"]
        return found

    with pytest.raises(InvalidInput, match=r"dt_proj: MambaMixer multiplies by its weight .* `exclude_modules`"):
        frodctl.attach(model(), basis)
    assert len(frod_layers(frodctl.attach(model(), basis, exclude_modules="dt_proj"))) == 9

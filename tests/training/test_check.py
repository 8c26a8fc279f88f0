"""Whether a model is the one that its basis was made from: at any scale, condition and dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import frodctl
from frodctl.arrays import from_torch, to_torch
from frodctl.errors import InvalidInput
from frodctl.method.kernels import kernels_of
from frodctl.method.update import CategoryUpdate
from frodctl.training.attached import updates_of
from tests.conftest import save_checkpoint
from tests.training.conftest import perturb

N = 24
SPECTRA = ("even", "one small", "one large", "half small")


class Tower(nn.Module):
    """Layers of one category side by side."""

    def __init__(self, weights: list[Tensor], bias: float | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for W in weights:
            linear = nn.Linear(W.shape[1], len(W), bias=bias is not None, dtype=W.dtype)
            linear.weight.data = W.clone()
            if bias is not None:
                linear.bias.data.fill_(bias)
            self.layers.append(nn.ModuleDict({"q_proj": linear}))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = [layer["q_proj"](x) for layer in self.layers]
        return outputs


def basis_of(weights: list[Tensor], folder: Path) -> Path:
    save_checkpoint(folder, {f"layers.{i}.q_proj.weight": W for i, W in enumerate(weights)}, {"model_type": "tower"})
    frodctl.decompose(folder, folder / "basis.safetensors", target_modules="q_proj", sparsity=0.05, force=True)
    return folder / "basis.safetensors"


def drawn(heights: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, N, generator=generator, dtype=torch.float64) for m in heights]


def conditioned(spectrum: str, condition: float, m: int, seed: int = 0) -> list[Tensor]:
    """Four weights whose stack has singular values between 1 and 1/condition, about; float64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64)).Q
    values = {
        "even": torch.logspace(0, -torch.tensor(condition).log10(), N, dtype=torch.float64),
        "one small": torch.tensor([1.0] * (N - 1) + [1 / condition], dtype=torch.float64),
        "one large": torch.tensor([1.0] + [1 / condition] * (N - 1), dtype=torch.float64),
        "half small": torch.tensor([1.0, 1 / condition], dtype=torch.float64).repeat_interleave(N // 2),
    }[spectrum]
    return [torch.randn(m, N, generator=generator, dtype=torch.float64) @ (q * values) @ q.T for _ in range(4)]


def refused(weights: list[Tensor], basis: Path | frodctl.BasisFile) -> bool:
    try:
        frodctl.attach(Tower(weights), basis)
    except InvalidInput as error:
        if "its weight is not the one that" not in str(error):
            raise
        return True
    return False


# Scales


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(st.tuples(st.sampled_from([1, 6, 12, 24, 30, 72]), st.floats(-6, 6)), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@example(layers=[(64, 0), (64, -6), (64, 0), (64, 0)], dtype=torch.float32, seed=0)
@example(layers=[(6, 6), (6, 0), (6, -6)], dtype=torch.float32, seed=0)
def test_layers_of_any_scales(layers: list[tuple[int, float]], dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    """Accepted, exact at the start, and what is trained of each layer is right relative to that change."""
    plain = drawn([m for m, _ in layers], seed)
    weights = [(W * 10**exponent).to(dtype) for W, (_, exponent) in zip(plain, layers, strict=True)]
    path = basis_of(weights, tmp_path)
    model = Tower(weights).float()
    inputs = torch.randn(3, N, generator=torch.Generator().manual_seed(seed))
    expected = model(inputs)
    frodctl.attach(model, path)
    assert all(map(torch.equal, model(inputs), expected))

    perturb(model)
    opened = frodctl.open_basis(path)
    V, indices = to_torch(opened.tensor("V.q_proj")), to_torch(opened.indices()["q_proj"])
    D = torch.linalg.inv(V.double()).T
    merging = CategoryUpdate(from_torch(V), from_torch(indices), kernels_of("cpu"))
    for i, W in enumerate(weights):
        update = updates_of(model, "default")[f"layers.{i}.q_proj"]
        start, delta, values = update.base_scales.double(), update.delta.detach(), update.values.detach()
        M = torch.diag(delta.double())
        M[indices[0], indices[1]] += values.double()
        inverse = torch.where(start > 0, 1 / start, 0)
        change = W.double() @ D * inverse @ M @ V.double().T
        trained = (update.base_scales + delta, values, update.base_scales)
        blocks = merging.delta(from_torch(W), *map(from_torch, trained))
        found = torch.cat([to_torch(block.astype(np.float64)) for _, block in blocks])
        rounding = 1e-5 * (change.norm() + W.double().norm())
        assert (found - change).norm() <= rounding
        live = update.merged_weight(model.layers[i]["q_proj"].base_layer).double() - W.double()
        # in float32, where U is no better than ‖W‖‖d_k‖/λ_k allows
        noise = W.double().norm() * D.norm(dim=0) * inverse @ (M @ V.double().T).norm(dim=1)
        assert (live - change).norm() <= rounding + 2e-7 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_small_layer_under_a_bias(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which would swamp its products."""
    weights = drawn([24, 24, 24])
    weights[1] *= 1e-4
    weights = [W.to(dtype) for W in weights]
    path = basis_of(weights, tmp_path)
    frodctl.attach(Tower(weights, bias=100.0), path)
    weights[1] = weights[1].flip(0).flip(1)
    with pytest.raises(InvalidInput, match=r"layers\.1\.q_proj: its weight is not the one"):
        frodctl.attach(Tower(weights, bias=100.0), path)


def test_a_layer_of_zeros(tmp_path: Path) -> None:
    weights = [W.float() for W in drawn([24, 30, 6])]
    weights[1].zero_()
    path = basis_of(weights, tmp_path)
    frodctl.attach(Tower(weights), path)
    weights[1][0, 0] = 1e-20
    assert refused(weights, path)


# Condition


@pytest.mark.filterwarnings("ignore:.*badly conditioned")
@pytest.mark.parametrize("m", [6, 24, 64], ids=["wide", "square", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("condition", [10.0, 100.0, 365.0, 1e3, 1e4, 1e5, 1e6, 1e7])
def test_ill_conditioned_bases(condition: float, spectrum: str, m: int, tmp_path: Path) -> None:
    """The model itself is accepted in the checkpoint's dtype, in one of more bits, and in one of fewer."""
    exact, strange = conditioned(spectrum, condition, m), conditioned(spectrum, condition, m, seed=1)
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        weights = [W.to(stored) for W in exact]
        path = basis_of(weights, tmp_path)
        for live in (torch.float32, torch.bfloat16, torch.float16):
            mine = [W.to(live) for W in weights]
            assert not refused(mine, path), (stored, live)
            assert refused([W.to(live) for W in strange], path), (stored, live)
            shifted = mine[1:] + mine[:1]
            if torch.promote_types(stored, live) == live or condition == 10:  # else rounding may hide it
                assert refused(shifted, path), (stored, live)


def test_one_element_is_told_by_the_digest_where_columns_cannot_tell(tmp_path: Path) -> None:
    weights = [W.float() for W in conditioned("even", 1e7, 24)]
    path = basis_of(weights, tmp_path)
    frodctl.attach(Tower(weights), path)
    weights[2][0, 0] *= 1 + 1e-3
    assert refused(weights, path)


def test_training_in_too_few_bits_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    weights = [W.bfloat16() for W in conditioned("even", 1e6, 24)]
    path = basis_of(weights, tmp_path)
    frodctl.attach(Tower(weights).float(), path)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="q_proj: V is so badly conditioned .* in bfloat16") as found:
        frodctl.attach(Tower(weights), path)
    assert len({str(warning.message) for warning in found}) == 1


class FourBits(nn.Module):
    """A layer whose weight is held in 4 bits, a scale for each 8 elements."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.in_features = W.shape[1]
        groups = W.float().reshape(-1, 8)
        scales = groups.abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("packed", (groups / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        return x @ (packed * scales).reshape(-1, self.in_features).T


def quantized(weights: list[Tensor]) -> Tower:
    model = Tower(weights)
    for layer, W in zip(model.layers, weights, strict=True):
        layer["q_proj"] = FourBits(W)
    return model


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("condition", [10.0, 100.0, 1e3, 1e5, 1e7])
def test_quantized_models_over_ill_conditioned_bases(condition: float, spectrum: str, tmp_path: Path) -> None:
    weights = [W.float() for W in conditioned(spectrum, condition, 64)]
    strange = [W.float() for W in conditioned(spectrum, condition, 64, seed=1)]
    path = basis_of(weights, tmp_path)
    frodctl.attach(quantized(weights), path)
    if condition > 10 or spectrum == "even":
        with pytest.raises(InvalidInput, match="its weight is not the one that"):
            frodctl.attach(quantized(strange), path)


@pytest.mark.filterwarnings("ignore:.*badly conditioned")
def test_a_basis_file_that_does_not_say_the_dtype(tmp_path: Path) -> None:
    """As older versions wrote it: the digest is sought in every dtype, and what it cannot tell may be rounding."""
    exact, strange = conditioned("even", 1e5, 24), conditioned("even", 1e5, 24, seed=1)
    weights = [W.bfloat16() for W in exact]
    opened = frodctl.open_basis(basis_of(weights, tmp_path))
    assert {record.dtype for record in opened.metadata.modules} == {"BF16"}
    records = [replace(record, dtype=None) for record in opened.metadata.modules]
    older = replace(opened, metadata=replace(opened.metadata, modules=records))
    for live in (torch.float32, torch.bfloat16, torch.float16):
        assert not refused([W.to(live) for W in weights], older)
        assert refused([W.to(live) for W in strange], older)

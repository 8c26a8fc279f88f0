"""Merging into what was trained: the base's weights as the quantized model held them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import frodctl
from frodctl.errors import InvalidInput, UsageError
from frodctl.training.attached import frod_layers
from tests.conftest import Run
from tests.jobs.conftest import Case, tensors
from tests.jobs.test_float8 import dequantized
from tests.training.conftest import perturb
from tests.training.test_quantized import int8, nf4


def settings(kind: str) -> Any:
    """How transformers is asked for such a base."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "llm-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant="double" in kind,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(96).reshape(3, 32)).logits
    return found.double()


def divergence(live: torch.Tensor, other: torch.Tensor) -> float:
    """KL a token, in nats."""
    p, q = live.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """Of some layers: others are quantized too."""
    file = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    frodctl.decompose(example, file, target_modules="q_proj,up_proj,down_proj", sparsity=0.02)
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, example: Path, basis: Path) -> Callable[[str], Any]:
    """By the kind of base: the live model's logits with a changed adapter, where that is, and W_q of a few layers."""
    made: dict[str, Any] = {}

    def train(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "adapter"
            more = {"quantization_config": settings(kind)} if kind != "stored" else {}
            model = frodctl.attach(AutoModelForCausalLM.from_pretrained(example, dtype="auto", **more), basis)
            perturb(model, 0.2)
            frodctl.save_adapter(model, folder)
            made[kind] = logits(model), folder, model
        return made[kind]

    return train


def merged(example: Path, adapter: Path, basis: Path, out: Path, **options: Any) -> Any:
    frodctl.merge(example, adapter, out, basis=basis, **options)
    return AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_the_merged_model_is_the_trained_one(
    kind: str, trained: Any, example: Path, basis: Path, tmp_path: Path
) -> None:
    """Within rounding to bfloat16, which the plain merge is far from; by what the adapter says or by its name."""
    live, adapter, _ = trained(kind)
    record = json.loads((adapter / "adapter_config.json").read_text())["frodctl"]["quantization"]
    assert (record["kind"], record["dtype"], len(record["modules"])) == (kind, "BF16", 56)
    plain = divergence(live, logits(merged(example, adapter, basis, tmp_path / "plain")))
    as_trained = logits(merged(example, adapter, basis, tmp_path / "auto", base_as="auto"))
    assert divergence(live, as_trained) < 0.1 * plain if kind != "int8" else 0.5 * plain
    assert (as_trained - live).norm() < 0.015 * live.norm()
    named = tensors(tmp_path / "auto")
    merged(example, adapter, basis, tmp_path / kind, base_as=kind)
    assert all(torch.equal(W, named[name]) for name, W in tensors(tmp_path / kind).items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in float32, wide enough for blocks of 64 weights, and its basis."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, max_position_embeddings=32, initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    frodctl.decompose(root / "base", root / "basis.safetensors", target_modules="q_proj,down_proj", sparsity=0.02)
    return {"base": root / "base", "basis": root / "basis.safetensors"}


@pytest.mark.parametrize("quantize", [int8, nf4])
def test_in_float32_they_are_equal(quantize: Any, wide: dict[str, Path], tmp_path: Path) -> None:
    """torchao quantizes the head, too: it is copied as it was held."""
    model = frodctl.attach(quantize(LlamaForCausalLM.from_pretrained(wide["base"])), wide["basis"])
    perturb(model)
    frodctl.save_adapter(model, tmp_path / "adapter")
    frodctl.merge(wide["base"], tmp_path / "adapter", tmp_path / "out", basis=wide["basis"], base_as="auto")
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        live = model(input_ids=ids).logits
        found = LlamaForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert (found - live).abs().max() <= 1e-5 * live.abs().max()


def test_llm_int8(trained: Any, example: Path, basis: Path, tmp_path: Path) -> None:
    """It rounds the activations, too, so the models differ; ΔW is added to its weights exactly."""
    live, adapter, model = trained("llm-int8")

    def held(layer: Any) -> torch.Tensor:
        weight: torch.Tensor = layer.state.CB.double() * layer.state.SCB.double()[:, None] / 127
        return weight

    frodctl.merge(example, adapter, tmp_path / "out", basis=basis, base_as="auto", dtype="float32")
    found = tensors(tmp_path / "out")
    for path, layer in frod_layers(model).items():
        update, W = layer.update(), held(layer.base_layer)
        V, D = update.basis.V.double(), update.basis.D.double()
        exact = W + W @ D @ update.pattern.positions.dense(update.entries().double()) @ V.T
        assert (found[f"{path}.weight"] - exact).norm() <= 1e-6 * exact.norm()
    W = held(model.model.layers[0].self_attn.v_proj)
    assert (found["model.layers.0.self_attn.v_proj.weight"] - W).abs().max() <= 1e-7 * W.abs().max()
    as_trained = merged(example, adapter, basis, tmp_path / "merged", base_as="auto")
    plain = merged(example, adapter, basis, tmp_path / "plain")
    assert divergence(live, logits(as_trained)) < divergence(live, logits(plain)) < 0.1


def test_conv1d_is_quantized_the_other_way_round(tmp_path: Path) -> None:
    """A live layer has it as (out_features, in_features)."""
    from frodctl.adapted.requantized import requantized
    from frodctl.jobs.merge.base_as import BaseAs

    W = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)).numpy()
    found = BaseAs("nf4", "F32", "", {"w": True, "v": False})
    assert (found.of("w", W) == requantized(W.T, "nf4", "F32").T).all()
    assert (found.of("v", W) == requantized(W, "nf4", "F32")).all()
    assert (found.of("v", W) != found.of("w", W)).any()
    assert found.of("other", W) is W


def test_with_8_bits_and_taken_up(trained: Any, example: Path, basis: Path, tmp_path: Path) -> None:
    _, adapter, _ = trained("int8")
    options: dict[str, Any] = {"basis": basis, "base_as": "auto"}
    frodctl.merge(example, adapter, tmp_path / "wide", dtype="float32", **options)

    def stop(progress: frodctl.Progress) -> None:
        if progress.text.startswith("reading the result again"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frodctl.merge(example, adapter, tmp_path / "out", dtype="float8_e4m3", progress=stop, **options)
    result = frodctl.merge(example, adapter, tmp_path / "out", dtype="float8_e4m3", **options)
    assert result.resumed_tensors == 2 * 56 + 18
    exact = tensors(tmp_path / "wide")
    for name, W in dequantized(tmp_path / "out").items():
        assert (W - exact[name]).norm() < 0.03 * exact[name].norm()


def test_what_is_said(frodctl: Run, trained: Any, example: Path, basis: Path, tmp_path: Path) -> None:
    folders = {kind: trained(kind)[1] for kind in ("nf4", "stored")}

    def said(kind: str, *flags: str) -> str:
        command = ["merge", example, folders[kind], "out", "--basis", basis, "--dry-run", *flags]
        return " ".join(frodctl(*command).stderr.split())

    assert "was trained over the base in nf4, and is merged into it as it is stored; --base-as" in said("nf4")
    assert "was trained over nf4, and so is the base held" in said("nf4", "--base-as", "auto")
    assert ", 56 from nf4" in said("nf4", "--base-as", "auto")
    assert "was trained over nf4, and is merged into the base in int8" in said("nf4", "--base-as", "int8")
    assert "trained over the base as it is stored, and is merged" in said("stored", "--base-as", "nf4")
    for flags in ([], ["--base-as", "auto"]):
        assert "Warning" not in said("stored", *flags)


def test_an_unknown_quantization_and_other_refusals(
    trained: Any, example: Path, basis: Path, cases: Callable[[str, torch.dtype], Case], tmp_path: Path
) -> None:
    class Codes(nn.Linear):
        """A layer of somebody else's, whose weight is no matrix of numbers."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.weight = nn.Parameter((linear.weight.detach() * 100).to(torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) / 100).T

    model = AutoModelForCausalLM.from_pretrained(example, dtype="auto")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Codes(layer.self_attn.q_proj)
    model = frodctl.attach(model, basis)
    frodctl.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InvalidInput, match="was trained over Codes, which is not done here"):
        frodctl.merge(example, tmp_path / "adapter", tmp_path / "out", basis=basis, base_as="auto")
    nf4_, stored = (trained(kind)[1] for kind in ("nf4", "stored"))
    with pytest.raises(UsageError, match="trained over bases in different dtypes"):
        frodctl.merge(example, nf4_, tmp_path / "out", basis=basis, base_as="auto", also=str(stored))
    with pytest.raises(UsageError, match="dense result"):
        frodctl.merge(example, nf4_, tmp_path / "out", basis=basis, base_as="auto", as_="lora", rank=2)
    with pytest.raises(UsageError, match="goes with form delta"):
        cases("llama", torch.float32).merged(tmp_path / "out", base_as="nf4")


def test_a_tied_head_stays_with_its_embedding(example: Path, basis: Path, tmp_path: Path) -> None:
    """torchao, asked directly, quantizes the head too; being tied here, it has no tensor of its own to quantize."""
    model = frodctl.attach(int8(AutoModelForCausalLM.from_pretrained(example, dtype="auto")), basis)
    frodctl.save_adapter(model, tmp_path / "adapter")
    plan = frodctl.merge(example, tmp_path / "adapter", tmp_path / "out", basis=basis, base_as="auto", dry_run=True)
    assert plan.base_as is not None
    assert len(plan.base_as.tensors) == 56
    assert [note for note in plan.warnings if "or tied" in note]

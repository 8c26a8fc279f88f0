"""Models that transformers loads under other names than their checkpoints have, or in other pieces: every step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import frodctl
import frodctl.training
from frodctl.errors import InvalidInput, UsageError
from frodctl.training import peft as bridge
from frodctl.training.attached import frod_layers, updates_of
from tests.conftest import save_checkpoint
from tests.training import renamed

LONG = (
    pytest.param(family, marks=pytest.mark.long)
    for family in ("dinov2", "swin", "segformer", "nemotron_h", "granitemoe")
)
FAMILIES = ("vit", "dinov2_swiglu", "qwen2_vl", "phi3", "qwen3_moe", "gpt_oss", *LONG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    """A family's checkpoint and its basis."""
    found: dict[str, tuple[Path, Path]] = {}
    with ExitStack() as stack:

        def make(family: str) -> tuple[Path, Path]:
            if family == "phi3" and family not in found:
                stack.enter_context(renamed.phi3_in_parts())
            if family not in found:
                root = tmp_path_factory.mktemp(family)
                base = renamed.save_base(family, root / "base")
                frodctl.decompose(base, root / "basis.safetensors", target_modules="all-linear", sparsity=0.05)
                found[family] = base, root / "basis.safetensors"
            return found[family]

        yield make


Made = Callable[[str], tuple[Path, Path]]


def train(model: Any, family: str, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, rho_lambda=0.05, rho_sparse=0.05))
    for _ in range(steps):
        model(**renamed.inputs(family)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_train_save_load_merge(family: str, made: Made, tmp_path: Path) -> None:
    base, basis = made(family)
    records = frodctl.open_basis(basis).metadata.modules
    model = renamed.live(family, base)
    before = renamed.logits(model, family)
    frodctl.attach(model, basis)
    assert len(updates_of(model, "default")) == len(records)
    assert torch.equal(renamed.logits(model, family), before)
    train(model, family)
    after = renamed.logits(model, family)
    assert (after - before).abs().max() > 1e-3
    for update in updates_of(model, "default").values():
        assert update.delta.any()
        assert update.values.any()
    frodctl.save_adapter(model, tmp_path / "adapter")
    again = frodctl.load_adapter(renamed.live(family, base), tmp_path / "adapter", basis)
    torch.testing.assert_close(renamed.logits(again, family), after, rtol=1e-5, atol=1e-5)
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged", basis=basis)
    torch.testing.assert_close(
        renamed.logits(renamed.live(family, tmp_path / "merged"), family), after, rtol=1e-5, atol=1e-5
    )
    old, new = tensors(base), tensors(tmp_path / "merged")
    assert list(old) == list(new)
    trained = {record.name.partition("[")[0] for record in records}  # experts may be one tensor
    assert {name.removesuffix(".weight") for name in old if not torch.equal(old[name], new[name])} == trained
    frodctl.training.merge_(model)
    torch.testing.assert_close(renamed.logits(model, family), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["dinov2_swiglu", "phi3"])
def test_gradients_of_parts_are_those_of_the_merged_weight(family: str, made: Made) -> None:
    """dL/ds for W' = W (I + s …): a finite difference along what is trained, in float64."""
    base, basis = made(family)
    model = frodctl.attach(renamed.live(family, base).double(), basis)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=generator) for p in trained]
    feed = {name: x.double() if x.is_floating_point() else x for name, x in renamed.inputs(family).items()}

    def loss() -> Tensor:
        result: Tensor = model(**feed).logits.square().mean()
        return result

    loss().backward()
    expected = sum((p.grad * d).sum().double() for p, d in zip(trained, directions, strict=True))
    sides = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(step * d)
            sides.append(loss())
            for p, d in zip(trained, directions, strict=True):
                p.sub_(step * d)
    assert float((sides[0] - sides[1]) / 2e-3) == pytest.approx(float(expected), rel=1e-3)


def _exchange(model: nn.Module, one: str, other: str) -> None:
    first, second = model.get_parameter(one), model.get_parameter(other)
    first.data, second.data = second.data.clone(), first.data.clone()


class TestAnotherWeightInItsPlace:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("family", "one", "other"),
        [
            ("vit", "vit.layers.0.attention.q_proj.weight", "vit.layers.1.attention.q_proj.weight"),
            ("vit", "vit.layers.1.attention.q_proj.weight", "vit.layers.1.attention.k_proj.weight"),
            ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"),
        ],
    )
    def test_layers_and_roles(self, family: str, one: str, other: str, dtype: torch.dtype, made: Made) -> None:
        base, basis = made(family)
        model = renamed.live(family, base).to(dtype)
        frodctl.training.detach(frodctl.attach(model, basis))
        _exchange(model, one, other)
        with pytest.raises(InvalidInput, match="its weight is not the one that"):
            frodctl.attach(model, basis)

    def test_gate_and_up(self, made: Made) -> None:
        base, basis = made("phi3")
        model = renamed.live("phi3", base)
        weight = model.get_parameter("model.layers.0.mlp.gate_up_proj.weight")
        weight.data = weight.data.roll(48, dims=0)
        with pytest.raises(InvalidInput, match=r"gate_up_proj: its weight is not the one that"):
            frodctl.attach(model, basis)

    def test_rows_of_split_weights(self, made: Made) -> None:
        """One row too far."""
        base, basis = made("dinov2_swiglu")
        model = renamed.live("dinov2_swiglu", base)
        weight = model.get_parameter("dinov2.encoder.layer.0.mlp.gate_proj.weight")
        weight.data[0] = weight.data[1]
        with pytest.raises(InvalidInput, match="its weight is not the one that"):
            frodctl.attach(model, basis)

    def test_layers_that_differ_in_the_order_of_their_rows(self, made: Made, tmp_path: Path) -> None:
        """Whose norms are the same: their bytes tell."""
        base, _ = made("vit")
        state = tensors(base)
        first, second = (f"vit.encoder.layer.{number}.attention.attention.query.weight" for number in (0, 1))
        state[second] = state[first].flip(0)
        alike = save_checkpoint(tmp_path / "base", state, json.loads((base / "config.json").read_text()))
        frodctl.decompose(alike, tmp_path / "basis.safetensors", target_modules="query", sparsity=0.05)
        model = renamed.live("vit", alike)
        frodctl.training.detach(frodctl.attach(model, tmp_path / "basis.safetensors"))
        _exchange(model, "vit.layers.0.attention.q_proj.weight", "vit.layers.1.attention.q_proj.weight")
        with pytest.raises(InvalidInput, match="its scales are, but its bytes are not"):
            frodctl.attach(model, tmp_path / "basis.safetensors")

    def test_layers_that_are_shifted(self, made: Made) -> None:
        base, basis = made("vit")
        model = renamed.live("vit", base)
        layers = model.vit.layers
        model.vit.layers = nn.ModuleList([layers[1], layers[2], layers[0]])
        with pytest.raises(InvalidInput, match="its weight is not the one that"):
            frodctl.attach(model, basis)


class TestWhatCannotBeTrained:
    def test_experts_are_refused_by_name(self, made: Made) -> None:
        base, basis = made("llama4_text")
        message = r"experts\.down_proj\[0\] \(and 23 more\): one of the experts that .*stacks, a Llama4TextExperts"
        with pytest.raises(InvalidInput, match=message):
            frodctl.attach(renamed.live("llama4_text", base), basis)
        model = frodctl.attach(renamed.live("llama4_text", base), basis, exclude_modules=r".*\.experts\..*")
        assert len(updates_of(model, "default")) == 21

    def test_what_can_be_trained_is_taken_if_asked_for(self, made: Made) -> None:
        base, basis = made("llama4_text")
        model = renamed.live("llama4_text", base)
        with pytest.warns(UserWarning, match=r"left out: .*experts\.gate_up_proj\[3\].*: one of the experts"):
            frodctl.attach(model, basis, only_available=True)
        assert len(updates_of(model, "default")) == 21
        with pytest.raises(InvalidInput, match="one of the experts"):
            frodctl.attach(renamed.live("llama4_text", base), basis, target_modules="gate_up_proj", only_available=True)

    def test_modules_to_save_that_a_checkpoint_calls_otherwise(self, made: Made) -> None:
        base, basis = made("vit")
        model = renamed.live("vit", base)
        with pytest.raises(
            UsageError,
            match=r"`modules_to_save` fc1: .* cannot be saved as a checkpoint has it, .*intermediate\.dense\.bias",
        ):
            frodctl.attach(model, basis, target_modules="query", modules_to_save="fc1")

    def test_peft_s_model_of_an_adapter(self, made: Made, tmp_path: Path) -> None:
        base, basis = made("vit")
        frodctl.save_adapter(frodctl.attach(renamed.live("vit", base), basis), tmp_path / "adapter")
        with pytest.raises(InvalidInput, match=r"some of which ViTForImageClassification calls otherwise"):
            bridge.load(renamed.live("vit", base), tmp_path / "adapter", basis)
        base, basis = made("dinov2_swiglu")
        with pytest.raises(InvalidInput, match=r"weights_in: .*gate_proj has rows of it, or of others too, which PEFT"):
            bridge.get_peft_model(renamed.live("dinov2_swiglu", base), basis, target_modules="weights_in")

    def test_no_lora_adapter_is_made_under_names_that_peft_would_not_find(self, made: Made, tmp_path: Path) -> None:
        base, basis = made("vit")
        frodctl.save_adapter(frodctl.attach(renamed.live("vit", base), basis), tmp_path / "adapter")
        with pytest.raises(InvalidInput, match="PEFT would find no layers"):
            frodctl.merge(base, tmp_path / "adapter", tmp_path / "lora", basis=basis, as_="lora", rank=2)
        assert not (tmp_path / "lora").exists()

    def test_no_pattern_is_selected_for_parts(self, made: Made) -> None:
        base, basis = made("dinov2_swiglu")
        model = frodctl.attach(renamed.live("dinov2_swiglu", base), basis)
        with pytest.raises(UsageError, match="for which no pattern can be selected"):
            frodctl.select_pattern(model, [renamed.inputs("dinov2_swiglu")])


def test_targets_by_the_names_of_either_side(made: Made) -> None:
    base, basis = made("vit")
    by_checkpoint = frodctl.attach(renamed.live("vit", base), basis, target_modules="query,value")
    by_model = frodctl.attach(renamed.live("vit", base), basis, target_modules="q_proj,v_proj")
    assert updates_of(by_checkpoint, "default").keys() == updates_of(by_model, "default").keys()
    assert frod_layers(by_model).keys() == {f"vit.layers.{i}.attention.{p}_proj" for i in range(3) for p in "qv"}


def test_a_part_alone(made: Made) -> None:
    """A basis that has some of what a layer joins."""
    base, basis = made("phi3")
    model = renamed.live("phi3", base)
    before = renamed.logits(model, "phi3")
    some = basis.with_name("some.safetensors")
    frodctl.decompose(base, some, target_modules="k_proj,v_proj,gate_proj", sparsity=0.05, force=True)
    frodctl.attach(model, some)
    assert torch.equal(renamed.logits(model, "phi3"), before)
    train(model, "phi3")
    after = renamed.logits(model, "phi3")
    frodctl.training.merge_(model)
    torch.testing.assert_close(renamed.logits(model, "phi3"), after, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_holds_its_basis(made: Made, tmp_path: Path) -> None:
    base, basis = made("dinov2_swiglu")
    model = frodctl.attach(renamed.live("dinov2_swiglu", base), basis, modules_to_save="classifier")
    train(model, "dinov2_swiglu")
    after = renamed.logits(model, "dinov2_swiglu")
    frodctl.save_adapter(model, tmp_path / "adapter", self_contained=True)
    again = frodctl.load_adapter(renamed.live("dinov2_swiglu", base), tmp_path / "adapter")
    torch.testing.assert_close(renamed.logits(again, "dinov2_swiglu"), after, rtol=1e-5, atol=1e-5)
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = renamed.live("dinov2_swiglu", tmp_path / "merged")
    torch.testing.assert_close(renamed.logits(merged, "dinov2_swiglu"), after, rtol=1e-5, atol=1e-5)


def peft_adapter(family: str, base: Path, folder: Path, targets: list[str], **more: Any) -> Any:
    """PEFT's own, trained for three steps; the live model."""
    config = peft.FrodConfig(target_modules=targets, sparse_rate=0.05, progressbar=False, **more)
    model = peft.get_peft_model(renamed.live(family, base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        model(**renamed.inputs(family)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "targets", "more"),
    [
        ("vit", ["q_proj", "v_proj", "fc1"], {"bias": "all", "modules_to_save": ["classifier"]}),
        ("qwen2_vl", ["q_proj", "v_proj"], {}),
    ],
)
def test_peft_s_adapter_merges(
    family: str, targets: list[str], more: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    base, _ = made(family)
    model = peft_adapter(family, base, tmp_path / "adapter", targets, **more)
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = renamed.live(family, tmp_path / "merged")
    torch.testing.assert_close(renamed.logits(merged, family), renamed.logits(model, family), rtol=1e-4, atol=1e-4)


class TestPeftsAdapterIsRefused:
    def test_of_a_part(self, made: Made, tmp_path: Path) -> None:
        base, _ = made("dinov2_swiglu")
        peft_adapter("dinov2_swiglu", base, tmp_path / "adapter", ["gate_proj"])
        with pytest.raises(InvalidInput, match=r"gate_proj\.weight is made from \(parts of\) .*weights_in\.weight"):
            frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged")

    @pytest.mark.parametrize(
        "changes", [{"architectures": ["MyViT"]}, {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}]
    )
    def test_where_transformers_has_no_such_class(self, changes: dict[str, Any], made: Made, tmp_path: Path) -> None:
        base, _ = made("vit")
        peft_adapter("vit", base, tmp_path / "adapter", ["q_proj"], task_type="FEATURE_EXTRACTION")
        config = json.loads((base / "config.json").read_text())
        copy = tmp_path / "base"
        copy.mkdir()
        (copy / "config.json").write_text(json.dumps(config | changes))
        (copy / "model.safetensors").symlink_to(base / "model.safetensors")
        with pytest.raises(InvalidInput, match=r"transformers has no model of type .*; code that comes .* is not run"):
            frodctl.merge(copy, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("family", ["vit", "qwen2_vl"])
def test_a_checkpoint_under_the_live_models_names_needs_no_mapping(family: str, made: Made, tmp_path: Path) -> None:
    """As version 4 saved the newest of them, or as a state_dict is."""
    base, _ = made(family)
    model = renamed.live(family, base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = json.loads((base / "config.json").read_text())
    copy = save_checkpoint(tmp_path / "base", state, config)
    frodctl.decompose(copy, tmp_path / "basis.safetensors", target_modules="all-linear", sparsity=0.05)
    frodctl.attach(model, tmp_path / "basis.safetensors")
    frodctl.save_adapter(model, tmp_path / "adapter")
    own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["frodctl"]
    assert own["live_prefix"] is None


LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, initializer_range=0.1, pad_token_id=0, num_labels=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "live", "head"),
    [
        (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification, "score"),
        (transformers.LlamaForSequenceClassification, transformers.LlamaForCausalLM, "lm_head"),
        (transformers.LlamaModel, transformers.LlamaForCausalLM, "lm_head"),
        (transformers.LlamaForCausalLM, transformers.LlamaModel, None),
        (transformers.ViTModel, transformers.ViTForImageClassification, "classifier"),
        (transformers.ViTForImageClassification, transformers.ViTModel, None),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_base_and_head(stored: Any, live: Any, head: str | None, tmp_path: Path) -> None:
    """A head that the checkpoint lacks goes into it, and its class into config.json."""
    family = "llama" if "Llama" in live.__name__ else "vit"
    torch.manual_seed(0)
    stored(LLAMA if family == "llama" else renamed._config("vit")).save_pretrained(tmp_path / "base")
    frodctl.decompose(tmp_path / "base", tmp_path / "b.safetensors", target_modules="all-linear", sparsity=0.05)
    model = live.from_pretrained(tmp_path / "base").eval()
    frodctl.attach(model, tmp_path / "b.safetensors", modules_to_save=[head] if head else ())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    frodctl.save_adapter(model, tmp_path / "adapter")
    feed = renamed.inputs(family)
    with torch.no_grad():
        expected = model(**feed)[0]
        again = live.from_pretrained(tmp_path / "base").eval()
        loaded = frodctl.load_adapter(again, tmp_path / "adapter", tmp_path / "b.safetensors")(**feed)[0]
        frodctl.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", basis=tmp_path / "b.safetensors")
        merged = live.from_pretrained(tmp_path / "out").eval()(**feed)[0]
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    architectures = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert architectures == [(live if head else stored).__name__]


def test_a_split_weight_s_scale(made: Made) -> None:
    """All that hold rows of it change by the same share."""
    base, basis = made("dinov2_swiglu")
    model = frodctl.attach(renamed.live("dinov2_swiglu", base), basis)
    before = renamed.logits(model, "dinov2_swiglu")
    train(model, "dinov2_swiglu")
    after = renamed.logits(model, "dinov2_swiglu")
    frodctl.training.set_scale(model, 0)
    assert torch.equal(renamed.logits(model, "dinov2_swiglu"), before)
    frodctl.training.set_scale(model, 1)
    assert torch.equal(renamed.logits(model, "dinov2_swiglu"), after)
    fused = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert fused == sum(u.delta.numel() + u.values.numel() for u in updates_of(model, "default").values())


def test_modules_trained_as_a_whole_whose_path_is_another(made: Made, tmp_path: Path) -> None:
    base, basis = made("vit")
    saved = ["layernorm_before", "classifier"]
    model = frodctl.attach(renamed.live("vit", base), basis, target_modules="query", modules_to_save=saved)
    train(model, "vit")
    after = renamed.logits(model, "vit")
    frodctl.save_adapter(model, tmp_path / "adapter")
    again = frodctl.load_adapter(renamed.live("vit", base), tmp_path / "adapter", basis)
    torch.testing.assert_close(renamed.logits(again, "vit"), after, rtol=1e-5, atol=1e-5)
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged", basis=basis)
    merged = renamed.live("vit", tmp_path / "merged")
    torch.testing.assert_close(renamed.logits(merged, "vit"), after, rtol=1e-5, atol=1e-5)
    assert tensors(base).keys() == tensors(tmp_path / "merged").keys()


@pytest.mark.parametrize("more", [{"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}])
def test_a_new_head_of_peft_s(more: dict[str, Any], tmp_path: Path) -> None:
    """Over a checkpoint of the bare model, whose names get the prefix that the class with the head has."""
    torch.manual_seed(0)
    transformers.ViTModel(renamed._config("vit")).save_pretrained(tmp_path / "base")
    model = peft_adapter("vit", tmp_path / "base", tmp_path / "adapter", ["q_proj"], **more)
    frodctl.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = renamed.live("vit", tmp_path / "merged")
    torch.testing.assert_close(renamed.logits(merged, "vit"), renamed.logits(model, "vit"), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    own = {name for name in tensors(tmp_path / "merged") if not name.startswith("vit.")}
    assert own == {"classifier.weight", "classifier.bias"}

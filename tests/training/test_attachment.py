"""A model with adapters: exact at the start, trained in float32, and the base again when asked."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MambaForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

import frodctl
from frodctl import training
from frodctl.arrays import from_torch, to_torch
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.training import attachment
from frodctl.training.layer import FORMS, Basis, FrodLinear, Pattern, Update
from tests import peft_models
from tests.training.conftest import Case, Cases, labelled, mamba, perturb

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW, MANY = 3, 64  #: tokens in a sequence, of four: below and above what makes the weight's form pay


def layers(model: Any) -> dict[str, FrodLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FrodLinear)}


def ids(tokens: int) -> torch.Tensor:
    return (torch.arange(4 * min(tokens, 30)).reshape(4, -1) * 7) % 64


def logits(model: Any, tokens: int = 16) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids(tokens)).logits
    return result


def grads(model: Any, family: str, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**labelled(family, **options)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", peft_models.FAMILIES)
class TestTheStart:
    def test_bit_for_bit(self, family: str, dtype: torch.dtype, cases: Cases) -> None:
        case = cases(family, dtype)
        base, model = case.model(), case.attached()
        assert len(layers(model)) >= 12
        for tokens in (1, FEW, MANY):
            expected = logits(base, tokens)
            assert expected.dtype == dtype
            assert torch.equal(logits(model, tokens), expected)

    def test_gradients_reach_everything_that_is_trained_and_nothing_else(
        self, family: str, dtype: torch.dtype, cases: Cases
    ) -> None:
        model = cases(family, dtype).attached()
        found = grads(model, family)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(found) == trained
        assert len([n for n in trained if n.endswith(".delta")]) == len(layers(model))
        for name, gradient in found.items():
            if name.endswith((".delta", ".values")):
                assert gradient.dtype == torch.float32
                assert gradient.norm() > 0, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_start_of_trained_models(
    dtype: torch.dtype, example: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whose activations have outliers."""
    for checkpoint, auto in ((example, AutoModelForCausalLM), (minilm, AutoModel)):
        basis = tmp_path_factory.getbasetemp() / f"{checkpoint.name}.basis.safetensors"
        if not basis.exists():
            frodctl.decompose(str(checkpoint), basis, target_modules="all-linear")
        base = auto.from_pretrained(checkpoint, dtype=dtype).eval()
        words = torch.randint(5, base.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for tokens in (words[:, :2], words):
                expected = base(input_ids=tokens)[0]
                found = frodctl.attach(base, basis)(input_ids=tokens)[0]
                assert len(layers(base)) >= 4
                assert torch.equal(found, expected)
                training.detach(base)


class TestBothForms:
    """One operator, whichever way it is computed."""

    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_the_merged_weights_give_the_same(self, family: str, cases: Cases) -> None:
        """In float64, against W' = W + W D diag(λ)⁻¹ M Vᵀ from the numbers themselves."""
        case = cases(family)
        model = case.trained()
        dense = case.model()
        opened = frodctl.open_basis(case.basis)
        records = {record.name: record for record in opened.metadata.modules}
        for path, layer in layers(model).items():
            record = records[path if path in records else path.removeprefix("bert.").removeprefix("transformer.")]
            V = to_torch(opened.tensor(f"V.{record.category}")).double()
            scales = to_torch(opened.tensor(f"lambda.{record.name}")).double()
            update = layer.adapters["default"]
            K = torch.diag(update.delta.detach().double())
            rows, columns = to_torch(opened.indices()[record.category])
            K[rows, columns] += update.values.detach().double()
            weight = dense.get_submodule(path).weight.data
            W = (weight.T if record.transposed else weight).double()
            inverse = torch.where(scales > 0, 1 / scales, 0)  # in GPT-2 there are null directions
            changed = W + torch.linalg.solve(V, W.T).T * inverse @ K @ V.T
            assert (changed - W).norm() > 0.05 * W.norm()
            weight.copy_(changed.T if record.transposed else changed)
        for path, module in attachment.saved_modules(model).items():
            dense.get_submodule(path).load_state_dict(module.chosen().state_dict())
        for tokens in (FEW, MANY):
            expected, found = logits(dense, tokens), logits(model, tokens)
            assert (found - logits(case.model(), tokens)).norm() > 0.05 * expected.norm()
            assert (found - expected).norm() <= 2e-5 * expected.norm()

    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_gradients(self, family: str, cases: Cases) -> None:
        by_form = {form: grads(cases(family).trained(form=form), family) for form in FORMS}
        for found in by_form.values():
            assert found.keys() == by_form["input"].keys()
            for name, gradient in by_form["input"].items():
                assert (gradient - found[name]).norm() <= 1e-4 * gradient.norm(), name

    def test_the_choice(self, cases: Cases) -> None:
        """Few tokens, dropout, hooks and what is not frozen go by the input side."""
        model = cases("llama").attached(dropout=0.1).train()
        layer = layers(model)["model.layers.0.self_attn.q_proj"]
        update = layer.update()
        assert update is not None
        few, many = torch.ones(4, 32), torch.ones(400, 32)
        assert not layer._weight_side(update, many)
        layer.eval()
        assert layer._weight_side(update, many)
        assert not layer._weight_side(update, few)
        assert torch.allclose(layer(many)[:4], layer(few), atol=1e-5)
        assert layer._weight_side(update, few)  # W' is there now
        perturb(model)
        assert not layer._weight_side(update, few)
        layer.base_layer.weight.requires_grad_(True)
        assert not layer._weight_side(update, many)
        layer.base_layer.weight.requires_grad_(False)
        hook = layer.base_layer.register_forward_hook(lambda *_: None)
        assert not layer._weight_side(update, many)
        hook.remove()
        assert layer._weight_side(update, many)


class TestCasting:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_is_trained_stays_float32(self, dtype: torch.dtype, cases: Cases) -> None:
        case = cases("llama")
        model, base = case.attached().to(dtype), case.model().to(dtype)
        for path, layer in layers(model).items():
            update = layer.update()
            assert update is not None
            assert layer.base_layer.weight.dtype == dtype, path
            assert update.delta.dtype == update.values.dtype == update.basis.V.dtype == torch.float32
        for tokens in (FEW, MANY):
            assert torch.equal(logits(model, tokens), logits(base, tokens))
        assert all(gradient.norm() > 0 for gradient in grads(model, "llama").values())

    def test_a_cast_does_not_move_what_was_trained(self, cases: Cases) -> None:
        model = cases("llama").trained()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        expected = logits(model)
        model.half().to(torch.bfloat16).float()
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert (logits(model) - expected).norm() < 0.05 * expected.norm()

    def test_another_device(self, cases: Cases) -> None:
        """V and what is trained go along, each once and in its own dtype."""
        model = cases("llama").attached().to("meta", torch.bfloat16)
        assert {(t.device.type, t.dtype) for t in model.model.layers[0].mlp.up_proj.base_layer.parameters()} == {
            ("meta", torch.bfloat16)
        }
        modules = [m for m in model.modules() if isinstance(m, (Basis, Pattern, Update))]
        tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        assert len({id(t) for t in tensors}) == len(tensors) >= 7 * 2 + 7 * 4 + 21 * 4
        assert {t.device.type for t in tensors} == {"meta"}
        assert {t.dtype for t in tensors} == {torch.float32, torch.int64}

    def test_float16_inputs_that_would_overflow(self) -> None:
        """Vᵀx leaves float16's range; W x does not."""
        n = 64
        V = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
        base = nn.Linear(n, 4, bias=False).half().requires_grad_(False)
        base.weight.data.fill_(0.01)
        x = 30000 * torch.sign(V[:, 0]).half()[None]  # |Vᵀx| is 30000 ‖V[:, 0]‖₁ there, about 190,000
        assert (x.float() @ V).abs().max() > 65504
        basis = Basis(from_torch(V), "c", "", 1, torch.float32, torch.device("cpu"))
        layer = FrodLinear(base)
        layer.adapters["a"] = Update(basis, Pattern(np.array([[0], [1]]), n, torch.device("cpu")), torch.ones(n))
        layer.active = "a"
        assert torch.isfinite(base(x)).all()
        assert torch.equal(layer(x), base(x))
        layer(x).float().sum().backward()
        assert torch.isfinite(layer.adapters["a"].delta.grad).all()

    def test_training_after_inference_mode(self, cases: Cases) -> None:
        model = cases("llama").attached()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for tokens in (FEW, MANY):
                model(input_ids=ids(tokens))
        with torch.autocast("cpu", torch.bfloat16):
            assert all(gradient.norm() > 0 for gradient in grads(model, "llama").values())

    @pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
    def test_autocast(self, autocast: torch.dtype, cases: Cases) -> None:
        case = cases("llama")
        base, model = case.model(), case.attached()
        with torch.autocast("cpu", autocast):
            for tokens in (FEW, MANY):
                assert torch.equal(logits(model, tokens), logits(base, tokens))
            assert all(torch.isfinite(gradient).all() for gradient in grads(model, "llama").values())
        exact = grads(model, "llama")
        with torch.autocast("cpu", autocast):
            rounded = grads(model, "llama")
        for name, gradient in exact.items():
            assert (rounded[name] - gradient).norm() <= 0.1 * gradient.norm(), name


class TestTheModule:
    def test_v_is_held_once_and_is_not_in_the_state(self, cases: Cases) -> None:
        model = cases("llama").attached()
        bases = [module for module in model.modules() if isinstance(module, Basis)]
        assert sorted(b.category for b in bases) == sorted(frodctl.open_basis(cases("llama").basis).metadata.V_digests)
        state = model.state_dict()
        added = {name for name in state if ".adapters." in name}
        assert {name.rsplit(".", 1)[1] for name in added} == {"delta", "values"}
        assert {name.replace(".base_layer", "") for name in state if name not in added} == set(
            cases("llama").model().state_dict()
        )

    def test_a_deep_copy_is_a_model_of_its_own(self, cases: Cases) -> None:
        model = cases("bert").trained()
        expected = logits(model)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            bases = {id(m) for m in copied.modules() if isinstance(m, Basis)}
            own = {id(m) for m in model.modules() if isinstance(m, Basis)}
            assert len(bases) == len(own)
            assert not bases & own
            assert torch.equal(logits(copied), expected)
            perturb(copied)
            assert not torch.equal(logits(copied), expected)
            assert torch.equal(logits(model), expected)
            training.detach(copied)
            assert not copied._load_state_dict_post_hooks
            assert model._load_state_dict_post_hooks

    def test_the_state_can_be_loaded(self, cases: Cases) -> None:
        case = cases("bert")
        model, fresh = case.trained(), case.attached()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh), logits(model))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant: bool, cases: Cases) -> None:
        model = cases("llama").trained().train()
        expected = grads(model, "llama")
        if reentrant:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = grads(model, "llama")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    def test_one_step_lowers_the_loss(self, cases: Cases) -> None:
        for family in peft_models.FAMILIES:
            model = cases(family).attached().train()
            optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, rho_lambda=0.02, rho_sparse=0.02, lr=0.01))
            losses = []
            for _ in range(4):
                torch.manual_seed(0)  # the same dropout
                loss = model(**labelled(family)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < losses[0] - 0.01

    def test_dropout_falls_on_the_correction_alone(self, cases: Cases) -> None:
        case = cases("llama")
        model = case.attached(dropout=0.5).train()
        assert torch.equal(logits(model), logits(case.model()))
        perturb(model)
        assert not torch.equal(logits(model), logits(model))
        model.eval()
        assert torch.equal(logits(model), logits(model))

    @pytest.mark.parametrize("tokens", [20, 400])
    def test_nothing_of_the_weight_s_size_is_kept_by_the_input(self, tokens: int, cases: Cases) -> None:
        """A few values a token and a trained number; V, D and W by reference."""
        model = cases("llama").trained(form="input")
        layer = layers(model)["model.layers.0.mlp.up_proj"]
        held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        x = torch.randn(tokens, 32, requires_grad=True)
        kept: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in held:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        y.sum().backward()
        trained = 32 + 51
        assert 0 < max(kept) <= max(tokens * 32, trained)
        assert sum(kept) <= tokens * 32 + 6 * trained

    def test_a_negative_zero_changes_nothing(self, cases: Cases) -> None:
        model = cases("llama").attached()
        layer = layers(model)["model.layers.0.mlp.up_proj"]
        x = torch.tensor([-0.0, 0.0] * 16)[None]
        assert torch.equal(layer(x), layer.base_layer(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,)], ids=str)
    def test_odd_inputs(self, shape: tuple[int, ...], dtype: torch.dtype, cases: Cases) -> None:
        """No tokens at all, as an expert may get them, and one without a batch."""
        model = cases("llama", dtype).attached()
        layer = layers(model)["model.layers.0.mlp.up_proj"]
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, layer.base_layer(x))
        y.sum().backward()
        update = layer.update()
        assert update is not None
        assert x.grad is not None
        assert x.grad.shape == shape
        assert update.delta.grad is not None
        assert bool(update.delta.grad.any()) == bool(x.numel())

    def test_null_directions_drop_out(self, tmp_path: Path) -> None:
        """Rows of M with λ = 0 have no effect and no gradient, and nothing becomes NaN."""
        from tests.conftest import LLAMA_CONFIG, save_checkpoint

        generator = torch.Generator().manual_seed(0)
        weights = {f"layers.{i}.q_proj.weight": torch.randn(2, 6, generator=generator) for i in range(2)}
        base = save_checkpoint(tmp_path / "base", weights, LLAMA_CONFIG)
        frodctl.decompose(str(base), tmp_path / "b.safetensors", target_modules="q_proj", sparsity=0.5)

        class Block(nn.Module):
            def __init__(self, weight: torch.Tensor) -> None:
                super().__init__()
                self.q_proj = nn.Linear(6, 2, bias=False)
                self.q_proj.weight.data.copy_(weight)

        model = nn.Module()
        model.layers = nn.ModuleList(Block(weight) for weight in weights.values())
        frodctl.attach(model, tmp_path / "b.safetensors")
        layer = model.layers[0].q_proj
        update = layer.update()
        null = update.base_scales == 0
        assert int(null.sum()) == 2
        x = torch.randn(100, 6, generator=generator)
        for rows in (x[:2], x):
            update.zero_grad()
            layer(rows).square().sum().backward()
            assert torch.isfinite(update.delta.grad).all()
            assert (update.delta.grad[null] == 0).all()
            assert (update.delta.grad[~null] != 0).all()
        with torch.no_grad():
            update.delta[null] = 1.0
        assert torch.equal(layer(x), layer.base_layer(x))

    @pytest.mark.filterwarnings("ignore")
    def test_distributed_data_parallel(self, cases: Cases, tmp_path: Path) -> None:
        """Its hooks see every trained number once, and V is not sent around."""
        model = cases("bert").trained().eval()
        expected = grads(model, "bert")
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            model.zero_grad()
            parallel(**labelled("bert")).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], gradient, rtol=1e-5) for name, gradient in expected.items())
        constant = {id(buffer) for m in model.modules() if isinstance(m, Basis) for buffer in m.buffers()}
        assert constant
        assert not constant & {id(buffer) for buffer in parallel.modules_buffers}

    @pytest.mark.filterwarnings("ignore")
    def test_compile(self, cases: Cases) -> None:
        case = cases("llama")
        model = case.trained()
        layer = layers(model)["model.layers.0.mlp.up_proj"]
        for rows in (2, 400):
            x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
            outputs, found = [], []
            for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
                layer.zero_grad()
                y = function(x)
                y.square().sum().backward()
                outputs.append(y.detach())
                found.append(layer.update().delta.grad.clone())
            assert torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
            assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


class TestTheBaseAgain:
    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_disabled(self, family: str, cases: Cases) -> None:
        case = cases(family)
        model, base = case.trained(), case.model()
        trained = logits(model)
        with training.disabled(model):
            assert torch.equal(logits(model), logits(base))
        assert torch.equal(logits(model), trained)
        assert not torch.equal(trained, logits(base))

    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_detach(self, family: str, cases: Cases) -> None:
        case = cases(family)
        model, base = case.model(), case.model()
        model.get_input_embeddings().requires_grad_(False)
        modules = dict(model.named_modules())
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        frodctl.attach(model, case.basis, modules_to_save=["classifier"] if family == "bert" else [])
        perturb(model)
        assert training.detach(model) is model
        assert dict(model.named_modules()) == modules
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(logits(model), logits(base))
        assert "save_pretrained" not in model.__dict__
        with pytest.raises(UsageError, match="no adapter is attached"):
            training.detach(model)

    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_merge_in_place(self, family: str, cases: Cases) -> None:
        case = cases(family)
        model = case.trained()
        expected = logits(model)
        merged = training.merge_(model)
        assert merged is model
        assert not layers(model)
        assert set(model.state_dict()) == set(case.model().state_dict())
        assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()

    def test_merge_of_what_was_not_trained_keeps_every_bit(self, cases: Cases) -> None:
        case = cases("gpt2", torch.bfloat16)
        model = training.merge_(case.attached())
        for name, tensor in case.model().state_dict().items():
            assert torch.equal(model.state_dict()[name].view(torch.int16), tensor.view(torch.int16)), name

    def test_merge_in_16_bits_rounds_once(self, cases: Cases) -> None:
        """The merged weight is the nearest to what the live layer computes."""
        model = cases("llama", torch.bfloat16).trained()
        layer = layers(model)["model.layers.1.mlp.up_proj"]
        update = layer.update()
        assert update is not None
        W, V, D = (t.double() for t in (layer.base_layer.weight, update.basis.V, update.basis.D))
        Q = update.pattern.positions.dense(update.entries().double())
        exact = W + W @ D @ Q @ V.T
        training.merge_(model)
        found = model.get_submodule("model.layers.1.mlp.up_proj").weight.double()
        assert (found - exact).norm() <= 1.001 * (exact.bfloat16().double() - exact).norm()

    def test_scale(self, cases: Cases) -> None:
        """W + s (W' − W), in each layer."""
        model = cases("llama").trained()
        layer = layers(model)["model.layers.0.mlp.up_proj"]
        for rows in (2, 400):
            x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
            base, trained = layer.base_layer(x), layer(x)
            training.set_scale(model, -0.5)
            assert torch.allclose(layer(x), base - 0.5 * (trained - base), rtol=1e-4, atol=1e-5)
            training.set_scale(model, 0)
            assert torch.equal(layer(x), base)
            training.set_scale(model, 1)

    def test_several_adapters(self, cases: Cases, tmp_path: Path) -> None:
        """Each is what it would be alone, on its own basis or on a shared one."""
        case = cases("bert")
        other = tmp_path / "other.safetensors"
        frodctl.decompose(str(case.base), other, target_modules="query,value", alpha=0.1, seed=9)
        first, second = case.trained(), frodctl.attach(case.model(), other)
        perturb(second, seed=6)
        model = case.trained()
        frodctl.attach(model, other, adapter_name="second")
        perturb(model, seed=6)
        assert torch.equal(logits(model), logits(second))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".second." in name for name in trained)
        training.set_adapter(model, "default")
        assert torch.equal(logits(model), logits(first))
        held = sum(isinstance(module, Basis) for module in model.modules())
        frodctl.attach(model, case.basis, adapter_name="third", target_modules=["query"], seed=4)
        assert sum(isinstance(module, Basis) for module in model.modules()) == held
        with pytest.raises(UsageError, match="attached already"):
            frodctl.attach(model, case.basis, adapter_name="third")
        with pytest.raises(UsageError, match="default, second, third"):
            training.set_adapter(model, "fourth")
        assert torch.equal(logits(training.detach(model)), logits(case.model()))


class TestOptions:
    def test_numbers(self, cases: Cases) -> None:
        """n + ⌊s n²⌋ a layer, and the base's own count."""
        case = cases("llama")
        expected = 3 * (6 * (32 + 51) + 80 + 320)
        assert training.trainable_parameters(case.attached()) == (
            expected,
            sum(p.numel() for p in case.model().parameters()),
        )
        only = case.attached(target_modules=["down_proj"], sparsity=0.0)
        assert training.trainable_parameters(only)[0] == 3 * 80

    @pytest.mark.parametrize("targets", [
        ["q_proj", "up_proj"], ("up_proj", "q_proj"), {"q_proj", "up_proj"}, (name for name in ("q_proj", "up_proj")),
        "q_proj,up_proj", " q_proj , up_proj ", r".*\.(q_proj|up_proj)", [r".*\.q_proj", r".*\.up_proj"],
    ])  # fmt: skip
    def test_targets(self, targets: Any, cases: Cases) -> None:
        model = cases("llama").attached(target_modules=targets)
        assert {path.rsplit(".", 1)[1] for path in layers(model)} == {"q_proj", "up_proj"}
        assert len(layers(model)) == 6

    @pytest.mark.parametrize("excluded", [["q_proj", "up_proj"], "q_proj,up_proj", r".*\.(q_proj|up_proj)"])
    def test_excluded(self, excluded: Any, cases: Cases) -> None:
        case = cases("llama")
        model = case.attached(exclude_modules=excluded)
        names = {path.rsplit(".", 1)[1] for path in layers(model)}
        assert names == {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
        model = case.attached(target_modules="q_proj,k_proj", exclude_modules=r"model\.layers\.1\..*")
        assert set(layers(model)) == {
            f"model.layers.{i}.self_attn.{name}" for i in (0, 2) for name in ("q_proj", "k_proj")
        }

    def test_the_words_that_decompose_takes(self, cases: Cases) -> None:
        case = cases("llama")
        assert set(layers(case.attached(target_modules="all-linear"))) == set(layers(case.attached()))
        names = {path.rsplit(".", 1)[1] for path in layers(case.attached(target_modules="default"))}
        assert names == {"q_proj", "v_proj"}
        model = case.model()
        model.config.model_type = "another"
        with pytest.raises(UsageError, match="`target_modules` default: there is none for model type 'another'"):
            frodctl.attach(model, case.basis, target_modules="default")

    def test_modules_to_save_by_one_name(self, cases: Cases) -> None:
        case = cases("bert")
        for given in ("classifier", ["classifier"], ("classifier",), {"classifier"}):
            assert set(attachment.saved_modules(case.attached(modules_to_save=given))) == {"classifier"}

    def test_text_for_numbers(self, cases: Cases) -> None:
        """As the command line takes them."""
        case = cases("llama")
        plain, text = (
            case.attached(sparsity=0.02, seed=7, dropout=0.1),
            case.attached(sparsity="2%", seed="7", dropout="0.1"),
        )
        for path, layer in layers(plain).items():
            first, second = layer.update(), layers(text)[path].update()
            assert torch.equal(first.pattern.indices(), second.pattern.indices())
            assert first.dropout.p == second.dropout.p == 0.1

    def test_a_saved_adapter_is_load_adapter_s(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        with pytest.raises(TypeError, match="positional"):
            frodctl.attach(case.model(), case.basis, tmp_path)
        with pytest.raises(TypeError, match="adapter"):
            frodctl.attach(case.model(), case.basis, adapter=tmp_path)

    def test_the_pattern_is_the_basis_file_s_or_the_seed_s(self, cases: Cases) -> None:
        case = cases("llama")

        def pattern(**options: Any) -> torch.Tensor:
            layer = layers(case.attached(**options))["model.layers.0.mlp.up_proj"]
            update = layer.update()
            assert update is not None
            return update.pattern.indices()

        own = to_torch(frodctl.open_basis(case.basis).indices()["mlp_up_proj"])
        assert torch.equal(pattern(), own)
        assert torch.equal(pattern(target_modules="up_proj"), own)
        assert torch.equal(pattern(seed=3), own)
        assert not torch.equal(pattern(seed=4), own)
        assert pattern(sparsity=0.2).shape == (2, 204)

    def test_refusals(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        for options, message in (
            ({"target_modules": ["q_proj", "nothing"]}, "`target_modules` nothing: matches no module"),
            ({"target_modules": "q_proj, nothing"}, "`target_modules` nothing: matches no module"),
            ({"target_modules": []}, "`target_modules`.*names no module"),
            ({"exclude_modules": "nothing"}, "`exclude_modules` nothing: matches no module"),
            ({"target_modules": "q_proj v_proj"}, r"`target_modules` q_proj v_proj: .* by commas: q_proj,v_proj$"),
            ({"exclude_modules": ["q_proj v_proj"]}, r"`exclude_modules` q_proj v_proj: .* by commas: q_proj,v_proj$"),
            ({"target_modules": "q_proj", "exclude_modules": ["q_proj"]}, "no module is left"),
            ({"sparsity": 2.0}, "`sparsity` 2.0: must "),
            ({"sparsity": {"elsewhere": 0.1}}, "`sparsity` elsewhere: the categories are mlp_down_proj, "),
            ({"sparsity": {"mlp_up_proj": "much"}}, "`sparsity` much: expected"),
            ({"dropout": 1.0}, "`dropout` 1.0: .*below 1"),
            ({"adapter_name": "a.b"}, "`adapter_name` a.b: .*without dots"),
            ({"adapter_name": "keys"}, "`adapter_name` keys: torch.nn.ModuleDict takes no such name"),
            ({"adapter_name": "training"}, "`adapter_name` training: torch.nn.ModuleDict takes no such name"),
            ({"dropout": "-0.1"}, "`dropout` -0.1: must be at least 0"),
            ({"modules_to_save": ["head"]}, "`modules_to_save` head: no such module"),
            ({"modules_to_save": "lm_head"}, "`modules_to_save` lm_head: .*tied"),
            ({"modules_to_save": ["mlp"]}, "is a target"),
            ({"modules_to_save": ["lm_head"]}, "tied"),
        ):
            model = case.model()
            with pytest.raises(UsageError, match=message):
                frodctl.attach(model, case.basis, **options)
            assert not layers(model)
            assert all(p.requires_grad for p in model.parameters())


class TestAnotherModel:
    """A basis is attached to the model it was made from, or not at all."""

    def refused(self, model: Any, case: Case, message: str, **options: Any) -> None:
        with pytest.raises(InvalidInput, match=message):
            frodctl.attach(model, case.basis, **options)
        assert not layers(model)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", peft_models.FAMILIES)
    def test_one_layer_is_another(self, family: str, dtype: torch.dtype, cases: Cases) -> None:
        case = cases(family, dtype)
        model = case.model()
        path = list(layers(case.attached()))[-1]
        module = model.get_submodule(path)
        module.weight.data = (
            torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(8)).to(dtype) * 0.1
        )
        self.refused(model, case, path.replace(".", r"\."))

    def test_layers_in_another_order(self, cases: Cases) -> None:
        case = cases("llama")
        model = case.model()
        model.model.layers = nn.ModuleList(reversed(model.model.layers))
        self.refused(model, case, "is not the one")

    def test_a_checkpoint_loaded_in_16_bits_is_the_same(self, cases: Cases) -> None:
        for family in peft_models.FAMILIES:
            for dtype in (torch.bfloat16, torch.float16):
                case = cases(family)
                base = case.model().to(dtype)
                model = frodctl.attach(case.model().to(dtype), case.basis)
                assert torch.equal(logits(model), logits(base))

    def test_a_large_bias_does_not_hide_it(self, cases: Cases) -> None:
        case = cases("bert", torch.bfloat16)
        model = case.model()
        for path in layers(case.attached()):
            model.get_submodule(path).bias.data.normal_(std=2.0)
        frodctl.attach(model, case.basis)

    def test_another_size_and_another_family(self, cases: Cases) -> None:
        case = cases("llama")
        self.refused(cases("gpt2").model(), case, "has no such module")
        model = case.model()
        model.model.layers[1].self_attn.q_proj = nn.Linear(48, 32)
        self.refused(model, case, r"layers\.1\.self_attn\.q_proj: takes 48 features")

    def test_no_basis_there(self, cases: Cases, tmp_path: Path) -> None:
        model = cases("llama").model()
        with pytest.raises(UsageError, match=f"{tmp_path}/none: no such file .`basis`."):
            frodctl.attach(model, tmp_path / "none")
        with pytest.raises(InvalidInput, match=f"{tmp_path}: is a folder"):
            frodctl.attach(model, str(tmp_path))
        shutil.copy(cases("llama").basis, tmp_path / "basis.safetensors")
        opened = frodctl.open_basis(tmp_path / "basis.safetensors")
        opened.path.unlink()
        with pytest.raises(UsageError, match=f"`basis` {opened.path}: no such file"):
            frodctl.attach(model, opened)

    @pytest.mark.parametrize("opened", [True, False])
    def test_found_again_from_another_folder(
        self, opened: bool, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = cases("llama")
        shutil.copy(case.basis, tmp_path / "basis.safetensors")
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path)
        model = frodctl.attach(case.model(), frodctl.open_basis("basis.safetensors") if opened else "basis.safetensors")
        monkeypatch.chdir("other")
        frodctl.save_adapter(model, "adapter", self_contained=True)
        frodctl.load_adapter(case.model(), "adapter")

    def test_a_tied_layer(self, cases: Cases) -> None:
        case = cases("llama")
        model = case.model()
        blocks = model.model.layers
        blocks[1].self_attn.q_proj.weight = blocks[0].self_attn.q_proj.weight
        self.refused(model, case, r"layers\.0\.self_attn\.q_proj: its weight is tied")

    def test_no_weights_yet(self, cases: Cases) -> None:
        self.refused(cases("llama").model().to("meta"), cases("llama"), "meta device")

    def test_fused_experts(self, tmp_path: Path) -> None:
        from tests.conftest import save_checkpoint

        generator = torch.Generator().manual_seed(0)
        weights = {
            f"model.layers.{i}.mlp.experts.gate_up_proj": torch.randn(2, 48, 16, generator=generator) for i in range(2)
        }
        weights |= {
            f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(16, 16, generator=generator) for i in range(2)
        }
        base = save_checkpoint(tmp_path / "base", weights, {"model_type": "qwen3_moe", "hidden_size": 16})
        frodctl.decompose(str(base), tmp_path / "b.safetensors", target_modules="all-linear")
        names = [record.name for record in frodctl.open_basis(tmp_path / "b.safetensors").metadata.modules]
        assert "model.layers.0.mlp.experts.gate_up_proj[0]" in names
        with pytest.raises(InvalidInput, match=r"gate_up_proj\[0\] \(and 5 more\): Linear has no such module"):
            frodctl.attach(nn.Linear(2, 2), tmp_path / "b.safetensors")

    def test_a_damaged_basis(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        damaged = tmp_path / "damaged.safetensors"
        data = bytearray(case.basis.read_bytes())
        offset = frodctl.open_basis(case.basis).header.tensors["V.mlp_up_proj"][1]
        data[offset + 2] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(InvalidInput, match=r"V\.mlp_up_proj is damaged"):
            frodctl.attach(case.model(), damaged)


class TestMergeInPlace:
    """W' goes into the weight of whatever layer computes W x + b."""

    def replaced(self, model: Any, kind: type[nn.Linear]) -> Any:
        for layer in model.model.layers:
            linear = layer.mlp.up_proj
            layer.mlp.up_proj = kind(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
            layer.mlp.up_proj.load_state_dict(linear.state_dict())
        return model

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_a_kind_of_its_own(self, dtype: torch.dtype, cases: Cases) -> None:
        case = cases("llama", dtype)
        model = frodctl.attach(self.replaced(case.model(), FalconLinear), case.basis)
        assert type(layers(model)["model.layers.0.mlp.up_proj"].base_layer) is FalconLinear
        perturb(model)
        merged = self.replaced(training.merge_(case.trained()), FalconLinear)
        training.merge_(model)
        for name, tensor in merged.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    @pytest.mark.parametrize("change", [lambda y: 1.01 * y, torch.relu, lambda y: y + 0.01])
    def test_of_one_that_does_more(self, change: Any, cases: Cases) -> None:
        class More(nn.Linear):
            active = False

            def forward(self, input: torch.Tensor) -> torch.Tensor:
                y = super().forward(input)
                return change(y) if self.active else y

        case = cases("llama")
        model = frodctl.attach(self.replaced(case.model(), More), case.basis)
        perturb(model)
        More.active = True
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UsageError, match=r"up_proj: More does not compute W x \+ b; merge the saved adapter"):
            training.merge_(model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class TestWeightsThatAreRead:
    """A model may multiply by a layer's weight instead of calling the layer: that weight is then W', and trained."""

    @pytest.fixture
    def base(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        return mamba(tmp_path_factory.getbasetemp() / "mamba")

    def model(self, base: Path, dtype: torch.dtype = torch.float32) -> Any:
        return MambaForCausalLM.from_pretrained(base, dtype=dtype).eval()

    def test_mamba(self, base: tuple[Path, Path], tmp_path: Path) -> None:
        """Exact at the start, a gradient for every number, and merged, in place and in files, as it was trained."""
        for dtype in (torch.float32, torch.bfloat16):
            plain, model = self.model(base[0], dtype), frodctl.attach(self.model(base[0], dtype), base[1])
            assert "backbone.layers.0.mixer.dt_proj" in layers(model)
            assert torch.equal(logits(model), logits(plain))
        model = frodctl.attach(self.model(base[0]), base[1])
        model(input_ids=ids(16), labels=ids(16)).loss.backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.norm() > 0, name
        perturb(model)
        expected = logits(model)
        only = frodctl.attach(self.model(base[0]), base[1], target_modules="dt_proj")
        perturb(only)
        assert not torch.equal(logits(only), logits(self.model(base[0])))
        frodctl.save_adapter(model, tmp_path / "adapter")
        frodctl.merge(str(base[0]), str(tmp_path / "adapter"), tmp_path / "out", basis=base[1])
        for merged in (self.model(tmp_path / "out"), training.merge_(model)):
            assert (logits(merged) - expected).norm() <= 1e-5 * expected.norm()

    def test_the_gradient_is_that_of_the_weight(self, base: tuple[Path, Path]) -> None:
        """∂L/∂Q = (W D)ᵀ (∂L/∂W') V at the positions, from the merged model's own gradient."""
        model = frodctl.attach(self.model(base[0]), base[1], target_modules="dt_proj")
        perturb(model)
        merged = training.merge_(copy.deepcopy(model)).requires_grad_(True)
        for trained in (model, merged):
            trained(input_ids=ids(16), labels=ids(16)).loss.backward()
        for path, layer in layers(model).items():
            update, G = layer.update(), merged.get_submodule(path).weight.grad
            basis, W = update.basis, layer.base_layer.weight
            inner = update.inverse_scales[:, None] * ((W @ basis.D).T @ G @ basis.V)
            assert torch.allclose(update.delta.grad, inner.diagonal(), rtol=1e-3, atol=1e-7)
            rows, columns = update.pattern.indices()
            assert torch.allclose(update.values.grad, inner[rows, columns], rtol=1e-3, atol=1e-7)

    @pytest.mark.filterwarnings("ignore")
    def test_distributed_data_parallel(self, base: tuple[Path, Path], tmp_path: Path) -> None:
        """Every parameter takes part, or the second step fails."""
        model = frodctl.attach(self.model(base[0]), base[1])
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                parallel(input_ids=ids(16), labels=ids(16)).loss.backward()
        finally:
            torch.distributed.destroy_process_group()

    def test_the_base_s_is_read_where_nothing_is_applied(self, base: tuple[Path, Path]) -> None:
        model = frodctl.attach(self.model(base[0]), base[1])
        layer = layers(model)["backbone.layers.0.mixer.dt_proj"]
        W = layer.base_layer.weight
        assert torch.equal(layer.weight, W)
        perturb(model)
        assert not torch.equal(layer.weight, W)
        assert torch.allclose(layer.weight, layer.update().merged_weight(layer.base_layer), rtol=1e-6)
        with training.disabled(model):
            assert layer.weight is W
        training.set_scale(model, 0)
        assert layer.weight is W

    def test_a_dtype_costs_nothing(self, cases: Cases) -> None:
        """T5 asks for ``self.wo.weight.dtype`` and calls the layer."""
        case = cases("llama")

        class Asks(nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
                return self.down_proj(y.to(self.down_proj.weight.dtype))

        model = case.model()
        for layer in model.model.layers:
            layer.mlp = Asks(layer.mlp)
        frodctl.attach(model, case.basis)
        perturb(model)
        assert torch.equal(logits(model), logits(case.trained()))
        layer = model.model.layers[0].mlp.down_proj
        assert layer.weight is layer.base_layer.weight

    def encoder(self, root: Path) -> tuple[Any, Path]:
        torch.manual_seed(0)

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
                self.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(2))
                for parameter in self.parameters():
                    parameter.data.normal_(std=0.2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = layer(x)
                return x

        from tests.conftest import save_checkpoint

        model = Encoder().eval()
        base = save_checkpoint(root / "base", model.state_dict(), {})
        frodctl.decompose(str(base), root / "b.safetensors", target_modules="out_proj,linear1,linear2", sparsity=0.05)
        return model, root / "b.safetensors"

    def test_torch_s_attention_and_its_fast_path(self, tmp_path: Path) -> None:
        """torch's encoder calls linear1 in training and reads its weight in evaluation, and always out_proj's."""
        model, basis = self.encoder(tmp_path)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model(x)
            frodctl.attach(model, basis)
            assert len(layers(model)) == 6
            assert torch.equal(model(x), before)
        model.train()(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.norm() > 0, name
        perturb(model)
        with torch.no_grad():
            fast, slow = model.eval()(x), model.train()(x)
            assert (fast - before).norm() > 0.02 * before.norm()
            assert torch.allclose(fast, slow, atol=1e-4)
            assert torch.allclose(training.merge_(model)(x), slow, atol=1e-4)


MISTAKES: tuple[Any, ...] = (
    None, 1.5, float("nan"), float("inf"), -1, 0, 10**30, True, "x", "", " ", "..", "a/b", "(", "\ud800", "\0", b"",
    b"x", [], [""], [None], [1.5], (), set(), {}, {"x": 1}, {1: None}, object(), Path("/no/such"), lambda: None,
    torch.zeros(2), torch.float32,
)  # fmt: skip


class TestWhateverIsGiven:
    """Of every type for every parameter: a `FrodctlError` and the model as it was, or it works."""

    PARAMETERS = (
        "basis", "target_modules", "exclude_modules", "sparsity", "seed", "modules_to_save", "dropout", "adapter_name",
        "form",
    )  # fmt: skip

    @pytest.mark.parametrize("parameter", PARAMETERS)
    def test_attach(self, parameter: str, cases: Cases) -> None:
        case = cases("llama")
        model = case.model()
        modules, attributes = dict(model.named_modules()), set(model.__dict__)
        refused = []
        for value in MISTAKES:
            try:
                frodctl.attach(model, **{"basis": case.basis, parameter: value})
            except FrodctlError as error:
                refused.append(str(error))
            else:
                training.detach(model)
            assert dict(model.named_modules()) == modules, value
            assert set(model.__dict__) == attributes, value
            assert all(p.requires_grad for p in model.parameters())
        assert all(parameter in message for message in refused), refused
        assert len(refused) >= 20

    @pytest.mark.parametrize("value", MISTAKES, ids=lambda value: ascii(value)[:20])
    def test_attach_to(self, value: Any, cases: Cases) -> None:
        with pytest.raises(UsageError, match="`model`"):
            frodctl.attach(value, cases("llama").basis)

    def test_what_acts_on_attached_models(self, cases: Cases) -> None:
        model = cases("llama").trained()
        expected = logits(model)
        for value in MISTAKES:
            for function in (training.set_scale, training.set_adapter):
                try:
                    function(model, value)
                except UsageError:
                    assert torch.equal(logits(model), expected), value
                else:
                    training.set_scale(model, 1)
                    assert function is training.set_scale
        for scale in (float("nan"), float("-inf"), "nan", None, True, "x"):
            with pytest.raises(UsageError, match="`scale`"):
                training.set_scale(model, scale)
        training.set_scale(model, "50%")
        assert {layer.update().scale for layer in layers(model).values()} == {0.5}
        for function in (training.set_scale, training.set_adapter):
            for value in (None, 7, "x", object(), nn.Linear(2, 2)):
                with pytest.raises(UsageError, match="attach first"):
                    function(value, "default")


def test_a_frozen_head_is_told(cases: Cases) -> None:
    """PEFT would train it unasked; a new one would stay as it was drawn."""
    case = cases("bert")
    with pytest.warns(UserWarning, match=r"classifier is frozen.*modules_to_save=\['classifier'\]"):
        frodctl.attach(case.model(), case.basis)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frodctl.attach(case.model(), case.basis, modules_to_save="classifier")
        frodctl.attach(cases("llama").model(), cases("llama").basis)

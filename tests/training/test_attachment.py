"""A model with adapters: exact at the start, trained in float32, and the base again when asked."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import frodctl
from frodctl import training
from frodctl.errors import InvalidInput, UsageError
from frodctl.training import attachment
from frodctl.training.layer import Basis, FrodLinear, Pattern, Update
from tests import peft_models
from tests.training.conftest import Case, Cases, labelled, perturb

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
            V = opened.tensor(f"V.{record.category}").double()
            scales = opened.tensor(f"lambda.{record.name}").double()
            update = layer.adapters["default"]
            K = torch.diag(update.delta.detach().double())
            rows, columns = opened.indices()[record.category]
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
    def test_gradients(self, family: str, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
        model = cases(family).trained()
        by_form = {}
        for form in (False, True):
            monkeypatch.setattr(FrodLinear, "_weight_side", lambda self, update, x, form=form: form)
            by_form[form] = grads(model, family)
        assert by_form[False].keys() == by_form[True].keys()
        for name, gradient in by_form[False].items():
            assert (gradient - by_form[True][name]).norm() <= 1e-4 * gradient.norm(), name

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
        basis = Basis(V, "c", "", 1, torch.float32, torch.device("cpu"))
        layer = FrodLinear(base)
        layer.adapters["a"] = Update(basis, Pattern(torch.tensor([[0], [1]]), n, torch.device("cpu")), torch.ones(n))
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
        assert sorted(b.category for b in bases) == sorted(frodctl.open_basis(cases("llama").basis).metadata.basis)
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
    def test_nothing_of_the_weight_s_size_is_kept_for_the_backward_pass(self, tokens: int, cases: Cases) -> None:
        """A few values a token and a trained number; V, D and W by reference."""
        model = cases("llama").trained()
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

    @pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "q_proj,up_proj", r".*\.(q_proj|up_proj)"])
    def test_targets(self, targets: Any, cases: Cases) -> None:
        model = cases("llama").attached(target_modules=targets)
        assert {path.rsplit(".", 1)[1] for path in layers(model)} == {"q_proj", "up_proj"}
        assert len(layers(model)) == 6

    def test_the_pattern_is_the_basis_file_s_or_the_seed_s(self, cases: Cases) -> None:
        case = cases("llama")

        def pattern(**options: Any) -> torch.Tensor:
            layer = layers(case.attached(**options))["model.layers.0.mlp.up_proj"]
            update = layer.update()
            assert update is not None
            return update.pattern.indices()

        own = frodctl.open_basis(case.basis).indices()["mlp_up_proj"]
        assert torch.equal(pattern(), own)
        assert torch.equal(pattern(target_modules="up_proj"), own)
        assert torch.equal(pattern(seed=3), own)
        assert not torch.equal(pattern(seed=4), own)
        assert pattern(sparsity=0.2).shape == (2, 204)

    def test_refusals(self, cases: Cases, tmp_path: Path) -> None:
        case = cases("llama")
        for options, message in (
            ({"target_modules": ["q_proj", "nothing"]}, "nothing: matches no module"),
            ({"sparsity": 2.0}, "between 0 and 1"),
            ({"sparsity": {"elsewhere": 0.1}}, "elsewhere: no such category"),
            ({"dropout": 1.0}, "below 1"),
            ({"adapter_name": "a.b"}, "without dots"),
            ({"modules_to_save": ["head"]}, "head: no such module"),
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

    def test_what_does_not_call_its_layers(self, cases: Cases) -> None:
        case = cases("llama")
        model = case.model()
        attention = nn.MultiheadAttention(32, 4)
        q_proj = model.model.layers[0].self_attn.q_proj
        attention.q_proj = q_proj
        model.model.layers[0].self_attn = attention
        self.refused(
            model, case, "MultiheadAttention does not call it", target_modules=r"model\.layers\.0\.self_attn\.q_proj"
        )

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
        with pytest.raises(InvalidInput, match="a slice of fused experts"):
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

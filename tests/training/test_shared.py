"""One basis for layers that read the same tensor: from decompose to merge, and the product that they share."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

import frodctl
from frodctl.errors import InvalidInput
from frodctl.training import merge_
from frodctl.training import peft as bridge
from frodctl.training.attached import updates_of
from frodctl.training.layer import Basis
from frodctl.training.shared import SharedProduct
from tests import peft_models
from tests.conftest import save_checkpoint
from tests.training.conftest import Case, Cases, labelled, perturb

FEW = {"rows": 2, "tokens": 3}  # so that no W' is formed, which takes no Vᵀx
TOGETHER = {"llama": "self_attn_q_proj_k_proj_v_proj", "bert": "self_query_key_value"}
Reads = Callable[[Tensor, str], Tensor | None]


@pytest.fixture(scope="module", params=TOGETHER)
def shared(request: pytest.FixtureRequest, cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, and its basis where q, k, v and gate, up share theirs."""
    plain = cases(request.param)
    basis = tmp_path_factory.mktemp("shared") / "basis.safetensors"
    frodctl.decompose(plain.base, basis, target_modules="all-linear", sparsity=0.05, seed=3, share_input=True)
    return Case(plain.family, plain.base, basis)


class Products(TorchDispatchMode):
    """Counts products with V, forward and backward, by category."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {b.V.data_ptr(): b.category for b in model.modules() if isinstance(b, Basis)}
        self.counts = dict.fromkeys(self.names.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].data_ptr() in self.names:
            self.counts[self.names[args[1].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def gradients(model: Any, family: str) -> list[Tensor]:
    loss = model(**labelled(family, **FEW)).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def apart(model: Any) -> Any:
    """The same model, where every layer has a product of its own."""
    model = copy.deepcopy(model)
    for update in updates_of(model, "default").values():
        update.projection = SharedProduct("own")
        update.projection.layers = 1
    return model


def test_exact_at_the_start(shared: Case) -> None:
    batch = labelled(shared.family, **FEW)
    with torch.no_grad():
        assert torch.equal(shared.attached()(**batch).logits, shared.model()(**batch).logits)


def test_one_product_for_all_layers_that_read_a_tensor(shared: Case) -> None:
    model = shared.trained()
    blocks = model.config.num_hidden_layers
    with Products(model) as products:
        loss = model(**labelled(shared.family, **FEW)).loss
        assert set(products.counts.values()) == {blocks}
        loss.backward()
    backward = [count - blocks for count in products.counts.values()]
    assert sorted(backward) == [blocks - 1, blocks, blocks, blocks]  # the first block's input takes no gradient


def test_gradients_are_those_of_separate_products(shared: Case) -> None:
    model = shared.trained()
    expected = gradients(apart(model), shared.family)
    assert distance(gradients(model, shared.family), expected) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(apart(model), shared.family)
        assert distance(gradients(model, shared.family), expected) <= 3e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(shared: Case, reentrant: bool) -> None:
    model = shared.trained()
    expected = gradients(model, shared.family)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with Products(model) as products:
        model(**labelled(shared.family, **FEW)).loss.backward()
    assert set(products.counts.values()) == {3 * model.config.num_hidden_layers}  # forward, again, and backward
    assert distance([p.grad for p in model.parameters() if p.requires_grad], expected) <= 1e-6


def test_dropout_gives_every_layer_its_own_input(shared: Case) -> None:
    model = shared.trained(dropout=0.5)
    blocks = model.config.num_hidden_layers
    for training in (True, False):
        with Products(model.train(training)) as products:
            model(**labelled(shared.family, **FEW))
        assert products.counts[TOGETHER[shared.family]] == (3 if training else 1) * blocks


@pytest.mark.parametrize("self_contained", [False, True])
def test_saved_loaded_and_merged(shared: Case, self_contained: bool, tmp_path: Path) -> None:
    model = shared.trained()
    batch = labelled(shared.family, **FEW)
    basis = None if self_contained else shared.basis
    frodctl.save_adapter(model, tmp_path / "adapter", self_contained=self_contained)
    loaded = frodctl.load_adapter(shared.model(), tmp_path / "adapter", basis)
    frodctl.merge(shared.base, tmp_path / "adapter", tmp_path / "merged", basis=basis)
    merged = peft_models.task_model(shared.family, tmp_path / "merged")
    with torch.no_grad():
        expected = model(**batch).logits
        with Products(loaded) as products:
            assert torch.allclose(loaded(**batch).logits, expected, atol=1e-5)
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)
        assert torch.allclose(merge_(model)(**batch).logits, expected, atol=1e-5)
    assert set(products.counts.values()) == {model.config.num_hidden_layers}


def test_peft_refuses(shared: Case, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="which PEFT cannot have; decompose without `share_input` for PEFT"):
        bridge.get_peft_model(shared.model(), shared.basis)
    frodctl.save_adapter(shared.trained(), tmp_path, self_contained=True)
    with pytest.raises(InvalidInput, match="which PEFT cannot have"):
        bridge.load(shared.model(), tmp_path)
    with pytest.raises(KeyError, match="PEFT cannot load this adapter"):
        peft.PeftModel.from_pretrained(shared.model(), str(tmp_path))


def test_inspected(shared: Case) -> None:
    (report,) = frodctl.inspect(shared.basis, base=shared.base).targets
    layers = {category["category"]: category["layers"] for category in report.summary["categories"]}
    joined = report.summary["share_input"]
    assert TOGETHER[shared.family] in joined
    assert all(layers[category] == 3 * len(names) for category, names in joined.items())
    errors = [row.values["reconstruction_error"] for row in report.rows if row.values["name"].startswith("lambda.")]
    assert max(errors) <= 1e-5


def test_trained_weights(minilm: Path, tmp_path: Path) -> None:
    """The encoder as its users have it: exact at the start, and merged."""
    basis = tmp_path / "basis.safetensors"
    frodctl.decompose(minilm, basis, target_modules="query,key,value", share_input=True)
    base, model = (AutoModel.from_pretrained(minilm, add_pooling_layer=False).eval() for _ in range(2))
    frodctl.attach(model, basis)
    ids = torch.arange(1000, 1012)[None]
    with torch.no_grad():
        expected = base(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)
        perturb(model)
        changed = model(ids).last_hidden_state
        assert (changed - expected).norm() > 0.01 * expected.norm()
        frodctl.save_adapter(model, tmp_path / "adapter")
        frodctl.merge(minilm, tmp_path / "adapter", tmp_path / "merged", basis=basis)
        merged = AutoModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
        assert (merged(ids).last_hidden_state - changed).norm() <= 1e-5 * changed.norm()


class Attention(nn.Module):
    """Layers that are called as an attention's are; ``reads`` gives each its input, or None: it is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor, reads: Reads) -> Tensor:
        total = x.new_zeros(())
        for name in ("q_proj", "k_proj", "v_proj"):
            given = reads(x, name)
            total = total + (0 if given is None else getattr(self, name)(given).square().sum())
        return total


class Toy(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention()}) for _ in range(2))

    def forward(self, x: Tensor, reads: Reads = lambda x, name: x) -> Tensor:
        return torch.stack([layer["self_attn"](x * 0.5, reads) for layer in self.layers]).sum()  # type: ignore[index]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    torch.manual_seed(0)
    model = Toy()
    base = save_checkpoint(tmp_path / "toy", model.state_dict())
    basis = frodctl.decompose(base, tmp_path / "b.safetensors", target_modules="all-linear", share_input=True).output
    frodctl.attach(model, basis)
    perturb(model, 1.0)
    return model


READS: dict[str, Reads] = {
    "one tensor": lambda x, name: x,
    "changed in place": lambda x, name: x if name == "q_proj" else x.mul_(2),
    "detached": lambda x, name: x if name == "q_proj" else x.detach(),
    "another": lambda x, name: x if name == "q_proj" else x + 1,
    "only some": lambda x, name: x if name == "k_proj" else None,
}


def derivatives(model: Toy, x: Tensor, reads: Reads) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x, reads), [x, *parameters], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, [x, *parameters], strict=True)]


@pytest.mark.parametrize("name", READS)
@pytest.mark.filterwarnings("ignore:self_attn_q_proj_k_proj_v_proj")
def test_whatever_the_layers_are_given(name: str, toy: Toy) -> None:
    """Twice: what one pass leaves must not be taken for the next one's."""
    for seed in (0, 1):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        found, expected = (derivatives(model, x, READS[name]) for model in (toy, apart(toy)))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_different_tensors_are_told(toy: Toy) -> None:
    x = torch.randn(5, 16)
    with warnings.catch_warnings(action="error"):
        toy(x)
        toy(x, READS["only some"])
        toy(x, READS["only some"])
    with pytest.warns(UserWarning, match="self_attn_q_proj_k_proj_v_proj: .* given different tensors"):
        toy(x, READS["another"])


def test_every_layer_in_a_checkpoint_of_its_own(toy: Toy) -> None:
    x = torch.randn(5, 16, requires_grad=True)
    expected = derivatives(apart(toy), x, READS["one tensor"])
    for block in toy.layers:
        for layer in block["self_attn"].children():  # type: ignore[index]
            plain = layer.forward
            layer.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    found = derivatives(toy, x, READS["one tensor"])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_nothing_is_kept_of_a_pass(toy: Toy) -> None:
    """Nor of one in which some layers are not called; and between two layers a model can be copied."""
    seen: list[weakref.ref[Tensor]] = []

    def reads(x: Tensor, name: str) -> Tensor | None:
        if name == "v_proj":
            copy.deepcopy(toy)
            return None
        seen.append(weakref.ref(x))
        return x

    toy(torch.randn(5, 16, requires_grad=True), reads).backward()
    assert [ref() for ref in seen] == [None] * 4
    assert all(update.projection._kept is None for update in updates_of(toy, "default").values())

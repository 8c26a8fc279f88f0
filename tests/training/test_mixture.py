"""A mixture of experts in training: what its surroundings do to a model, they may do to its experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3MoeForCausalLM

import frodctl
from frodctl.training.attached import frod_layers
from frodctl.training.experts import FrodExperts
from tests.conftest import save_checkpoint
from tests.training.conftest import batch, mixture, perturb

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than such products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return mixture(tmp_path_factory.mktemp("mixture") / "files")


def loaded(files: tuple[Path, Path], dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm") -> Any:
    return Qwen3MoeForCausalLM.from_pretrained(files[0], dtype=dtype, experts_implementation=implementation)


def attached(files: tuple[Path, Path], *given: Any) -> Any:
    return frodctl.attach(loaded(files, *given), files[1])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch("llama")["input_ids"]).logits
    return found


def grads(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch("llama")).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def experts_of(model: Any) -> FrodExperts:
    return next(layer for layer in frod_layers(model).values() if isinstance(layer, FrodExperts))


def layer_grads(layer: FrodExperts, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of x and of what is trained, where tokens go to the same experts whatever the dtype."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=generator).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in x])
    weights = torch.rand(64, 2, generator=generator).to(dtype)
    layer.zero_grad()
    layer(x, index, weights).float().square().sum().backward()
    return [x.grad.float(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]  # type: ignore[union-attr]


def far(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of the differences, each of its tensor's size."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_checkpointing(implementation: str, reentrant: bool, files: tuple[Path, Path]) -> None:
    model = attached(files, torch.float32, implementation).train()
    perturb(model)
    expected = grads(model)
    assert any(name.endswith("experts.adapters.default.updates.down_proj.values") for name in expected)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = grads(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str, files: tuple[Path, Path]) -> None:
    model = attached(files, torch.bfloat16, implementation)
    assert torch.equal(logits(model), logits(loaded(files, torch.bfloat16, implementation)))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    exact = attached(files)
    for each in (model, exact):
        perturb(each)
    assert far(layer_grads(experts_of(model), torch.bfloat16), layer_grads(experts_of(exact))) < 0.03


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str, files: tuple[Path, Path]) -> None:
    base, model = loaded(files, torch.float32, implementation), attached(files, torch.float32, implementation)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base))
    perturb(model)
    exact = layer_grads(experts_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert far(layer_grads(experts_of(model)), exact) < 0.03


@pytest.mark.filterwarnings("ignore")
def test_compile(files: tuple[Path, Path]) -> None:
    """Without a break, as transformers' own; `eager` is broken at every expert there too."""
    model = attached(files)
    perturb(model)
    layer = experts_of(model)
    expected = layer_grads(layer)
    found = layer_grads(torch.compile(layer, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]
    assert far(found, expected) < 1e-5


def test_weights_that_are_trained_themselves_too(files: tuple[Path, Path]) -> None:
    layer = experts_of(attached(files))
    layer.base_layer.gate_up_proj.requires_grad_()
    with pytest.raises(frodctl.UsageError, match="freeze it"):
        layer_grads(layer)


def test_an_expert_without_tokens_keeps_its_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    """In training as in the merged checkpoint, while the layer's other experts are trained."""
    model = attached(files)
    layer = experts_of(model)
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model))
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        layer(x, torch.tensor([[0, 1]] * 16), torch.ones(16, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _, update in layer.stacks():
        assert update.delta[:2].all()
        assert not update.delta[2:].any()
        assert not update.values[2:].any()
    frodctl.save_adapter(model, tmp_path / "adapter")
    frodctl.merge(files[0], tmp_path / "adapter", tmp_path / "merged", basis=files[1])
    before, after = (load_file(folder / "model.safetensors") for folder in (files[0], tmp_path / "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    projections = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.0.mlp.experts.{e}.{name}.weight" for e in (0, 1) for name in projections}


def test_a_router_is_trained_as_a_module(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = frodctl.attach(loaded(files), files[1], modules_to_save=["gate"])
    perturb(model)
    frodctl.save_adapter(model, tmp_path / "adapter")
    frodctl.merge(files[0], tmp_path / "adapter", tmp_path / "merged", basis=files[1])
    merged = loaded((tmp_path / "merged", files[1]))
    assert not torch.equal(merged.model.layers[0].mlp.gate.weight, loaded(files).model.layers[0].mlp.gate.weight)
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_no_pattern_is_selected_for_experts(files: tuple[Path, Path]) -> None:
    with pytest.raises(frodctl.UsageError, match="one of a layer's experts"):
        frodctl.select_pattern(attached(files), [batch("llama")])


class OwnExperts(nn.Module):
    """A mixture as code that comes with a model has it: a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(32, 24), "w2": nn.Linear(24, 32)}) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        sums = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, choice = torch.where(chosen == number)
            y = expert["w2"](expert["w1"](x[tokens]).relu())  # type: ignore[index]
            sums = sums.index_add(0, tokens, y * weights[tokens, choice, None])
        return x + sums


def test_a_list_of_experts_has_ordinary_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(OwnExperts() for _ in range(2))})
    base = save_checkpoint(tmp_path / "base", model.state_dict(), {})
    frodctl.decompose(base, tmp_path / "b.safetensors", target_modules="all-linear", sparsity=0.05)
    x = torch.randn(16, 32)

    def output() -> torch.Tensor:
        y = x
        for layer in model["layers"]:  # type: ignore[union-attr]
            y = layer(y)
        return y.detach()

    before = output()
    frodctl.attach(model, tmp_path / "b.safetensors")
    assert len(frod_layers(model)) == 2 * 4 * 2
    assert torch.equal(output(), before)
    perturb(model)
    trained = output()
    assert not torch.allclose(trained, before, atol=1e-3)
    frodctl.save_adapter(model, tmp_path / "adapter")
    frodctl.merge(base, tmp_path / "adapter", tmp_path / "merged", basis=tmp_path / "b.safetensors")
    frodctl.training.detach(model)
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert torch.allclose(output(), trained, atol=1e-5)

"""A mixture of experts in training: what its surroundings do to a model, they may do to its experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

import frodctl
from frodctl.training.attached import frod_layers
from frodctl.training.experts import FrodExperts
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

"""The trainable experts against transformers' own forward over W', and float64 autograd of W'."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from frodctl.training.experts import ExpertsUpdate, FrodExperts, Part, Stacks, holds_experts
from frodctl.training.layer import Basis, Pattern

EXPERTS, HIDDEN, INNER = 5, 16, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than such products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def experts_class(*, has_gate: bool, has_bias: bool, transposed: bool, concatenated: bool, norm: bool) -> type:
    """A class as transformers' are, with ``eager`` as its own forward."""

    @use_experts_implementation(
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=transposed,
        is_concatenated=concatenated,
        has_post_expert_norm=norm,
    )
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            rows = 2 * INNER if has_gate else INNER
            first = "gate_up_proj" if has_gate else "up_proj"
            for name, m, n in ((first, rows, HIDDEN), ("down_proj", HIDDEN, INNER)):
                shape = (EXPERTS, n, m) if transposed else (EXPERTS, m, n)
                setattr(self, name, nn.Parameter(torch.randn(shape) / n**0.5, requires_grad=False))
                if has_bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, m), requires_grad=False))
            self.act_fn = nn.SiLU()
            if norm:
                self.post_expert_norm = nn.LayerNorm(HIDDEN)

        if not concatenated:

            def _apply_gate(self, gate_up: Tensor) -> Tensor:
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return dense(self, {}, hidden_states, top_k_index, top_k_weights)

    return Experts


def dense(base: Any, weights: dict[str, Tensor], x: Tensor, index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' sum for each token, one expert after the other, with these weights in the place of the base's."""

    def multiply(x: Tensor, expert: Tensor, name: str) -> Tensor:
        W = weights.get(name, getattr(base, name))[expert]
        y = x @ W if base.is_transposed else nn.functional.linear(x, W)
        return y + getattr(base, f"{name}_bias")[expert].to(y) if base.has_bias else y

    sums = torch.zeros_like(x)
    mask = nn.functional.one_hot(index, EXPERTS).permute(2, 1, 0)
    for expert in mask.sum(dim=(-1, -2)).nonzero()[:, 0]:
        k, tokens = torch.where(mask[expert])
        y = multiply(x[tokens], expert, "gate_up_proj" if base.has_gate else "up_proj")
        y = multiply(base._apply_gate(y) if base.has_gate else base.act_fn(y), expert, "down_proj")
        y = base.post_expert_norm(y) if base.has_post_expert_norm else y
        sums = sums.index_add(0, tokens, y * top_k_weights[tokens, k, None])
    return sums


def parts_of(base: Any, apart: bool) -> list[Part]:
    if not base.has_gate:
        return [Part("up_proj"), Part("down_proj")]
    if not apart:
        return [Part("gate_up_proj"), Part("down_proj")]
    whole = 2 * INNER
    halves = [(0, INNER, 1), (INNER, whole, 1)] if base.is_concatenated else [(0, whole, 2), (1, whole, 2)]
    return [*(Part("gate_up_proj", rows) for rows in halves), Part("down_proj")]


def attached(base: Any, parts: list[Part], dtype: torch.dtype = torch.float32) -> FrodExperts:
    """Experts with a random basis and pattern for each part."""
    rng = np.random.default_rng(0)
    updates = {}
    for part in parts:
        n = INNER if part.parameter == "down_proj" else HIDDEN
        V = np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)
        basis = Basis(V, part.name, "sha256:0", EXPERTS, dtype, torch.device("cpu"))
        indices = np.stack(np.unravel_index(rng.permutation(n * n)[: n * n // 5], (n, n))).astype(np.int64)
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, (EXPERTS, n)).astype(np.float32))
        scales[0, 0] = 0  # a null direction
        updates[part] = ExpertsUpdate(basis, Pattern(indices, n, torch.device("cpu")), scales)
    layer = FrodExperts(base)
    layer.adapters["default"] = Stacks(updates)
    layer.active = "default"
    return layer


def routing(kind: str, tokens: int = 9, k: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    if kind == "one has none, one all":
        index = torch.stack([torch.full((tokens,), 3), torch.arange(tokens) % 3], dim=1)
    return index, torch.rand(tokens, k, generator=generator)


FLAGS = [
    {"has_gate": g, "has_bias": b, "transposed": t, "concatenated": c, "norm": n}
    for g, b, t, c, n in itertools.product((True, False), repeat=5)
    if g or c
]
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


def make(flags: dict[str, bool], implementation: str) -> Any:
    torch.manual_seed(0)
    return experts_class(**flags)(SimpleNamespace(_experts_implementation=implementation))


@pytest.mark.parametrize(
    ("implementation", "dtype"), [*((each, torch.float32) for each in IMPLEMENTATIONS), ("grouped_mm", torch.bfloat16)]
)
def test_the_base_bit_for_bit_before_training(implementation: str, dtype: torch.dtype) -> None:
    for flags, apart in itertools.product(FLAGS, (False, True)):
        base = make(flags, implementation).to(dtype)
        layer = attached(base, parts_of(base, apart), dtype)
        x = torch.randn(9, HIDDEN).to(dtype)
        index, weights = routing("usual")
        assert torch.equal(layer(x, index, weights.to(dtype)), base(x, index, weights.to(dtype))), (flags, apart)


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("grouped_mm", "usual"), ("batched_mm", "one has none, one all"), ("eager", "one has none, one all")],
)
def test_values_and_gradients_are_those_of_the_updated_weights(implementation: str, kind: str) -> None:
    for flags, apart in itertools.product(FLAGS, (False, True)):
        base = make(flags, implementation)
        layer = attached(base, parts_of(base, apart))
        for parameter in layer.adapters.parameters():
            parameter.data.normal_(std=0.1)
        index, weights = routing(kind)
        x = torch.randn(9, HIDDEN, requires_grad=True)
        y = layer(x, index, weights)
        y.square().sum().backward()
        exact = make(flags, "eager").double()
        x64 = x.detach().double().requires_grad_()
        found, numbers = _trained_weights(exact, layer)
        y64 = dense(exact, found, x64, index, weights.double())
        y64.square().sum().backward()
        assert _close(y, y64) < 1e-5, (flags, apart)
        assert _close(x.grad, x64.grad) < 1e-5, (flags, apart)
        for part, update in layer.stacks():
            delta, values = numbers[part]
            assert _close(update.delta.grad, delta.grad) < 1e-5, (flags, part)
            assert _close(update.values.grad, values.grad) < 1e-5, (flags, part)


def _trained_weights(exact: Any, layer: FrodExperts) -> tuple[dict[str, Tensor], dict[Part, tuple[Tensor, Tensor]]]:
    """W' of every parameter in float64, by the definition, and the numbers that it is a function of."""
    found: dict[str, Tensor] = {}
    numbers = {}
    for part, update in layer.stacks():
        delta, values = (p.detach().double().requires_grad_() for p in (update.delta, update.values))
        numbers[part] = delta, values
        V, scales = update.basis.V.double(), update.base_scales.double()
        rows, columns = update.pattern.indices()
        stored = found.get(part.parameter, getattr(exact, part.parameter))
        W = stored if not exact.is_transposed else stored.mT
        new = []
        for e in range(EXPERTS):
            S = torch.zeros(len(V), len(V), dtype=torch.float64).index_put((rows, columns), values[e])
            Q = torch.diag(torch.where(scales[e] > 0, 1 / scales[e], 0)) @ (S + torch.diag(delta[e]))
            chosen = slice(None) if part.rows is None else slice(*part.rows)
            change = W[e][chosen] @ torch.linalg.inv(V).T @ Q @ V.T
            whole = torch.zeros_like(W[e])
            whole[chosen] = 1
            new.append(W[e] + whole.masked_scatter(whole.bool(), change))
        W = torch.stack(new)
        found[part.parameter] = W.mT if exact.is_transposed else W
    return found, numbers


def _close(found: Any, expected: Any) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def test_experts_are_told_by_what_transformers_dispatches_them_by() -> None:
    assert holds_experts(make(FLAGS[0], "eager"))
    assert not holds_experts(nn.Linear(3, 3))

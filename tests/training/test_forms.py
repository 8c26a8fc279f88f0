"""A layer in each of its forms against float64 autograd of W' itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from frodctl.arrays import from_torch
from frodctl.training.layer import Basis, FrodLinear, Pattern, Update

N, NNZ = 7, 9
FORMS = ("input", "weight", "weight+U", "auto")
SHAPES = ((N,), (5, N), (2, 3, N), (2, 2, 3, N), (0, N), (2, 0, N), (40, N))
CPU = torch.device("cpu")


@dataclass
class Problem:
    """A layer in a form, and what it is to compute."""

    layer: FrodLinear
    V: Tensor
    D: Tensor

    @property
    def update(self) -> Update:
        found = self.layer.update()
        assert found is not None
        return found

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, and δ and the values of S in float64 that it depends on."""
        update, base = self.update, self.layer.base_layer
        weight: Any = base.weight
        W = (weight.T if isinstance(base, Conv1D) else weight).detach().double()
        delta, values = (p.detach().double().requires_grad_() for p in (update.delta, update.values))
        rows, columns = update.pattern.indices()
        M = torch.diag(delta).index_put((rows, columns), values, accumulate=True)
        Q = update.scale * update.inverse_scales.double()[:, None] * M
        bias: Any = base.bias
        return F.linear(x, W + W @ self.D @ Q @ self.V.T, bias), delta, values


def problem(form: str, m: int, *, conv: bool, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = random(m, N)
    W[:, 0] = 0  # and with V's rows and columns apart there, λ_0 = 0
    V = random(N, N)
    V[0], V[:, 0] = 0, 0
    V[0, 0] = 1
    base: Any = Conv1D(m, N) if conv else nn.Linear(N, m, bias=bias)
    base = base.to(dtype).requires_grad_(False)
    base.weight.copy_(W.T if conv else W)
    if bias:
        base.bias.copy_(random(m))
    basis = Basis(from_torch(V), "c", "", 1, dtype, CPU)
    scales = (W @ torch.linalg.inv(V).T).norm(dim=0).float()
    assert scales[0] == 0
    flat = torch.randperm(N * N - N, generator=generator)[:NNZ]
    rows, columns = flat // (N - 1), flat % (N - 1)
    pattern = Pattern(from_torch(torch.stack([rows, columns + (columns >= rows)])), N, CPU)
    layer = FrodLinear(base)
    update = layer.adapters["a"] = Update(basis, pattern, scales, form=form)
    layer.active, update.scale = "a", 0.5
    with torch.no_grad():
        update.delta.copy_(random(N))
        update.values.copy_(random(NNZ))
    return Problem(layer, V, torch.linalg.inv(V).T)


def inputs(conv: bool) -> Iterator[Tensor]:
    """Of all shapes, not contiguous either; transformers' Conv1D views its input, which not every one bears."""
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield x
        if x.numel():
            yield torch.randn((*shape, 2), generator=generator, dtype=torch.float64)[..., 0]
        if x.numel() and not conv:
            yield torch.randn(shape[::-1], generator=generator, dtype=torch.float64).permute(*range(x.dim())[::-1])


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("m", [3, N, 12])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients(form: str, m: int, conv: bool) -> None:
    """With and without bias, gradient of x, numbers one by one frozen; twice, the second time with W' at hand."""
    for number, (bias, x) in enumerate(product((True,) if conv else (True, False), inputs(conv))):
        through_x = number % 3 != 1
        p = problem(form, m, conv=conv, bias=bias)
        own, theirs = (x.detach().clone(memory_format=torch.preserve_format) for _ in range(2))
        for given in (own, theirs):
            given.requires_grad_(through_x)
        expected, delta, values = p.reference(theirs)
        G = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        expected.backward(G)
        for _ in range(2):
            p.layer.zero_grad()
            own.grad = None
            y = p.layer(own)
            y.backward(G)
            pairs = [(y, expected), (p.update.delta.grad, delta.grad), (p.update.values.grad, values.grad)]
            for found, reference in [*pairs, (own.grad, theirs.grad)] if through_x else pairs:
                assert found is not None
                assert reference is not None
                assert found.shape == reference.shape
                assert (found - reference).norm() <= 1e-6 * reference.norm(), (form, m, conv, bias, x.shape)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_frozen(form: str) -> None:
    """Of δ and S alone, either is trained as if both were."""
    x = torch.randn(40, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = problem(form, 5, conv=False, bias=True)
    p.layer(x).square().sum().backward()
    both = {name: q.grad.clone() for name, q in p.update.named_parameters() if q.grad is not None}
    assert set(both) == {"delta", "values"}
    for name in both:
        p.layer.zero_grad()
        p.update.requires_grad_(False)
        p.update.get_parameter(name).requires_grad_(True)
        p.layer(x).square().sum().backward()
        (found,) = [parameter.grad for parameter in p.update.parameters() if parameter.grad is not None]
        assert torch.equal(found, both[name])


@pytest.mark.parametrize("form", FORMS)
def test_a_change_of_any_kind_is_seen(form: str) -> None:
    """By an optimizer's counted writes, behind torch's back, of the scale, of W, by a cast."""
    p = problem(form, 12, conv=False, bias=False)
    x = torch.randn(40, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def set_scale() -> None:
        p.update.scale = 0.25

    changes = (
        lambda: p.update.delta.data.mul_(2),
        lambda: from_torch(p.update.values.detach()).__imul__(2),
        set_scale,
        lambda: p.layer.base_layer.weight.mul_(3),
        lambda: p.layer.base_layer.load_state_dict({"weight": torch.ones(12, N)}),
        lambda: p.update._parameters.update(delta=nn.Parameter(p.update.delta.detach() + 1)),
    )
    for change in changes:
        with torch.no_grad():
            before = p.layer(x)
            change()
            found, (expected, _, _) = p.layer(x), p.reference(x)
        assert not torch.equal(found, before)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    p.layer.float()
    assert p.layer(x.float()).dtype == torch.float32


def test_a_layer_that_is_used_twice() -> None:
    """Both uses' gradients come together."""
    x = torch.randn(40, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = {}
    for form in FORMS:
        p = problem(form, N, conv=False, bias=True)
        p.layer(p.layer(x)).square().sum().backward()
        found[form] = p.update.delta.grad
    assert found["input"] is not None
    for gradient in found.values():
        assert torch.allclose(gradient, found["input"], rtol=1e-5)


def test_what_each_form_keeps() -> None:
    """W' once, and W D where that is asked for; by the input neither."""
    x = torch.randn(40, N, dtype=torch.float64, requires_grad=True)
    for form, matrices in {"input": 0, "weight": 1, "weight+U": 2}.items():
        p = problem(form, 12, conv=False, bias=False)
        p.layer(x)
        kept = p.update.kept
        held = [kept._weight, None if kept._columns is None else kept._columns[1]]
        assert sum(tensor is not None for tensor in held) == matrices
        if kept._weight is not None:
            saved: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                p.layer(x)
            shared = {t.data_ptr() for t in (*p.layer.parameters(), *p.layer.buffers(), *held, x) if t is not None}
            assert all(tensor.data_ptr() in shared or tensor.numel() <= N + NNZ for tensor in saved)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("m", [3, 12])
def test_bfloat16(m: int, autocast: bool) -> None:
    """Gradients as near to float64's as rounding x, W and ∂L/∂y to bfloat16 leaves them: a few per cent of norm."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, N, dtype=torch.float64, generator=generator).bfloat16().double()
    G = torch.randn(64, m, dtype=torch.float64, generator=generator).bfloat16().double()
    dtype = torch.float32 if autocast else torch.bfloat16
    for form in FORMS:
        p = problem(form, m, conv=False, bias=False, dtype=dtype)
        given = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = p.layer(given)
        assert y.dtype == torch.bfloat16
        y.backward(G.bfloat16())
        expected, delta, values = p.reference(x)
        expected.backward(G)
        for found, reference in ((p.update.delta.grad, delta.grad), (p.update.values.grad, values.grad)):
            assert found is not None
            assert reference is not None
            assert found.dtype == torch.float32
            assert (found - reference).norm() <= 0.05 * reference.norm(), form

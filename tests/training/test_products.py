"""Both forms of a layer against their definition with dense matrices, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frodctl.arrays import from_torch, to_torch
from frodctl.method.update import csr_pattern
from frodctl.training.products import Positions, corrected, projected, sampled_product, sparse_product, weight_side

N, M, TOKENS = 7, 5, 11


@dataclass(frozen=True)
class Problem:
    """A layer with random values everywhere."""

    X: Tensor
    W: Tensor
    bias: Tensor
    V: Tensor
    D: Tensor
    positions: Positions
    entries: Tensor
    Q: Tensor  #: dense, with the same entries


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = torch.randperm(N * N - N, generator=generator)[:9]
    rows = flat // (N - 1)
    columns = flat % (N - 1)
    indices = torch.stack([rows, columns + (columns >= rows)])
    rows, starts, columns = map(to_torch, csr_pattern(from_torch(indices), N)[:3])
    entries = random(9 + N)
    Q = torch.zeros(N, N, dtype=torch.float64)
    for row, column, entry in zip(rows.tolist(), columns.tolist(), entries.tolist(), strict=True):
        Q[row, column] += entry
    V = random(N, N)
    positions = Positions(rows, starts, columns)
    D = torch.linalg.inv(V).T.contiguous()
    return Problem(random(TOKENS, N), random(M, N), random(M), V, D, positions, entries, Q)


@pytest.fixture(params=["sparse", "dense"])
def capturing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The products by sparse rows, and as they are where a graph is captured or on a GPU."""
    dense = bool(request.param == "dense")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: dense)
    return dense


def test_sparse_and_sampled_products(problem: Problem, capturing: bool) -> None:
    p, X = problem, problem.X
    assert torch.allclose(sparse_product(p.positions, p.entries, X), X @ p.Q.T, rtol=1e-13)
    assert torch.allclose(sparse_product(p.positions, p.entries, X, transposed=True), X @ p.Q, rtol=1e-13)
    long = X.repeat(50, 1)
    assert torch.allclose(sparse_product(p.positions, p.entries, long), long @ p.Q.T, rtol=1e-13)
    A, B = problem.X.T, problem.X
    expected = (A @ B)[problem.positions.rows, problem.positions.columns]
    assert torch.allclose(sampled_product(problem.positions, A, B), expected, rtol=1e-13)


def test_a_position_given_twice_counts_twice(capturing: bool) -> None:
    """In the pattern as on the diagonal: as `frodctl.merge` has it."""
    rows, starts, columns = map(to_torch, csr_pattern(np.array([[0, 0, 1], [1, 1, 1]]), 2)[:3])
    found = sparse_product(Positions(rows, starts, columns), torch.ones(5), torch.eye(2))
    assert found.T.tolist() == [[1.0, 2.0], [0.0, 2.0]]


def test_the_input_side(problem: Problem, capturing: bool) -> None:
    p = problem
    expected = p.X @ (p.D @ p.Q @ p.V.T).T
    assert torch.allclose(corrected(projected(p.X, p.V), p.entries, p.D, p.positions), expected, rtol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_side(transposed: bool, problem: Problem, capturing: bool) -> None:
    p = problem
    updated = p.W + p.W @ p.D @ p.Q @ p.V.T
    W = p.W.T.contiguous() if transposed else p.W
    for bias in (p.bias, None):
        found = weight_side(p.X, p.entries, W, bias, p.V, p.D, p.positions, transposed)
        assert torch.allclose(found, p.X @ updated.T + (0 if bias is None else bias), rtol=1e-12)
    deep = p.X[:10].view(2, 5, N)
    found = weight_side(deep, p.entries, W, p.bias, p.V, p.D, p.positions, transposed)
    assert torch.allclose(found, deep @ updated.T + p.bias, rtol=1e-12)


@pytest.mark.parametrize("side", ["input", "weight", "transposed"])
def test_gradients(side: str, problem: Problem, capturing: bool) -> None:
    """By finite differences."""
    p = problem

    def function(X: Tensor, entries: Tensor) -> Any:
        if side == "input":
            return corrected(projected(X, p.V), entries, p.D, p.positions)
        transposed = side == "transposed"
        W = p.W.T.contiguous() if transposed else p.W
        return weight_side(X, entries, W, p.bias, p.V, p.D, p.positions, transposed)

    assert torch.autograd.gradcheck(function, (p.X.requires_grad_(), p.entries.requires_grad_()))


def test_float32_products_are_not_rounded_to_the_autocast_dtype(problem: Problem) -> None:
    """What leaves float16's range must not be computed in it, whatever the caller's autocast."""
    p = problem
    X, entries, V, D = (tensor.float() for tensor in (p.X * 1e4, p.entries, p.V, p.D))
    with torch.autocast("cpu", torch.float16):
        found = corrected(projected(X, V), entries, D, p.positions)
    expected = (p.X * 1e4) @ (p.D @ p.Q @ p.V.T).T
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-4 * expected.norm()

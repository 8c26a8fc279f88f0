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
from frodctl.training.products import (
    Factors,
    Positions,
    core,
    corrected,
    dual_columns,
    projected,
    sampled_product,
    sparse_product,
    trained_weight,
)

N, TOKENS = 7, 11


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

    def weight(self, W: Tensor, entries: Tensor, form: str) -> Tensor:
        """W' (m, n), from W stored as it is or transposed, with W D formed anew or at hand."""
        transposed = form == "transposed"
        B = dual_columns(self.W, self.D) if form == "with W D" else None
        factors = Factors(W.T if transposed else W, self.V, self.D, self.positions, transposed, B)
        found = trained_weight(factors, entries, W.dtype)
        return found.T if transposed else found


WEIGHTS = ("plain", "transposed", "with W D")


@pytest.fixture(params=[5, 9], ids=["wide", "tall"])
def problem(request: pytest.FixtureRequest) -> Problem:
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
    m = request.param
    return Problem(random(TOKENS, N), random(m, N), random(m), V, D, positions, entries, Q)


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
    assert torch.allclose(torch.cat([*core(p.positions, p.entries, p.V)], 1), p.Q @ p.V.T, rtol=1e-13)
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


@pytest.mark.parametrize("form", WEIGHTS)
def test_the_weight(form: str, problem: Problem, capturing: bool) -> None:
    p = problem
    assert torch.allclose(p.weight(p.W, p.entries, form), p.W + p.W @ p.D @ p.Q @ p.V.T, rtol=1e-12)


@pytest.mark.parametrize("form", ["input", *WEIGHTS])
def test_gradients(form: str, problem: Problem, capturing: bool) -> None:
    """By finite differences."""
    p = problem

    def by_input(X: Tensor, entries: Tensor) -> Any:
        return corrected(projected(X, p.V), entries, p.D, p.positions)

    def by_weight(W: Tensor, entries: Tensor) -> Any:
        return p.weight(W, entries, form)

    function, given = (by_input, p.X) if form == "input" else (by_weight, p.W)
    assert torch.autograd.gradcheck(function, (given.requires_grad_(), p.entries.requires_grad_()))


def test_float32_products_are_not_rounded_to_the_autocast_dtype(problem: Problem) -> None:
    """What leaves float16's range must not be computed in it, whatever the caller's autocast."""
    p = problem
    X, entries, V, D = (tensor.float() for tensor in (p.X * 1e4, p.entries, p.V, p.D))
    with torch.autocast("cpu", torch.float16):
        found = corrected(projected(X, V), entries, D, p.positions)
    expected = (p.X * 1e4) @ (p.D @ p.Q @ p.V.T).T
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-4 * expected.norm()

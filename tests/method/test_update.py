"""The two forms of the update against float64, in every dtype and for degenerate bases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frodctl.method.update import CategoryUpdate, Factors

CPU = torch.device("cpu")


def problem(m: int, n: int, nnz: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """W, V, indices, λ' and values: a basis of moderate condition, and λ' near the column norms of W V⁻ᵀ."""
    g = torch.Generator().manual_seed(seed)
    V = (torch.randn(n, n, generator=g) / n**0.5 + 2 * torch.eye(n)).to(dtype)
    W = torch.randn(m, n, generator=g).to(dtype)
    indices = torch.randint(0, n, (2, nnz), generator=g)
    start = torch.linalg.solve(V.double(), W.double().T).T.norm(dim=0)
    scales = (start * (1 + 0.1 * torch.randn(n, generator=g))).float()
    return W, V, indices, scales, 0.1 * float(start.mean()) * torch.randn(nnz, generator=g)


def assembled(blocks: object) -> torch.Tensor:
    """All rows, which must come in order and once."""
    parts = [(rows, block.double().clone()) for rows, block in blocks]  # type: ignore[attr-defined]
    position = 0
    for rows, block in parts:
        assert rows == slice(position, position + len(block))
        position += len(block)
    return torch.cat([block for _, block in parts])


def expected(W: torch.Tensor, V: torch.Tensor, indices: torch.Tensor, scales: torch.Tensor, values: torch.Tensor):  # type: ignore[no-untyped-def]
    """W' of the reconstruct form and W' − W of the delta form, in float64."""
    B = torch.linalg.solve(V.double(), W.double().T).T
    norms = B.norm(dim=0)
    S = torch.zeros(len(V), len(V), dtype=torch.float64).index_put_(tuple(indices), values.double(), accumulate=True)
    S_d = torch.zeros_like(S).index_put_(tuple(indices), values.to(V.dtype).double(), accumulate=True)
    U = torch.where(norms > 1e-12, B / norms, 0)
    whole = U.float().to(V.dtype).double() @ (S_d + torch.diag(scales.to(V.dtype).double())) @ V.double().T
    change = U @ (S + torch.diag(scales.double() - norms.to(V.dtype).double())) @ V.double().T
    return whole, change


@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 5, 24, 70]),
    n=st.sampled_from([1, 8, 33]),
    nnz=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 2**31),
)
@example(m=70, n=1, nnz=32, dtype=torch.float32, seed=1145)  # λ' and S cancel
def test_both_forms(m: int, n: int, nnz: int, dtype: torch.dtype, seed: int) -> None:
    W, V, indices, scales, values = problem(m, n, nnz, dtype, seed)
    whole, change = expected(W, V, indices, scales, values)
    update = CategoryUpdate(V, indices, CPU)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    delta = assembled(update.delta(W, scales, values))
    assert (delta - change).norm() <= tolerance * (change.norm() + W.double().norm())
    found = assembled(update.reconstruct(W, scales, values))
    # an entry of U at a tie may go to its other neighbour; a 16-bit W' would not show it
    flips = 0 if dtype in (torch.float32, torch.float64) else 1e-3
    assert (found - whole).norm() <= tolerance * (whole.norm() + W.double().norm()) + flips * whole.norm()


def test_more_rows_than_a_block_and_the_float32_product() -> None:
    """A wide bfloat16 basis is taken in float32; what comes out is right to float32."""
    W, V, indices, scales, values = problem(1500, 520, 300, torch.bfloat16, 0)
    update = CategoryUpdate(V, indices, CPU)
    assert update.D.dtype == torch.float32
    whole, change = expected(W, V, indices, scales, values)
    assert (assembled(update.delta(W, scales, values)) - change).norm() <= 1e-5 * change.norm()
    assert (assembled(update.reconstruct(W, scales, values)) - whole).norm() <= 2e-4 * whole.norm()


def test_with_the_scales_given_an_untouched_weight_does_not_move() -> None:
    W, V, indices, _, values = problem(20, 16, 9, torch.float32, 1)
    scales = torch.rand(16) + 0.5
    update = CategoryUpdate(V, indices, CPU)
    assert not assembled(update.delta(W, scales, torch.zeros_like(values), scales)).any()


def test_rows_of_a_null_direction_drop_out_and_its_columns_do_not() -> None:
    W, V, _, scales, _ = problem(20, 16, 0, torch.float32, 2)
    B = torch.linalg.solve(V.double(), W.double().T).T
    B[:, 3] = 0
    W = (B @ V.double().T).float()
    base = B.norm(dim=0).float()
    base[3] = 0
    for indices, moves in (([[3], [5]], False), ([[5], [3]], True)):
        update = CategoryUpdate(V, torch.tensor(indices), CPU)
        change = assembled(update.delta(W, base, torch.ones(1), base))
        assert bool(change.abs().max() > 0.01) == moves
    assert scales.numel() == 16


@pytest.mark.parametrize("given", [True, False], ids=["with λ", "without"])
@pytest.mark.parametrize("factor", [1e-6, 1e-14, 1e-20, 1e-30])
@pytest.mark.parametrize("n", [24, 520])
def test_the_change_of_a_weight_far_smaller_than_its_basis(factor: float, given: bool, n: int) -> None:
    """No row drops out, and the change is right to rounding, relative to itself."""
    W, V, indices, _, values = problem(30, n, 40, torch.bfloat16, 6)
    assert (CategoryUpdate(V, indices, CPU).D.dtype == torch.float32) == (n > 512)
    W = (W.double() * factor).float()
    B = torch.linalg.solve(V.double(), W.double().T).T
    start = B.norm(dim=0)
    base = start.float() if given else start.to(V.dtype)
    scales = base.float() + 0.1
    S = torch.zeros(n, n, dtype=torch.float64).index_put_(tuple(indices), values.double(), accumulate=True)
    change = B / start @ (S + torch.diag(scales.double() - base.double())) @ V.double().T
    found = assembled(CategoryUpdate(V, indices, CPU).delta(W, scales, values, base if given else None))
    assert (found - change).norm() <= 1e-5 * change.norm()


def test_rows_that_are_rounding_drop_out_of_the_change() -> None:
    """Where λ is not given: direction 3 is no part of W, at any scale."""
    W, V, *_ = problem(20, 16, 0, torch.float32, 2)
    B = torch.linalg.solve(V.double(), W.double().T).T
    B[:, 3] = 0
    for factor in (1.0, 1e-20):
        W = B @ V.double().T * factor
        for indices, moves in (([[3], [5]], False), ([[5], [3]], True)):
            update = CategoryUpdate(V, torch.tensor(indices), CPU)
            start = update.base_scales(W)
            change = assembled(update.delta(W, start, torch.ones(1)))
            assert bool(change.abs().max() > 0.01) == moves


def test_peft_has_no_columns_of_u_below_1e_12() -> None:
    """So the operator that it trains has none, nor have the factors that its layers are given."""
    W, V, indices, scales, values = problem(24, 16, 9, torch.float32, 7)
    small = W * 1e-14
    assert not assembled(CategoryUpdate(V, indices, CPU).reconstruct(small, scales, values)).any()
    assert not Factors(V, CPU)(small)[0].any()


def test_a_singular_basis_takes_the_pseudo_inverse() -> None:
    W, V, indices, scales, values = problem(20, 16, 9, torch.float32, 3)
    V[:, 4] = 0
    update = CategoryUpdate(V, indices, CPU)
    pseudo = torch.linalg.pinv(V.double(), rtol=1e-6).T
    assert torch.allclose(update.D, pseudo)
    assert torch.isfinite(assembled(update.reconstruct(W, scales, values))).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_any_stride(transposed: bool) -> None:
    W, V, indices, scales, values = problem(24, 24, 9, torch.float32, 4)
    update = CategoryUpdate(V, indices, CPU)
    plain = assembled(update.reconstruct(W, scales, values))
    strided = W.T.contiguous().T if transposed else torch.stack([W, W], dim=1)[:, 1]
    assert torch.equal(assembled(update.reconstruct(strided, scales, values)), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition", [1, 1e4])
@pytest.mark.parametrize("unused", [False, True])
def test_the_factors(dtype: torch.dtype, condition: float, unused: bool) -> None:
    """To float32 before U is rounded, whichever way it is computed; U is 0 in a direction that W does not use."""
    W, V, *_ = problem(48, 32, 0, dtype, 4)
    if condition > 1:
        V = (V.double() * torch.logspace(0, -torch.tensor(condition).log10(), 32)).to(dtype)
    if unused:
        V, W = torch.eye(32, dtype=dtype), W.clone()
        W[:, 3] = 0
    B = torch.linalg.solve(V.double(), W.double().T).T
    norms = B.norm(dim=0)
    U, scales = Factors(V, CPU)(W)
    assert (scales - norms).norm() <= 2e-6 * norms.norm()
    expected = torch.where(norms > 1e-12, B / norms, 0)
    rounding = max(torch.finfo(dtype).eps, 2e-6)
    assert U.dtype == dtype
    assert (U.double() - expected).norm() <= rounding * expected.norm()
    assert not unused or not U[:, 3].any()


def test_the_factors_of_a_singular_basis() -> None:
    V = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    U, scales = Factors(V, CPU)(torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    assert torch.equal(U, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert torch.equal(scales, torch.tensor([2.0, 3.0, 0.0]))

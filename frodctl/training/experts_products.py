"""The products under trained experts, each for all routed pairs, which are in groups by their expert.

They are operators of their own, so that a compiled graph has a place for what depends on how many pairs an expert has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from frodctl.training.products import Positions, sampled_product, sparse_product


def experts_product(
    Z: Tensor, entries: Tensor, D: Tensor, positions: Positions, counts: Tensor, W: Tensor | None = None
) -> Tensor:
    """D Q_e z, or W_e D Q_e z, for the z = Vᵀx of every pair; differentiable in Z and in the entries of every Q_e.

    Parameters
    ----------
    Z : Tensor, (pairs, n)
    entries : Tensor, (experts, nnz + n), float32
    D : Tensor, (n, n), Z's dtype
    positions : Positions
        Of the entries.
    counts : Tensor, (experts,), int64
        How many pairs each expert has.
    W : Tensor, (experts, m, n), optional

    Returns
    -------
    Tensor, (pairs, n) or (pairs, m), Z's dtype
    """
    found: Tensor = _forward(Z, entries, D, *positions, counts, W)
    return found


@torch.library.custom_op("frodctl::experts_product", mutates_args=())
def _forward(
    Z: Tensor,
    entries: Tensor,
    D: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    counts: Tensor,
    W: Tensor | None,
) -> Tensor:
    positions = Positions(rows, row_starts, columns)
    result = _result(Z, D, W)
    with torch.autocast(Z.device.type, enabled=False):
        for expert, group in _groups(counts):
            X = sparse_product(positions, entries[expert], _by_columns(Z[group]))
            for A in _factors(D, W, expert, len(X)):
                X = X @ A.T
            result[group] = X
    return result


@torch.library.custom_op("frodctl::experts_product_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    Z: Tensor,
    entries: Tensor,
    D: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    counts: Tensor,
    W: Tensor | None,
) -> tuple[Tensor, Tensor]:
    positions = Positions(rows, row_starts, columns)
    of_Z, of_entries = torch.empty_like(Z), torch.zeros_like(entries)
    with torch.autocast(Z.device.type, enabled=False):
        for expert, group in _groups(counts):
            G = gradient[group].T
            for A in reversed(_factors(D, W, expert, G.shape[1])):
                G = A.T @ G
            of_Z[group] = sparse_product(positions, entries[expert], G.T, transposed=True)
            of_entries[expert] = sampled_product(positions, G, _by_columns(Z[group]))
    return of_Z, of_entries


def _result(Z: Tensor, D: Tensor, W: Tensor | None) -> Tensor:
    return Z.new_empty(len(Z), D.shape[0] if W is None else W.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors), None, None, None, None, None, None


_forward.register_fake(lambda Z, entries, D, *others: _result(Z, D, others[-1]))
_backward.register_fake(lambda gradient, Z, entries, *others: (torch.empty_like(Z), torch.empty_like(entries)))
_forward.register_autograd(_gradients, setup_context=_keep)


def _groups(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has any pairs, and which these are."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _by_columns(X: Tensor) -> Tensor:
    """The same numbers, with those of a column together, of which sparse products are made fastest."""
    return X.T.contiguous().T


def _factors(D: Tensor, W: Tensor | None, expert: int, pairs: int) -> list[Tensor]:
    """What a group is multiplied by after Q, one after the other: D and W_e, or, of fewer operations, W_e D."""
    if W is None:
        return [D]
    own = W[expert].to(D.dtype)
    m, n = own.shape
    return [own @ D] if m * n < pairs * n else [D, own]

"""A layer whose weight is made of several of the checkpoint's, one above the other, each trained by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frodctl.training.layer import FrodLinear, Update, changes, holds_matrix

Rows = tuple[int, int]


class Parts(nn.Module):
    """What one adapter trains of a layer: an update for each of these rows, from and to, in their order."""

    def __init__(self, updates: Sequence[Update], rows: Sequence[Rows]) -> None:
        super().__init__()
        self.updates = nn.ModuleList(updates)
        self.rows = tuple(rows)

    def update(self, number: int) -> Update:
        """That of the rows with this number."""
        found = self.updates[number]
        assert isinstance(found, Update)
        return found

    def items(self) -> list[tuple[Rows, Update]]:
        """Rows, and their update."""
        return [(rows, self.update(number)) for number, rows in enumerate(self.rows)]


class FusedFrodLinear(FrodLinear):
    """A base layer that computes W x + b, with updates of rows of W active at a time, or none.

    Every part is one more product of the base layer, whatever that holds: W_j x_j + b_j are rows of W x_j + b. So the
    output is at first the base's, bit for bit.
    """

    def update(self, name: str | None = None) -> None:
        """There is not one update of such a layer."""

    def parts(self, name: str | None = None) -> Parts:
        """Those of the adapter with this name, or of the active one; none where it leaves this layer alone."""
        name = name or self.active
        found = self.adapters[name] if name in self.adapters else Parts([], [])
        assert isinstance(found, Parts)
        return found

    def _changing(self) -> list[tuple[Rows, Update]]:
        """The parts that change anything now."""
        return [(rows, u) for rows, u in self.parts().items() if u.scale != 0] if self.enabled else []

    @property
    def weight(self) -> Tensor:
        """W', as for `FrodLinear`."""
        W: Tensor = self.base_layer.weight  # type: ignore[assignment]
        changing = self._changing() if self.gives_weight and holds_matrix(self.base_layer) else []
        if not changing:
            return W
        return _in_order(W, [(rows, update.weight(_rows_of(W, rows))) for rows, update in changing], dim=0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.base_layer(x, *args, **kwargs)
        changed = []
        for (start, stop), update in self._changing():
            shifted = self.base_layer(update.shifted(x), *args, **kwargs)
            changed.append(((start, stop), shifted[..., start:stop]))
        return _in_order(y, changed, dim=-1) if changed else y

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W' of a dense base layer and an adapter, each part rounded once."""
        W: Tensor = self.base_layer.weight  # type: ignore[assignment]
        parts = [(rows, u.merged_weight(_rows_of(W, rows))) for rows, u in self.parts(name).items() if changes(u)]
        return _in_order(W, parts, dim=0)


def _rows_of(W: Tensor, rows: Rows) -> nn.Module:
    """What an update is asked for W' of: something that has these rows as its weight."""
    part = nn.Module()
    part.weight = W[slice(*rows)]
    return part


def _in_order(whole: Tensor, parts: Sequence[tuple[Rows, Tensor]], dim: int) -> Tensor:
    """``whole`` with the parts in their places along a dimension."""
    pieces, reached = [], 0
    for (start, stop), part in parts:
        pieces += [whole.narrow(dim, reached, start - reached), part]
        reached = stop
    return torch.cat([*pieces, whole.narrow(dim, reached, whole.shape[dim] - reached)], dim)

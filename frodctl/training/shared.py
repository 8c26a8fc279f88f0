"""One product with V for the layers that read one tensor."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from frodctl.training.products import projected


@dataclass
class _Kept:
    """A product, and what it is of."""

    x: weakref.ref[Tensor]
    V: Tensor
    state: tuple[object, ...]  #: what may change of x while it stays the same object
    layer: object  #: for which it was computed
    product: Tensor
    taken: int = 0

    def is_of(self, x: Tensor, V: Tensor) -> bool:
        return self.x() is x and self.V is V and self.state == _state(x)


def _state(x: Tensor) -> tuple[object, ...]:
    return x._version, x.requires_grad, torch.is_grad_enabled()


class SharedProduct:
    """Vᵀx for layers of one basis that are given the same x, one after another: computed for the first of them.

    Whether it is the same x is asked of x itself at every call, so that nothing is taken for granted of the model. The
    product depends on x and V alone, and saves nothing for its backward pass, which is one for all the layers: who
    finds it kept has what he would have computed, in the recomputed forward pass of a checkpoint too. It is kept until
    each of the layers has had it, or x is no more.

    Parameters
    ----------
    category : str
        Of the basis, for the warning where layers do not read the same x.
    """

    def __init__(self, category: str) -> None:
        self.category = category
        self.layers = 0  #: how many take it
        self._kept: _Kept | None = None

    def of(self, layer: object, x: Tensor, V: Tensor) -> Tensor:
        """x V (tokens, n) in V's dtype, for x (…, n) as the layer is given it."""
        if torch.compiler.is_compiling() or x.is_inference():  # a compiled graph has it once; no versions
            return projected(x, V)
        kept = self._kept
        if kept is None or not kept.is_of(x, V):
            self._warn_of(kept, layer)
            kept = _Kept(weakref.ref(x, self._forget), V, _state(x), layer, projected(x, V))
        kept.taken += 1
        self._kept = kept if kept.taken < self.layers else None
        return kept.product

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept.x is x:
            self._kept = None

    def _warn_of(self, kept: _Kept | None, layer: object) -> None:
        """Say so where the layer is given another tensor than the one before it, which is still there."""
        if kept is not None and kept.layer is not layer and kept.x() is not None:
            warnings.warn(
                f"{self.category}: layers with this basis are given different tensors by one block, so that Vᵀx is "
                "computed for each of them; decompose without `share_input`, which gains nothing here",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": None}

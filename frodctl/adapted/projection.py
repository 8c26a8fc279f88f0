"""Where a category's V and pattern come from: the adapter, a basis file, or PEFT's own routine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from frodctl.adapted import opening
from frodctl.adapted.matching import Weight
from frodctl.adapted.opening import Source
from frodctl.adapted.positions import positions_of
from frodctl.arrays import DTYPES, from_torch, to_torch
from frodctl.checkpoint import names, stream
from frodctl.checkpoint.records import Checkpoint
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.fields import is_alpha

if TYPE_CHECKING:
    import torch

    from frodctl.arrays import HostArray


class Projections:
    """V and pattern of every category of every adapter over a base."""

    def __init__(self, checkpoint: Checkpoint, weights: Sequence[Weight]) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self._positions: dict[int, dict[str, HostArray]] = {}

    def of(self, source: Source, category: str, dtype: str) -> tuple[HostArray, HostArray]:
        """V (n, n) and the positions of S (2, nnz) of one category.

        A V that is not the adapter's own is rounded for PEFT's adapters, to the dtype that the base had in training:
        ``dtype``, the base weight's (the format's name), unless the source says another.

        Raises
        ------
        InvalidInput
            As `opening.V_of` and `positions_of`; or PEFT's routine gives NaN or Inf.
        """
        adapter = source.adapter
        recomputed = source.recompute and category not in adapter.V
        V = self._recomputed(source, category) if recomputed else opening.V_of(adapter, source.basis, category)
        if category not in adapter.V and adapter.provenance is None:
            V = _rounded(V, source.projection_dtype or dtype)
        if not np.isfinite(V).all():
            raise InvalidInput(f"{adapter.name}: V of {category} holds NaN or Inf")
        if id(source) not in self._positions:
            self._positions[id(source)] = positions_of(adapter, source.basis)
        return V, self._positions[id(source)][category]

    def _recomputed(self, source: Source, category: str) -> HostArray:
        """V as PEFT computes it as it loads the adapter: from float32 copies of the base's weights, on the CPU."""
        routine = _peft_routine()
        layers: dict[int, torch.Tensor] = {}
        targets = {part.trained.module: w.target for w in self.weights for part in w.parts if part.source is source}
        assert self.checkpoint.root is not None
        for number, module in enumerate(source.adapter.modules):
            if module.category == category:  # PEFT keeps the last where a layer has several
                target = targets[module.module]
                weight = stream.read_tensor(self.checkpoint.root, target.stored)
                layer = names.layer_index(module.module)
                W = weight.T if target.transposed else weight
                layers[number if layer is None else layer] = to_torch(W.astype(np.float32))
        alpha = source.adapter.config.get("regularization_alpha", 1e-3)
        if not is_alpha(alpha):
            raise InvalidInput(f"{source.adapter.name}: its config's regularization_alpha is {alpha!r}")
        return from_torch(routine([layers[number] for number in sorted(layers)], alpha))


@np.errstate(over="ignore")  # infinity is found where V is checked
def _rounded(V: HostArray, dtype: str) -> HostArray:
    return V.astype(DTYPES[dtype])


def _peft_routine() -> Callable[[list[torch.Tensor], float], torch.Tensor]:
    try:
        from peft.tuners.frod.model import _projection_from_weights
    except ImportError:
        raise FrodctlError(
            "`recompute_projection` runs PEFT's own routine: pip install 'frodctl[peft]' (tested with peft 0.21)"
        ) from None
    routine: Callable[[list[torch.Tensor], float], torch.Tensor] = _projection_from_weights
    return routine

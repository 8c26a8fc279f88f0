"""Where a category's V and pattern come from: the adapter, a basis file, or PEFT's own routine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frodctl.checkpoint import names, stream
from frodctl.checkpoint.source import Checkpoint
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import Adapter
from frodctl.jobs.merge.plan import Source, Weight
from frodctl.method.pattern import patterns


class Projections:
    """V and pattern of every category of every adapter over a base."""

    def __init__(self, checkpoint: Checkpoint, weights: Sequence[Weight]) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self._drawn: dict[int, dict[str, Tensor]] = {}

    def of(self, source: Source, category: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """V (n, n) and the positions of S (2, nnz) of one category.

        A V that is not the adapter's own is rounded to ``dtype``, the base weight's, for PEFT's adapters: that is
        what they were trained with.

        Raises
        ------
        InvalidInput
            A position outside the matrix, NaN or Inf, or fewer positions than values.
        """
        adapter = source.adapter
        if category in adapter.bases:
            V = adapter.tensor(adapter.bases[category])
        elif source.basis is not None:
            V = source.basis.tensor(f"V.{category}")
            if stream.digest(V) != source.basis.metadata.basis[category]:
                raise InvalidInput(f"{source.basis.path}: V.{category} is damaged: its digest is not the recorded one")
        else:
            V = self._recomputed(source, category)
        if category not in adapter.bases and adapter.provenance is None:
            V = V.to(dtype)
        if not torch.isfinite(V).all():
            raise InvalidInput(f"{adapter.name}: V of {category} holds NaN or Inf")
        return V, self._positions(source, category)

    def _positions(self, source: Source, category: str) -> Tensor:
        adapter = source.adapter
        if category in adapter.indices:
            positions: Tensor = adapter.tensor(adapter.indices[category])
        else:
            if id(source) not in self._drawn:
                self._drawn[id(source)] = _drawn(source)
            positions = self._drawn[id(source)][category]
        holder = source.basis.path if source.basis and category not in adapter.indices else adapter.name
        adapter.check_positions(category, positions, holder)
        n = adapter.categories[category]
        if positions.numel() and not (positions.min() >= 0 and positions.max() < n):
            raise InvalidInput(f"{adapter.name}: positions of {category} lie outside the {n} x {n} matrix")
        for module in adapter.modules:
            count = module.values.shape[0] if module.values else positions.shape[1]
            if module.category == category and count != positions.shape[1]:
                raise InvalidInput(
                    f"{adapter.name}: {module.module} has {count} sparse values for the {positions.shape[1]} positions "
                    f"of {category}"
                )
        return positions

    def _recomputed(self, source: Source, category: str) -> Tensor:
        """V as PEFT computes it as it loads the adapter: from float32 copies of the base's weights, on the CPU."""
        routine = _peft_routine()
        layers: dict[int, Tensor] = {}
        targets = {part.trained.module: w.target for w in self.weights for part in w.parts if part.source is source}
        assert self.checkpoint.root is not None
        for number, module in enumerate(source.adapter.modules):
            if module.category == category:  # PEFT keeps the last where a layer has several
                target = targets[module.module]
                weight = stream.read_tensor(self.checkpoint.root, target.tensor)
                layer = names.layer_index(module.module)
                layers[number if layer is None else layer] = (weight.T if target.transposed else weight).float()
        alpha = source.adapter.config.get("regularization_alpha", 1e-3)
        if not isinstance(alpha, (int, float)):
            raise InvalidInput(f"{source.adapter.name}: its config's regularization_alpha is {alpha!r}")
        return routine([layers[number] for number in sorted(layers)], alpha)


def _drawn(source: Source) -> dict[str, Tensor]:
    """The patterns that a seed stands for."""
    adapter = source.adapter
    provenance = adapter.provenance
    if provenance is not None and provenance.seed is None:
        if source.basis is None:
            raise InvalidInput(f"{adapter.name}: holds neither its pattern nor a seed")
        return dict(source.basis.indices())
    if provenance is not None:
        seed, rates = provenance.seed or 0, provenance.sparsity
    else:
        seed, rates = _peft_pattern(adapter)
    widths = {category: n for category, n in adapter.categories.items() if category in rates}
    if widths != adapter.categories:
        raise InvalidInput(f"{adapter.name}: its config gives no sparsity for some of its categories")
    return {category: torch.from_numpy(found) for category, found in patterns(widths, rates, seed).items()}


def _peft_pattern(adapter: Adapter) -> tuple[int, dict[str, float]]:
    seed, rate = adapter.config.get("projection_prng_key"), adapter.config.get("sparse_rate")
    if type(seed) is not int or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise InvalidInput(f"{adapter.name}: its config lacks projection_prng_key or sparse_rate")
    return seed, dict.fromkeys(adapter.categories, float(rate))


def _peft_routine() -> Callable[[list[Tensor], float], Tensor]:
    try:
        from peft.tuners.frod.model import _projection_from_weights
    except ImportError:
        raise FrodctlError(
            "--recompute-projection runs PEFT's own routine: pip install 'frodctl[peft]' (tested with peft 0.21)"
        ) from None
    routine: Callable[[list[Tensor], float], Tensor] = _projection_from_weights
    return routine

"""The weights of a base as adapters change them, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from frodctl.adapted import opening
from frodctl.adapted.matching import Part, Weight
from frodctl.adapted.opening import Source
from frodctl.adapted.projection import Projections
from frodctl.arrays import DTYPES
from frodctl.checkpoint import stream
from frodctl.checkpoint.records import Checkpoint
from frodctl.checkpoint.targets import Target
from frodctl.errors import InvalidInput
from frodctl.method.cost import UpdateCase
from frodctl.method.dual import ROUNDED_AFTERWARDS
from frodctl.method.linalg import Scratch
from frodctl.method.update import Blocks, CategoryUpdate

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.kernels import Kernels


@dataclass(frozen=True)
class Trained:
    """What one adapter holds for one weight, read."""

    part: Part
    scales: HostArray  #: λ', (n,)
    values: HostArray  #: of S, (nnz,)
    base_scales: HostArray | None  #: λ, (n,), where the file says it

    @property
    def reconstructs(self) -> bool:
        """Whether W' itself is computed, rather than W' − W."""
        return self.part.source.form == "reconstruct"

    @property
    def untouched(self) -> bool:
        """Whether the update is 0 exactly."""
        if self.part.source.scale == 0:
            return True
        at_start = self.base_scales is not None and np.array_equal(self.scales, self.base_scales)
        return not self.reconstructs and at_start and not self.values.any()


@dataclass(frozen=True)
class Task:
    """One weight, ready for the arithmetic; without its bytes where they will be copied."""

    weight: Weight
    stored: HostArray | None
    trained: tuple[Trained, ...]


class WeightUpdates:
    """Reads weights with what was trained for them, and computes what they become.

    Parameters
    ----------
    checkpoint : Checkpoint
        The base.
    weights : sequence of Weight
        All that will be asked for; those of one group together, so that each basis is made ready once.
    kernels : Kernels
        Where to compute.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Sequence[Weight], kernels: Kernels) -> None:
        assert checkpoint.root is not None, "headers alone cannot be merged"
        self.root: Path = checkpoint.root
        self.kernels = kernels
        self.scratch = Scratch(kernels)
        self.projections = Projections(checkpoint, weights)
        sources = {id(part.source): part.source for weight in weights for part in weight.parts}
        self.records = {key: _records(source) for key, source in sources.items()}
        self.updates: dict[tuple[tuple[int, str], ...], list[CategoryUpdate]] = {}  #: of the current group

    def read(self, weight: Weight, buffer: HostArray | None = None) -> Task:
        """The weight's bytes (into ``buffer`` if given) and what was trained for it, checked."""
        trained = tuple(self._read_part(part) for part in weight.parts)
        stored = self.stored(weight, buffer)
        self._check_digest(weight, stored)
        touched = tuple(item for item in trained if not item.untouched)
        return Task(weight, stored if touched else None, touched)

    def untouched(self, weight: Weight) -> bool:
        """Whether no adapter changes the weight."""
        return all(self._read_part(part).untouched for part in weight.parts)

    def stored(self, weight: Weight, buffer: HostArray | None = None) -> HostArray:
        """The weight as the base stores it."""
        return stream.read_tensor(self.root, weight.target.stored, buffer=buffer)

    def digest(self, task: Task) -> str:
        """Of the weight as it is stored: the recorded one, with which `read` has compared it, or one made now."""
        known = (digest for _, digest in self._recorded_digests(task.weight))
        if task.stored is None:
            raise AssertionError("its bytes were not kept")
        return next(known, None) or stream.digest(np.ascontiguousarray(task.stored))

    def base_scales(self, weight: Weight, W: HostArray) -> HostArray:
        """λ (n,) as PEFT begins with it, for the weight's first adapter: the norms of W V⁻ᵀ rounded to V's dtype."""
        return self._updates_of(weight)[0].base_scales(W)

    def _read_part(self, part: Part) -> Trained:
        adapter, trained = part.source.adapter, part.trained
        # PEFT begins with the scales that it computes
        basis = part.source.basis if adapter.provenance is not None else None
        return Trained(part, *opening.trained_of(adapter, trained, basis, self.records[id(part.source)]))

    def _check_digest(self, weight: Weight, stored: HostArray) -> None:
        """Compare the base's bytes with what adapter or basis say they were made from."""
        recorded = self._recorded_digests(weight)
        found = stream.digest(stored) if recorded else ""
        for where, digest in recorded:
            if digest != found:
                info = weight.target.stored
                raise InvalidInput(
                    f"{self.root / info.file}: tensor {info.name} is not the one that {where} was made from (digests "
                    "differ); give that base"
                )

    def _recorded_digests(self, weight: Weight) -> list[tuple[object, str]]:
        """What is recorded of a weight's bytes, and by which adapter or basis file."""
        recorded: list[tuple[object, str]] = []
        for part in weight.parts:
            source, module = part.source, part.trained
            if module.digest is not None:
                recorded.append((source.adapter.name, module.digest))
            if source.basis is not None and (record := self.records[id(source)].get(module.module)):
                recorded.append((source.basis.path, record.digest))
        return recorded

    def rows(self, W: HostArray, task: Task) -> Blocks:
        """Rows of W + Σ s (W' − W) for W (m, n) in its stored dtype, not rounded yet."""
        updates = dict(zip(task.weight.parts, self._updates_of(task.weight), strict=True))
        first = task.trained[0]
        if len(task.trained) == 1 and first.reconstructs and first.part.source.scale == 1:
            yield from updates[first.part].reconstruct(W, first.scales, first.values)
            return
        kernels = self.kernels
        wide = W.dtype == np.float64 or any(update.work == "float64" for update in updates.values())
        kept = 1 - sum(item.part.source.scale for item in task.trained if item.reconstructs)
        for blocks in zip(*(_change(updates[item.part], W, item) for item in task.trained), strict=True):
            rows = blocks[0][0]
            total = self.scratch.empty("total", W[rows].shape, "float64" if wide else "float32")
            kernels.copy(W[rows], total)
            if kept != 1:
                total *= kept
            for (_, block), item in zip(blocks, task.trained, strict=True):
                scale = item.part.source.scale
                total += block if scale == 1 else block * scale
            yield rows, total

    def _updates_of(self, weight: Weight) -> list[CategoryUpdate]:
        """V and pattern of each of the weight's adapters, kept while weights of the same group follow."""
        if weight.group not in self.updates:
            self.updates.clear()
            dtype = weight.target.tensor.dtype
            self.updates[weight.group] = [
                CategoryUpdate(
                    *self.projections.of(part.source, part.trained.category, dtype), self.kernels, _held_in(part)
                )
                for part in weight.parts
            ]
        return self.updates[weight.group]

    def changes(self, W: HostArray, task: Task) -> Blocks:
        """Rows of Σ s (W' − W) for W (m, n), in float64 and never added to W."""
        updates = dict(zip(task.weight.parts, self._updates_of(task.weight), strict=True))
        for blocks in zip(*(_change(updates[item.part], W, item) for item in task.trained), strict=True):
            rows = blocks[0][0]
            total = np.zeros(W[rows].shape)
            for (_, block), item in zip(blocks, task.trained, strict=True):
                exact = self.kernels.get(block).astype(np.float64)
                exact -= W[rows].astype(np.float64) if item.reconstructs else 0
                total += item.part.source.scale * exact
            yield rows, total


def case_of(part: Part, target: Target) -> UpdateCase:
    """How an adapter's update of a weight will be computed, as far as headers tell."""
    source, trained = part.source, part.trained
    V = source.adapter.V.get(trained.category)
    if V is not None:
        stored = V.dtype
    elif source.adapter.provenance is None:
        stored = source.projection_dtype or target.tensor.dtype
    else:
        stored = source.basis.dtype(trained.category) if source.basis is not None else "F32"
    name, held_in = DTYPES[stored].name, _held_in(part)
    in_float32 = held_in is None and ROUNDED_AFTERWARDS.may_hold(name, trained.n)
    return UpdateCase(
        weights=DTYPES[target.tensor.dtype].name,
        stored=name,
        inverse="float32" if in_float32 else "float64",
        held_in=held_in,
        from_scales=source.adapter.provenance is not None,
        nnz=trained.nnz,
    )


def _change(update: CategoryUpdate, W: HostArray, trained: Trained) -> Blocks:
    if trained.reconstructs:
        return update.reconstruct(W, trained.scales, trained.values)
    return update.delta(W, trained.scales, trained.values, trained.base_scales)


def _held_in(part: Part) -> str | None:
    """The dtype of V and V⁻ᵀ in training, where the adapter says it."""
    provenance = part.source.adapter.provenance
    name = provenance.dtype.get(part.trained.category) if provenance else None
    return None if name is None else DTYPES[name].name


def _records(source: Source) -> opening.Records:
    return opening.records_of(source.adapter, source.basis) if source.basis is not None else {}

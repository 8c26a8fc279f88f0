"""The figures of an adapter: how far its numbers moved, and what that makes of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from frodctl.adapted import opening
from frodctl.adapted.matching import Match, Weight, match
from frodctl.adapted.positions import positions_of
from frodctl.adapted.updates import WeightUpdates
from frodctl.checkpoint import names, stream
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs.inspect import columns, headers
from frodctl.jobs.inspect.matrices import Spectra, quantiles
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.resources import choose_device
from frodctl.method.fidelity import Fidelity, together

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

_QUANTILES = (0.5, 0.95)


def adapter_report(
    name: str, adapter: Adapter, options: InspectOptions, progress: Callback, profile: Unprofiled
) -> Report:
    """Rows with the norms of λ' − λ and S of every module; with a base also the figures of W' − W."""
    given = options.file_of(options.basis) if options.basis is not None else None
    basis = opening.find_basis(adapter, given, trust=options.trust_basis)
    if basis is not None and options.basis is None:
        progress(Progress(opening.found_near(adapter, basis)))
    if note := opening.without_digests(adapter, basis):
        progress(Progress(f"Warning: {note}."))
    if options.base is not None:
        source = opening.open_source(adapter, basis, trust=options.trust_basis)
        location = options.location_of_other(options.base)
        found = match(location, (source,), progress=lambda text: progress(Progress(text)))
        merged = _Merged.of(found, options, progress) if options.merged is not None else None
        rows = _with_base(found, basis, merged, options, profile)
    else:
        merged, rows = None, _alone(adapter, basis, options)
    there = [module.module for module in adapter.modules]
    count = sum(map(options.selects, there))
    shown = columns.of_adapter(options)

    def summary() -> dict[str, Json]:
        return headers.adapter_summary(adapter) | (merged.summary() if merged else {})

    return Report(name, "adapter", shown, rows, summary, count, there)


def _alone(adapter: Adapter, basis: BasisFile | None, options: InspectOptions) -> Iterator[Row]:
    values = {row["name"]: row for row in headers.adapter_rows(adapter)}
    trained = _Trained(adapter, basis)
    for module in adapter.modules:
        if options.selects(module.module):
            yield Row(values[module.module] | changes(*trained.of(module)))


class _Trained:
    """What an adapter holds of its modules."""

    def __init__(self, adapter: Adapter, basis: BasisFile | None) -> None:
        self.adapter, self.basis = adapter, basis
        self.records = opening.records_of(adapter, basis) if basis is not None else {}
        # checked, though the figures of S do not depend on where it is
        if adapter.indices or basis is not None:
            positions_of(adapter, basis)

    def of(self, module: TrainedModule) -> tuple[HostArray, HostArray, HostArray | None]:
        """λ', the values of S, and λ where a file says it."""
        return opening.trained_of(self.adapter, module, self.basis, self.records)


def changes(scales: HostArray, values: HostArray, base_scales: HostArray | None) -> dict[str, Json]:
    """Figures of λ' − λ and S.

    Parameters
    ----------
    scales, values : HostArray
        λ' (n,) and the values of S (nnz,).
    base_scales : HostArray, (n,), optional
        λ; without it the figures of λ' − λ are None.

    Returns
    -------
    dict
        Norms, quantiles of the magnitudes, the share of S's positions that are not 0 (occupancy), and the share of
        ‖S + diag(λ' − λ)‖_F² that is off the diagonal.
    """
    S = np.abs(values.astype(np.float64))
    after = scales.astype(np.float64)
    began = base_scales.astype(np.float64) if base_scales is not None else None
    moved = np.abs(after - began) if began is not None else None
    whole = float(_norm(S) ** 2 + _norm(moved) ** 2) if moved is not None else 0.0
    median, high = quantiles(S, _QUANTILES)
    moved_median, moved_high = quantiles(moved, _QUANTILES) if moved is not None else (None, None)
    return {
        "scales_norm": _norm(after),
        "scales_change_norm": _norm(moved) if moved is not None else None,
        "scales_change_relative": _ratio(_norm(moved), _norm(began))
        if moved is not None and began is not None
        else None,
        "scales_change_median": moved_median,
        "scales_change_p95": moved_high,
        "sparse_norm": _norm(S),
        "sparse_median": median,
        "sparse_p95": high,
        "sparse_occupancy": float(np.mean(S != 0)) if len(S) else None,
        "off_diagonal_energy": _norm(S) ** 2 / whole if whole else None,
    }


class _Merged:
    """A checkpoint that an adapter was merged into, and how much of each update survives there."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
        self.checkpoint = checkpoint
        self.tensors = tensors  #: by name in the base
        self.found: dict[str, Fidelity] = {}

    @classmethod
    def of(cls, found: Match, options: InspectOptions, progress: Callback) -> _Merged:
        """Open it and find the weights that the adapter changes; `InvalidInput` where one is not there."""
        assert options.merged is not None
        location = options.location_of_other(options.merged)
        checkpoint = open_checkpoint(location, progress=lambda text: progress(Progress(text)))
        refuse_quantized(checkpoint)
        matched = names.match([weight.target.tensor.name for weight in found.weights], checkpoint.tensors)
        tensors = {}
        for weight in found.weights:
            index, mine = weight.target.index, weight.target.stored
            theirs = checkpoint.tensors.get(matched[weight.target.tensor.name] or "")
            if theirs is not None and index is not None and len(theirs.shape) == 3 and index < theirs.shape[0]:
                theirs = theirs.slice(index)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype not in FLOAT_DTYPES:
                shape = "not there" if theirs is None else f"{theirs.dtype} {list(theirs.shape)}"
                raise InvalidInput(
                    f"{checkpoint.model}: {mine.name} of {found.checkpoint.model} is {shape}; is it merged from that?"
                )
            tensors[mine.name] = theirs
        return cls(checkpoint, tensors)

    def survival(self, weight: Weight, W: HostArray, delta: HostArray) -> dict[str, Json]:
        """What the merged weight has of ΔW over W, both (m, n)."""
        info = self.tensors[weight.target.stored.name]
        assert self.checkpoint.root is not None
        stored = stream.read_tensor(self.checkpoint.root, info)
        stream.check_finite(stored, info.name, str(self.checkpoint.root / info.file))
        merged = stored.T if weight.target.transposed else stored
        found = Fidelity.of(delta, merged.astype(np.float64) - W.astype(np.float64))
        self.found[weight.parts[0].trained.module] = found
        return {"survival": found.kept, "survival_distance": found.distance}

    def summary(self) -> dict[str, Json]:
        """Over all layers that were compared, and the layer of which least survives."""
        changed = {module: found.kept for module, found in self.found.items() if found.kept is not None}
        least = min(changed, key=lambda module: changed[module], default=None)
        overall = together(list(self.found.values()))
        return {
            "merged": self.checkpoint.model,
            "survival": overall.kept,
            "survival_distance": overall.distance,
            "least_survival": changed[least] if least is not None else None,
            "least_survival_module": least,
        }


def _with_base(
    found: Match, basis: BasisFile | None, merged: _Merged | None, options: InspectOptions, profile: Unprofiled
) -> Iterator[Row]:
    """Rows in the order of the merge, by category: each basis is made ready once."""
    adapter = found.sources[0].adapter
    spectra = Spectra(choose_device(options.device), profile)
    values = {row["name"]: row for row in headers.adapter_rows(adapter)}
    weights = [w for w in found.weights if options.selects(w.parts[0].trained.module)]
    updates = WeightUpdates(found.checkpoint, weights, spectra.kernels)
    trained = _Trained(adapter, basis if adapter.provenance else None)
    for weight in weights:
        module = weight.parts[0].trained.module
        W, delta = _delta(weight, updates)
        base_scales = updates.base_scales(weight, W)
        scales, sparse, known = trained.of(weight.parts[0].trained)
        figures = spectra.of(delta, module)
        yield Row(
            values[module]
            | changes(scales, sparse, known if known is not None else base_scales)
            | {"relative_change": _ratio(_norm(delta), _norm(W.astype(np.float64)))}
            | (merged.survival(weight, W, delta) if merged else {})
            | {f"delta_{key}": value for key, value in figures.values.items() if key != "profile"}
            | {"profile": figures.values["profile"]},
            figures.singular_values,
        )


def _delta(weight: Weight, updates: WeightUpdates) -> tuple[HostArray, HostArray]:
    """W (m, n) as it is stored, and W' − W before any rounding."""
    task = updates.read(weight)
    stored = updates.stored(weight) if task.stored is None else task.stored
    W = stored.T if weight.target.transposed else stored
    delta = np.zeros(W.shape)
    for rows, block in updates.changes(W, task) if task.trained else ():
        delta[rows] = block
    return W, delta


def _norm(X: HostArray) -> float:
    flat = X.reshape(-1)
    return math.sqrt(np.einsum("i,i->", flat, flat))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None

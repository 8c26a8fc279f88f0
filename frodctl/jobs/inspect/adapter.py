"""The figures of an adapter: how far its numbers moved, and what that makes of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from frodctl.checkpoint import names
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule
from frodctl.formats.basis_file import BasisFile, open_basis
from frodctl.jobs.inspect import headers
from frodctl.jobs.inspect.matrices import Spectra
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import Match, Weight, match
from frodctl.jobs.merge.updates import WeightUpdates
from frodctl.jobs.progress import Callback
from frodctl.jobs.resources import choose_device

_QUANTILES = (0.5, 0.95)


def adapter_report(name: str, adapter: Adapter, options: InspectOptions, progress: Callback) -> Report:
    """Rows with the norms of λ' − λ and S of every module; with a base also the figures of W' − W."""
    if options.base is not None:
        merging = MergeOptions(
            basis=options.basis, trust_basis=options.trust_basis, token=options.token,
            cache_dir=options.cache_dir, offline=options.offline,
        )  # fmt: skip
        found = match(options.base, adapter, merging, progress=progress)
        rows = _with_base(found, options)
    else:
        basis = open_basis(options.basis) if options.basis is not None else None
        rows = _alone(adapter, basis, options)
    there = [module.module for module in adapter.modules]
    count = sum(map(options.selects, there))
    return Report(name, "adapter", rows, lambda: headers.adapter_summary(adapter), count, there)


def _alone(adapter: Adapter, basis: BasisFile | None, options: InspectOptions) -> Iterator[Row]:
    values = {row["name"]: row for row in headers.adapter_rows(adapter)}
    for module in adapter.modules:
        if options.selects(module.module):
            yield Row(values[module.module] | changes(*_trained(adapter, module, basis, options.trust_basis)))


def _trained(
    adapter: Adapter, module: TrainedModule, basis: BasisFile | None, trust: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """λ', the values of S, and λ where a file says it."""
    scales = adapter.tensor(module.scales)
    values = adapter.tensor(module.values) if module.values else scales.new_zeros(0)
    if module.base_scales is not None:
        return scales, values, adapter.tensor(module.base_scales)
    if basis is not None:
        recorded = adapter.provenance.basis if adapter.provenance else {}
        if not trust and recorded.get(module.category, "") != basis.metadata.basis.get(module.category):
            raise InvalidInput(f"{basis.path}: V.{module.category} is not the one that {adapter.name} records")
        known = names.match([module.module], [record.name for record in basis.metadata.modules])[module.module]
        if known is None:
            raise InvalidInput(f"{basis.path}: no scales of {module.module}, which {adapter.name} trains")
        start = basis.tensor(f"lambda.{known}")
        if start.shape != scales.shape:
            raise InvalidInput(f"{basis.path}: lambda.{known} is {list(start.shape)}, not {list(scales.shape)}")
        return scales, values, start
    return scales, values, None


def changes(scales: Tensor, values: Tensor, start: Tensor | None) -> dict[str, Any]:
    """Figures of λ' − λ and S.

    Parameters
    ----------
    scales, values : Tensor
        λ' (n,) and the values of S (nnz,).
    start : Tensor, (n,), optional
        λ; without it the figures of λ' − λ are None.

    Returns
    -------
    dict
        Norms, quantiles of the magnitudes, the share of S's positions that are not 0 (occupancy), and the share of
        ‖S + diag(λ' − λ)‖_F² that is off the diagonal.
    """
    S = values.double().abs()
    moved = (scales.double() - start.double()).abs() if start is not None else None
    whole = float(S.square().sum() + moved.square().sum()) if moved is not None else 0.0
    median, high = _quantiles(S)
    moved_median, moved_high = _quantiles(moved) if moved is not None else (None, None)
    relative = _ratio(moved.norm(), start.double().norm()) if moved is not None and start is not None else None
    return {
        "scales_norm": float(scales.double().norm()),
        "scales_change_norm": float(moved.norm()) if moved is not None else None,
        "scales_change_relative": relative,
        "scales_change_median": moved_median,
        "scales_change_p95": moved_high,
        "sparse_norm": float(S.norm()),
        "sparse_median": median,
        "sparse_p95": high,
        "sparse_occupancy": float((S != 0).double().mean()) if len(S) else None,
        "off_diagonal_energy": float(S.square().sum()) / whole if whole else None,
    }


def _with_base(found: Match, options: InspectOptions) -> Iterator[Row]:
    """Rows in the order of the merge, by category: each basis is made ready once."""
    adapter = found.sources[0].adapter
    device = choose_device(options.device)
    spectra = Spectra(device)
    values = {row["name"]: row for row in headers.adapter_rows(adapter)}
    weights = [w for w in found.weights if options.selects(w.parts[0].trained.module)]
    updates = WeightUpdates(found.checkpoint, weights, device)
    for weight in weights:
        module = weight.parts[0].trained.module
        delta, start, norm = _delta(weight, updates)
        basis = found.sources[0].basis if adapter.provenance else None
        scales, sparse, known = _trained(adapter, weight.parts[0].trained, basis, options.trust_basis)
        figures = spectra.of(delta, module)
        yield Row(
            values[module]
            | changes(scales, sparse, known if known is not None else start)
            | {"relative_change": _ratio(delta.double().norm(), norm)}
            | {f"delta_{key}": value for key, value in figures.values.items() if key != "profile"}
            | {"profile": figures.values["profile"]},
            figures.singular_values,
        )


def _delta(weight: Weight, updates: WeightUpdates) -> tuple[Tensor, Tensor, Tensor]:
    """W' − W (m, n) before any rounding, the λ that PEFT begins with (n,), and ‖W‖_F."""
    task = updates.read(weight)
    stored = updates.stored(weight) if task.stored is None else task.stored
    W = stored.T if weight.target.transposed else stored
    delta = torch.zeros(W.shape, dtype=torch.float64)
    for rows, block in updates.changes(W, task) if task.trained else ():
        delta[rows] = block
    return delta, updates.start(weight, W), W.double().norm()


def _quantiles(values: Tensor) -> tuple[float | None, float | None]:
    if not len(values):
        return None, None
    ordered = values.sort().values
    first, second = (float(ordered[round(q * (len(ordered) - 1))]) for q in _QUANTILES)
    return first, second


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None

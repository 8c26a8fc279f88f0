"""Taking up again what was saved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn

from frodctl import values
from frodctl.adapted import matching, opening
from frodctl.adapted.positions import positions_of
from frodctl.arrays import to_torch
from frodctl.checkpoint.records import Location
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule, open_adapter
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training.attached import (
    Attached,
    live_paths,
    require_module,
    saved_modules,
    updates_of,
)
from frodctl.training.attachment import checked_dropout, checked_form, checked_name, install
from frodctl.training.layer import FrodLinear, SavedModule, is_transposed, out_features

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

Model = TypeVar("Model", bound=nn.Module)


def load_adapter(
    model: Model,
    folder: str | Path,
    basis: str | Path | BasisFile | None = None,
    *,
    dropout: float = 0.0,
    adapter_name: str = "default",
    form: str = "auto",
) -> Model:
    """Attach a saved adapter, to apply it or to train it further.

    Parameters
    ----------
    model : Module
        The base model.
    folder : path
        What `save_adapter` wrote, or a Hub id; of several adapters the one called ``adapter_name``.
    basis : path or BasisFile, optional
        The one that it was trained with. By default the adapter's own, if it holds one (``self_contained``), else a
        file in its folder, in the one above, or where the adapter recorded it: the file that has the recorded digests,
        whatever its name; a warning says which.
    dropout, adapter_name, form
        As for `attach`.

    Returns
    -------
    Module
        ``model`` itself; the adapter is the active one.

    Raises
    ------
    InvalidInput
        Basis, base and adapter do not belong together or are damaged, or the adapter is PEFT's own: that one trains
        another operator; merge it.
    """
    require_module(model)
    folder, adapter_name, dropout = values.model(folder, "folder"), checked_name(adapter_name), checked_dropout(dropout)
    form = checked_form(form, dropout)
    adapter = open_adapter(Location(folder), _sub_folder(folder, adapter_name))
    provenance = adapter.provenance
    if provenance is None or provenance.form != "delta":
        raise InvalidInput(f"{adapter.name}: not trained by frodctl; merge it into its base instead (frodctl merge)")
    beside = opening.find_basis(adapter, basis)
    opened = beside or opening.own_basis(adapter)
    if opened is None:
        raise opening.no_basis(adapter)
    if beside is not None and basis is None:
        warnings.warn(opening.found_near(adapter, beside), stacklevel=2)
    if note := opening.without_digests(adapter, opened):
        warnings.warn(note, stacklevel=2)
    modules = _modules(model, adapter, opened)
    attached = Attached(
        basis=opened,
        modules={path: record for path, record, _ in modules},
        sparsity={category: provenance.sparsity.get(category, 0.0) for category in adapter.categories},
        seed=provenance.seed,
        modules_to_save=adapter.modules_to_save,
        dropout=dropout,
        form=form,
        selected=provenance.seed is None and bool(adapter.indices),
    )
    for info in adapter.V.values():  # compared with its digest, though the basis file's may be used
        adapter.tensor(info)
    indices = positions_of(adapter, opened)
    numbers = _numbers(adapter, opened, modules)
    replaced = _replaced(model, adapter)
    install(model, attached, indices, adapter_name)
    updates = updates_of(model, adapter_name)
    with torch.no_grad():
        for path, (delta, sparse) in numbers.items():
            updates[path].delta.copy_(to_torch(delta))
            updates[path].values.copy_(to_torch(sparse))
        for path, module in saved_modules(model).items():
            if adapter_name in module.modules_to_save:
                for name, parameter in module.modules_to_save[adapter_name].state_dict().items():
                    parameter.copy_(to_torch(replaced[f"{path}.{name}"]))
    return model


def _sub_folder(folder: str | Path, name: str) -> str | None:
    """The adapter's name among several in a folder; None where it is the folder's only, or first one."""
    return name if (Path(folder) / name).is_dir() else None


def _modules(model: nn.Module, adapter: Adapter, opened: BasisFile) -> list[tuple[str, ModuleRecord, TrainedModule]]:
    """For each trained module its path in this model, its record in the basis, and its tensors."""
    records = opening.records_of(adapter, opened)
    live = live_paths(model, {record.name: record for record in records.values()})
    found = []
    for module in adapter.modules:
        record = records[module.module]
        if record.name not in live:
            raise InvalidInput(f"{adapter.name}: {type(model).__name__} has no {module.module}: another base?")
        path = live[record.name]
        if opened.aliases:  # an adapter does not say how many rows a weight has
            record = replace(record, shape=_shape(model.get_submodule(path), module.n))
        found.append((path, record, module))
    return found


def _shape(layer: nn.Module, n: int) -> tuple[int, int]:
    """The shape of a live layer's weight as it is stored."""
    base = layer.base_layer if isinstance(layer, FrodLinear) else layer
    known = getattr(base, "out_features", None)  # which quantized layers tell
    m = known if isinstance(known, int) else out_features(base)
    return (n, m) if is_transposed(base) else (m, n)


def _numbers(
    adapter: Adapter, opened: BasisFile, modules: Sequence[tuple[str, ModuleRecord, TrainedModule]]
) -> dict[str, tuple[HostArray, HostArray]]:
    """δ and the values of S by path in the model."""
    found = {}
    for path, record, module in modules:
        scales, sparse, start = opening.trained_of(adapter, module, opened, {module.module: record})
        assert start is not None  # the basis has it
        found[path] = (scales.astype(np.float64) - start.astype(np.float64)).astype(np.float32), sparse
    return found


def _tensors_of(model: nn.Module, name: str) -> list[str]:
    """The names in the model's state of the tensors of the modules that are called so."""
    inner = tuple(f"{path}." for path in saved_modules(model))
    found = []
    for path, module in model.named_modules():
        if f".{path}".endswith(f".{name}") and not path.startswith(inner):
            original = module.original_module if isinstance(module, SavedModule) else module
            found += [f"{path}.{key}" for key in original.state_dict()]
    return found


def _replaced(model: nn.Module, adapter: Adapter) -> dict[str, HostArray]:
    """The modules that were trained as a whole, by tensor name in this model."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    live = {re.sub(r"\.original_module(?=\.)", "", name): tensor for name, tensor in tensors}
    shapes = {name: tensor.shape for name, tensor in live.items()}
    whole = matching.whole_tensors(adapter, shapes, type(model).__name__)
    found = {name: adapter.tensor(info) for name, info in whole.items()}
    for entry in adapter.modules_to_save:
        for tensor in _tensors_of(model, entry):
            if tensor not in found:
                raise InvalidInput(f"{adapter.name}: {entry} was trained as a whole, but {tensor} is not there")
    return found

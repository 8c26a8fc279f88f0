"""Taking up again what was saved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn

from frodctl import values
from frodctl.adapted import conversion, matching, opening
from frodctl.adapted.positions import positions_of
from frodctl.arrays import to_torch
from frodctl.checkpoint import names
from frodctl.checkpoint.records import Location
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule, open_adapter
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training.attached import (
    Attached,
    require_module,
    saved_modules,
    updates_of,
)
from frodctl.training.attachment import checked_dropout, checked_form, checked_name, install
from frodctl.training.choice import obstacle
from frodctl.training.layer import FrodLinear, SavedModule, is_transposed, out_features
from frodctl.training.located import Located, live_shapes, locate, pretrained

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
    records = opening.records_of(adapter, opened)
    located = locate(model, {record.name: record for record in records.values()})
    saved_names, live_prefix = located.naming(_require_places(model, adapter, records, located))
    modules = [(saved_names[records[m.module].name], records[m.module], m) for m in adapter.modules]
    attached = Attached(
        basis=opened,
        modules={name: _with_shape(model, record, located) for name, record, _ in modules},
        places={name: located.places[record.name] for name, record, _ in modules},
        sparsity={category: provenance.sparsity.get(category, 0.0) for category in adapter.categories},
        seed=provenance.seed,
        modules_to_save=adapter.modules_to_save,
        dropout=dropout,
        form=form,
        selected=provenance.seed is None and bool(adapter.indices),
        live_prefix=live_prefix,
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


def _require_places(
    model: nn.Module, adapter: Adapter, records: Mapping[str, ModuleRecord], located: Located
) -> list[str]:
    """The trained modules by their names in the checkpoint; `InvalidInput` where this model lacks one."""
    for module, record in records.items():
        if reason := obstacle(model, record, located):
            raise InvalidInput(f"{adapter.name}: {module}: {reason}: another base?")
    return [record.name for record in records.values()]


def _with_shape(model: nn.Module, record: ModuleRecord, located: Located) -> ModuleRecord:
    """The record with its shape, of which an adapter that holds its basis may not say how many rows there are."""
    if 0 not in record.shape:
        return record
    (place,) = located.places[record.name]
    return replace(record, shape=_shape(model.get_submodule(place.path), max(record.shape)))


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
    whole = matching.whole_tensors(_by_live_names(model, adapter), shapes, type(model).__name__)
    found = {name: adapter.tensor(info) for name, info in whole.items()}
    for entry in adapter.modules_to_save:
        for tensor in _tensors_of(model, entry):
            if tensor not in found:
                raise InvalidInput(f"{adapter.name}: {entry} was trained as a whole, but {tensor} is not there")
    return found


def _by_live_names(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the names in this model of what was trained as a whole, where it has others."""
    matched = names.match(adapter.replaced, live_shapes(model))
    by_checkpoint = adapter.provenance is not None and adapter.provenance.live_prefix is not None
    stored = {n: info.shape for n, info in adapter.replaced.items() if by_checkpoint or matched[n] is None}
    if not stored:
        return adapter
    live: dict[str, str] = {}
    for root, inner in pretrained(model):
        found, _ = conversion.places(inner, stored, live_shapes(inner))
        live |= {name: f"{root}{places[0].parameter}" for name, places in found.items()}
    return replace(adapter, replaced={live.get(name, name): info for name, info in adapter.replaced.items()})

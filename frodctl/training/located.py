"""Where a live model holds the weights of a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from frodctl.adapted import conversion, matching
from frodctl.adapted.conversion import Place, Places
from frodctl.formats.basis_file import ModuleRecord
from frodctl.training.attached import added_prefixes, frod_layers, saved_modules


@dataclass(frozen=True)
class Located:
    """Where a live model holds a checkpoint's weights, by their modules in the checkpoint."""

    places: Places
    by_name: Places  #: as far as their names alone tell
    refused: Mapping[str, str]  #: why transformers' mapping does not tell
    prefix: str  #: that the model's own names have before the checkpoint's, where it calls some otherwise

    def naming(self, modules: Iterable[str]) -> tuple[dict[str, str], str | None]:
        """What a saved adapter calls these modules, and `Attached.live_prefix`.

        They have the live model's names; but where it calls one otherwise than the checkpoint, beside a prefix, all
        have the checkpoint's, so that merging needs no mapping.
        """
        modules = list(modules)
        if all(self.places[name] == self.by_name.get(name) for name in modules):
            return {name: self.places[name][0].path for name in modules}, None
        return {name: name for name in modules}, self.prefix


def locate(model: nn.Module, records: Mapping[str, ModuleRecord]) -> Located:
    """Find the checkpoint's modules in a live model: by transformers' mapping, where that loaded it, else by name."""
    by_name: Places = {name: (Place(f"{path}.weight"),) for name, path in _live_paths(model, records).items()}
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": record.shape for name, record in records.items() if not name.endswith("]")
    }
    shapes |= _stacked(records)
    mapped: dict[str, list[tuple[Place, ...]]] = {}
    refused: dict[str, str] = {}
    prefix = ""
    for root, inner in pretrained(model):
        found, reasons = conversion.places(inner, shapes, live_shapes(inner))
        refused |= {name.removesuffix(".weight"): reason for name, reason in reasons.items()}
        prefix = conversion.base_prefix(inner, found)
        for name, places in found.items():
            from_root = tuple(replace(place, parameter=f"{root}{place.parameter}") for place in places)
            for module, held in _expert_by_expert(name, shapes.get(name, ()), from_root):
                mapped.setdefault(module, []).append(held)
    once = {name: places[0] for name, places in mapped.items() if len(places) == 1}
    return Located({**by_name, **once}, by_name, refused, prefix)


def _stacked(records: Mapping[str, ModuleRecord]) -> dict[str, tuple[int, ...]]:
    """The shapes of the checkpoint's tensors that stack matrices, under either name that they may have."""
    found: dict[str, tuple[int, ...]] = {}
    for name, record in records.items():
        tensor, _, number = name.removesuffix("]").partition("[")
        if number:
            count = max(int(number) + 1, *(found[tensor][:1] if tensor in found else (0,)))
            found |= dict.fromkeys((tensor, f"{tensor}.weight"), (count, *record.shape))
    return found


def _expert_by_expert(
    name: str, shape: tuple[int, ...], places: tuple[Place, ...]
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Modules of the checkpoint and their places, for a tensor that is one, or that stacks several."""
    module = name.removesuffix(".weight")
    if len(shape) < 3 or any(place.expert is not None for place in places):
        yield module, places
        return
    for number in range(shape[0]):
        yield f"{module}[{number}]", tuple(replace(place, expert=number) for place in places)


def _live_paths(model: nn.Module, known: Mapping[str, object]) -> dict[str, str]:
    """The path in the model of each of the checkpoint's modules that it has exactly once under its name."""
    inner = tuple(f"{path}." for path in frod_layers(model))
    paths = [path for path, _ in model.named_modules() if path and not path.startswith(inner)]
    return matching.live_paths(paths, known.keys())


def pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The models of transformers in a model, but those in others, with what their parameters' names begin with."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    outer: list[str] = []
    for path, module in model.named_modules() if modeling else ():
        root = f"{path}." if path else ""
        if isinstance(module, modeling.PreTrainedModel) and not any(map(root.startswith, outer)):
            outer.append(root)
            yield root, module


def live_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters and buffers, by their names without adapters."""
    added = added_prefixes(model)
    inner = [f"{path}.base_layer." for path in frod_layers(model)]
    inner += [f"{path}.original_module." for path in saved_modules(model)]
    kept = {prefix: prefix.removesuffix("base_layer.").removesuffix("original_module.") for prefix in inner}
    found = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            if not name.startswith(added):
                prefix = next(filter(name.startswith, kept), "")
                found[kept.get(prefix, "") + name.removeprefix(prefix)] = _shape(model, name, tensor)
    return found


def _shape(model: nn.Module, name: str, tensor: Any) -> tuple[int, ...]:
    """A tensor's shape, or, of a quantized weight, which may be packed, that of what it stands for."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    packed = name.endswith(".weight") and not tensor.is_floating_point() and hasattr(module, "out_features")
    return (module.out_features, module.in_features) if packed else tuple(tensor.shape)


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A live model's tensors as transformers stores them in a checkpoint, by their names there."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = dict(tensors)
    for root, inner in pretrained(model):
        own = {name: stored.pop(name) for name in tensors if name.startswith(root)}
        stored |= revert_weight_conversion(inner, {name.removeprefix(root): tensor for name, tensor in own.items()})
    return stored

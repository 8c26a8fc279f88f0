"""What adapters on a live model are made from, and where they are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from frodctl import values
from frodctl.adapted.conversion import Place
from frodctl.checkpoint import names
from frodctl.errors import UsageError
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training.experts import FrodExperts, OneExpert, Part
from frodctl.training.fused import FusedFrodLinear
from frodctl.training.layer import FrodLinear, SavedModule, Update

_ATTRIBUTE = "_frod_attachment"


@dataclass(frozen=True)
class Attached:
    """One adapter on a live model: what it was made from."""

    basis: BasisFile
    modules: Mapping[str, ModuleRecord]  #: by what they are called in a saved adapter
    places: Mapping[str, tuple[Place, ...]]  #: in the live model, by the same names
    sparsity: Mapping[str, float]  #: by category
    seed: int | None  #: of the pattern; None where the basis file or the adapter has it
    modules_to_save: tuple[str, ...]  #: as asked for
    dropout: float
    form: str = "auto"  #: how layers are computed; no part of what is saved
    selected: bool = False  #: the pattern is the adapter's own: neither a seed nor the basis file has it
    #: a saved adapter has the checkpoint's names, and the model's own have this before them; None: it has the model's
    live_prefix: str | None = None

    def __post_init__(self) -> None:
        # found again whatever the working directory is later
        object.__setattr__(self, "basis", replace(self.basis, path=self.basis.path.resolve()))

    @property
    def V_digests(self) -> dict[str, str]:
        """``sha256:…`` of V's bytes by category."""
        return {category: self.basis.metadata.V_digests[category] for category in sorted(self.sparsity)}


@dataclass
class Attachment:
    """What `attach` keeps on the model beside the layers."""

    trainable: frozenset[str]  #: parameters that were so before
    adapters: dict[str, Attached] = field(default_factory=dict)
    active: str = "default"


def keep(model: nn.Module, attachment: Attachment) -> None:
    """Have the model know what is attached to it."""
    setattr(model, _ATTRIBUTE, attachment)


def forget(model: nn.Module) -> None:
    """Undo `keep`."""
    delattr(model, _ATTRIBUTE)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What `attach` keeps on the model; None where nothing is attached."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Attachment) else None


def require_attachment(model: nn.Module) -> Attachment:
    """As `attachment_of`; `UsageError` where nothing is attached."""
    found = attachment_of(model)
    if found is None:
        raise UsageError(f"{type(model).__name__}: no adapter is attached; call frodctl.attach first")
    return found


def frod_layers(model: nn.Module) -> dict[str, FrodLinear]:
    """The layers that adapters train, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FrodLinear)}


def updates_of(model: nn.Module, adapter_name: str) -> dict[str, Update | OneExpert]:
    """What the adapter trains of each of the checkpoint's weights, by what that is called in a saved adapter."""
    return {module: update for module, (_, update) in _held(model, adapter_name).items()}


def every_update(model: nn.Module, adapter_name: str) -> list[Update]:
    """As `updates_of`, but of a split weight one for each layer that has rows of it; these share their numbers."""
    held = [layer.adapters[adapter_name] for layer in frod_layers(model).values() if adapter_name in layer.adapters]
    return [module for part in held for module in part.modules() if isinstance(module, Update)]


def state_prefixes(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """What the names of their numbers begin with in the model's state (`names.unwrapped`), by the same names; of an
    expert the numbers are one row of those.
    """
    return {module: prefix for module, (prefix, _) in _held(model, adapter_name).items()}


def _held(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Update | OneExpert]]:
    """State prefix and update of each weight, in the order of the model's layers."""
    layers = {names.unwrapped(path): layer for path, layer in frod_layers(model).items()}
    first = {module: places[0] for module, places in require_attachment(model).adapters[adapter_name].places.items()}
    order = {path: number for number, path in enumerate(layers)}
    found: dict[str, tuple[str, Update | OneExpert]] = {}

    def place_in_model(name: str) -> tuple[object, ...]:
        place = first[name]
        return order[names.unwrapped(place.path)], place.parameter, place.rows or (), place.expert or 0

    for module in sorted(first, key=place_in_model):
        place = first[module]
        path = names.unwrapped(place.path)
        layer, prefix = layers[path], f"{path}.adapters.{adapter_name}"
        if isinstance(layer, FusedFrodLinear):
            parts = layer.parts(adapter_name)
            number = parts.rows.index(place.rows)
            found[module] = f"{prefix}.updates.{number}", parts.update(number)
        elif isinstance(layer, FrodExperts):
            part, stacks = Part.at(place), dict(layer.stacks(adapter_name))
            assert place.expert is not None
            found[module] = f"{prefix}.updates.{part.name}", OneExpert(stacks[part], place.expert)
        elif update := layer.update(adapter_name):
            found[module] = prefix, update
    return found


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that adapters train as a whole, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}


def added_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the adapters' parameters begin with."""
    layers, saved = frod_layers(model), saved_modules(model)
    return (*(f"{path}.adapters." for path in layers), *(f"{path}.modules_to_save." for path in saved))


def require_module(model: object) -> None:
    """`UsageError` where it is no model."""
    values.require(isinstance(model, nn.Module), "model", model, "expected a torch.nn.Module: load it first")

"""Stacked experts of a live model, as they are found, checked and made trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from frodctl.adapted.conversion import Place
from frodctl.errors import InvalidInput
from frodctl.formats.basis_file import ModuleRecord
from frodctl.training.experts import ExpertsUpdate, FrodExperts, Part, Stacks, as_linear, holds_experts

Modules = Mapping[str, tuple[ModuleRecord, Place]]  #: one expert's weight each


def experts_at(model: nn.Module, path: str) -> Any:
    """The stacked experts there, without what trains them."""
    found = model.get_submodule(path)
    return found.base_layer if isinstance(found, FrodExperts) else found


def obstacle(model: nn.Module, record: ModuleRecord, places: Sequence[Place]) -> str | None:
    """Why an expert's weight, which the model stacks with others, cannot be trained; None if it can."""
    base, where = experts_at(model, places[0].path), places[0].path
    if not holds_experts(base):
        return f"one of the experts that {where} stacks, a {type(base).__name__}, which frodctl cannot train"
    if base._is_expert_parallel:
        return f"one of the experts of {where}, which are spread over several processes"
    # all rows in another order are as good: what is trained acts on the input
    if len(places) > 1 or (places[0].taken is not None and places[0].rows is not None):
        return f"{where} has its rows in several places"
    if (record.transposed != places[0].transposed) != base.is_transposed:
        return f"{where} stores it the other way round than its class says"
    return None


def trained(
    model: nn.Module,
    modules: Modules,
    make: Callable[[nn.Module, Part, Sequence[ModuleRecord]], ExpertsUpdate],
) -> dict[str, Stacks]:
    """What is trained of each layer of stacked experts, by its path.

    Parameters
    ----------
    model : Module
    modules : mapping
        The weights to train, by what they are called in a saved adapter.
    make : callable
        Makes the update of a part of the layer from the records of its experts, in their order.

    Raises
    ------
    InvalidInput
        Some experts of a layer are asked for, and not all.
    """
    held: dict[str, dict[Part, dict[int, str]]] = {}
    for name, (_, place) in modules.items():
        assert place.expert is not None
        held.setdefault(place.path, {}).setdefault(Part.at(place), {})[place.expert] = name
    found = {}
    for path, parts in held.items():
        base = experts_at(model, path)
        updates = {}
        for part, experts in parts.items():
            missing = [number for number in range(base.num_experts) if number not in experts]
            if missing:
                raise InvalidInput(
                    f"{path}.{part.parameter}: all experts of a layer are trained or none, and number {missing[0]} is "
                    "not among those asked for; take it too, or leave them all out (`exclude_modules`)"
                )
            records = [modules[experts[number]][0] for number in range(base.num_experts)]
            updates[part] = make(base, part, records)
        found[path] = Stacks(updates)
    return found


def layers_of(base: Any, part: Part) -> list[nn.Linear]:
    """Each expert's weight as a layer of its own, for what checks layers."""
    return [as_linear(base, part, expert) for expert in range(base.num_experts)]

"""Which modules of a basis are trained in a live model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from frodctl import values
from frodctl.adapted.conversion import Place
from frodctl.checkpoint.requests import comma_hint, module_matcher
from frodctl.checkpoint.targets import DEFAULT_TARGETS
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training import stacks
from frodctl.training.located import Located, locate

_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class Choice:
    """The modules to train."""

    modules: dict[str, ModuleRecord]  #: by what they are called in a saved adapter
    places: dict[str, tuple[Place, ...]]  #: in the model, by the same names
    live_prefix: str | None  #: as `Attached.live_prefix`
    left_out: dict[str, str]  #: what was asked for and cannot be trained, by name in the checkpoint, and why


def choose(
    model: nn.Module,
    opened: BasisFile,
    target_modules: values.Names | None,
    exclude_modules: values.Names | None = None,
    *,
    only_available: bool = False,
) -> Choice:
    """Find the modules to train in the model."""
    records = {record.name: record for record in opened.metadata.modules}
    located = locate(model, records)

    def matching(given: values.Names, parameter: str) -> set[str]:
        found: set[str] = set()
        for part, matches in _tests(given, parameter, model):
            fits = {
                name
                for name in records
                if matches(re.sub(r"\[\d+\]$", "", name))
                or any(matches(place.path) for place in located.places.get(name, ()))
            }
            said = filter(None, (f"matches no module of {opened.path}", comma_hint(part)))
            values.require(bool(fits), parameter, part, "; ".join(said))
            found |= fits
        return found

    wanted = set(records) if target_modules is None else matching(target_modules, "target_modules")
    if exclude_modules is not None:
        wanted -= matching(exclude_modules, "exclude_modules")
    if not wanted:
        raise UsageError("`target_modules`, `exclude_modules`: no module is left to train")
    obstacles = {name: obstacle(model, records[name], located) for name in records if name in wanted}
    left_out = {name: reason for name, reason in obstacles.items() if reason is not None}
    if left_out and (not only_available or len(left_out) == len(wanted)):
        name, reason = next(iter(left_out.items()))
        raise InvalidInput(_refusal(name, reason, left_out, located, opened))
    saved_names, live_prefix = located.naming(name for name, reason in obstacles.items() if reason is None)
    return Choice(
        {saved: records[name] for name, saved in saved_names.items()},
        {saved: located.places[name] for name, saved in saved_names.items()},
        live_prefix,
        left_out,
    )


def obstacle(model: nn.Module, record: ModuleRecord, located: Located) -> str | None:
    """Why a module cannot be trained in this model; None if it can."""
    places = located.places.get(record.name)
    if places is None:
        return located.refused.get(record.name, f"{type(model).__name__} has no such module, or several")
    if any(place.expert is not None for place in places):
        return stacks.obstacle(model, record, places)
    if record.transposed and any(place.rows or place.taken is not None for place in places):
        return f"{places[0].path} has rows of it, which is stored transposed"
    if not all(place.parameter == f"{place.path}.weight" for place in places):
        return f"{places[0].parameter} holds it, which is no layer's weight"
    return None


def _refusal(name: str, reason: str, left_out: Mapping[str, str], located: Located, opened: BasisFile) -> str:
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    known = name in located.places or name in located.refused or name.endswith("]")
    basis = "" if known else f", or give the basis of this model instead of {opened.path}"
    ways = "leave it out with `exclude_modules`" if len(left_out) == 1 else "leave them out with `exclude_modules`"
    return f"{name}{more}: {reason}; {ways}, or all that cannot be trained with `only_available=True`{basis}"


def _tests(given: values.Names, parameter: str, model: nn.Module) -> list[tuple[str, Callable[[str], bool]]]:
    """What is asked for, part by part, each with its test for a module's path."""
    if isinstance(given, str):
        text = values.text(given, parameter).strip()
        if text == "all-linear":
            return [(text, lambda path: True)]
        if text == "default":
            return [(text, module_matcher(_default_targets(model, parameter)))]
        split = [part.strip() for part in text.split(",")]
        parts = split if all(map(_NAME.fullmatch, split)) else [text]
    else:
        parts = list(values.names(given, parameter))
        values.require(bool(parts), parameter, given, "names no module")
    try:
        return [(part, module_matcher(part)) for part in parts]
    except UsageError as error:
        raise UsageError(f"`{parameter}`: {error}") from None


def _default_targets(model: nn.Module, parameter: str) -> str:
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type not in DEFAULT_TARGETS:
        raise UsageError(
            f"`{parameter}` default: there is none for model type {model_type!r}; say all-linear, or names of modules"
        )
    return DEFAULT_TARGETS[model_type]

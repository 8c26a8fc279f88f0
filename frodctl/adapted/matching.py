"""Which weights of a checkpoint, or modules of a live model, are those that adapters trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from frodctl.adapted.conversion import LiveNames
from frodctl.adapted.opening import Source, find_base
from frodctl.checkpoint import codec, names, ties
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, Location, TensorInfo
from frodctl.checkpoint.targets import Target, linear_layer, linear_layers
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import LABELLING_TASKS, Adapter, TrainedModule


@dataclass(frozen=True, eq=False)
class Part:
    """What one adapter does to one weight."""

    source: Source
    trained: TrainedModule


@dataclass(frozen=True)
class Weight:
    """A weight that is merged."""

    target: Target
    parts: tuple[Part, ...]

    @property
    def group(self) -> tuple[tuple[int, str], ...]:
        """Equal for weights that are updated with the same bases."""
        return tuple((id(part.source), part.trained.category) for part in self.parts)


@dataclass(frozen=True)
class Match:
    """A base, adapters over it, and which of its weights they change."""

    checkpoint: Checkpoint
    sources: tuple[Source, ...]
    weights: tuple[Weight, ...]  #: those of one group stand together
    prefix: str  #: that the adapters' names have over the checkpoint's
    warnings: tuple[str, ...]
    live_names: tuple[LiveNames, ...] = field(repr=False, compare=False)  #: of the sources, in their order

    def replaced(self) -> dict[str, tuple[Source, TensorInfo]]:
        """The tensors that were trained as a whole, by their names in the checkpoint or, if new, in the live model.

        Raises
        ------
        InvalidInput
            One matches nothing, has another shape, is there twice, or holds no floating-point numbers.
        """
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        found: dict[str, tuple[Source, TensorInfo]] = {}
        for source, live_names in zip(self.sources, self.live_names, strict=True):
            adapter = _by_stored_names(source.adapter, shapes, live_names)
            for name, info in whole_tensors(adapter, shapes, self.checkpoint.model, new_head=True).items():
                if name in found:
                    other = found[name][0].adapter.name
                    raise InvalidInput(
                        f"{adapter.name}: {name} was trained as a whole in {other} too; merge one of them"
                    )
                if info.dtype not in codec.FLOAT_DTYPES:
                    raise InvalidInput(f"{adapter.name}: tensor {info.name} is {info.dtype}, not floating point")
                found[name] = source, info
        return found


def match(
    base: Location,
    sources: tuple[Source, ...],
    *,
    headers_only: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Match:
    """Open the base of adapters, fetching what is on the Hub, and find the weights that they change.

    Parameters
    ----------
    base : Location
        ``-`` for the one that the first adapter names.
    sources : tuple of Source
    headers_only, progress
        As for `open_checkpoint`.

    Raises
    ------
    InvalidInput
        The base is not the adapters', or quantized.
    FrodctlError
        As `open_checkpoint`.
    """
    location, warnings = find_base(base, sources[0].adapter)
    checkpoint = open_checkpoint(location, headers_only=headers_only, everything=True, progress=progress)
    refuse_quantized(checkpoint)
    live_names = tuple(LiveNames(checkpoint, _classes(source.adapter)) for source in sources)
    weights, prefix = _weights(checkpoint, sources, live_names)
    return Match(checkpoint, sources, weights, prefix, tuple(warnings), live_names)


def live_paths(paths: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Of a live model's paths that of each of the checkpoint's modules that it has exactly once."""
    found: dict[str, list[str]] = {}
    for path, name in names.match(paths, known).items():
        if name is not None:
            found.setdefault(name, []).append(path)
    return {name: live[0] for name, live in found.items() if len(live) == 1}


def whole_tensors(
    adapter: Adapter, shapes: Mapping[str, Sequence[int]], where: str, *, new_head: bool = False
) -> dict[str, TensorInfo]:
    """The tensors that an adapter trained as a whole, by their names among those of a checkpoint or a live model.

    Parameters
    ----------
    adapter : Adapter
    shapes : mapping of str to sequence of int
        Of the tensors there are, by name.
    where : str
        What has them, for messages.
    new_head : bool
        Whether a module that was trained as a whole may be new: it then keeps its name in the adapter's live model. One
        that labels may have another number of rows.

    Raises
    ------
    InvalidInput
        One matches nothing, has another shape, or is there twice.
    """
    matched = names.match(adapter.replaced, shapes)
    found: dict[str, TensorInfo] = {}
    for live, info in adapter.replaced.items():
        may_differ = new_head and adapter.is_saved_module(live)
        name = matched[live] or (live if may_differ else None)
        if name is None:
            raise _unmatched(info.name, live.removesuffix(".weight"), where, adapter)
        if name in found:
            raise InvalidInput(f"{adapter.name}: {found[name].name} and {info.name} are both {name} here")
        there, own = list(shapes.get(name, info.shape)), list(info.shape)
        relabelled = may_differ and adapter.task in LABELLING_TASKS and there[1:] == own[1:]
        if there != own and not relabelled:
            raise InvalidInput(f"{adapter.name}: tensor {info.name} is {own}, but {name} of {where} is {there}")
        found[name] = info
    return found


def _weights(
    checkpoint: Checkpoint, sources: Sequence[Source], live_names: Sequence[LiveNames]
) -> tuple[tuple[Weight, ...], str]:
    """The weights to merge, and the prefix that their live names have over the checkpoint's."""
    matrices = linear_layers(checkpoint)
    parts: dict[str, list[Part]] = {}
    prefixes = set()
    for source, live in zip(sources, live_names, strict=True):
        matched = _modules(source.adapter, matrices, live)
        prefixes.add(_prefix(source.adapter, matched, live))
        found: dict[str, str] = {}
        for module in source.adapter.modules:
            name = matched[module.module]
            if name is None:
                raise _unmatched(module.scales.name, module.module, checkpoint.model, source.adapter)
            if name in found:
                raise InvalidInput(f"{source.adapter.name}: {found[name]} and {module.module} are both {name} here")
            found[name] = module.module
            parts.setdefault(name, []).append(Part(source, module))
    weights = []
    for name, items in parts.items():
        target = linear_layer(*matrices[name], checkpoint)
        if any(part.source.adapter.config.get("fan_in_fan_out") is True for part in items) and target.named_conv1d:
            target = replace(target, transposed=True)  # PEFT saw the module; the config may not tell
        for part in items:
            if part.trained.n != target.n:
                raise InvalidInput(
                    f"{part.source.adapter.name}: {part.trained.scales.name} has {part.trained.n} scales, but "
                    f"{target.stored.name} of {checkpoint.model} has {target.n} columns: another base?"
                )
        weights.append(Weight(target, tuple(items)))
    order = {id(source): number for number, source in enumerate(sources)}
    weights.sort(
        key=lambda w: (
            [(order[id(p.source)], p.trained.category) for p in w.parts],
            names.natural_key(w.target.module),
        )
    )
    return tuple(weights), prefixes.pop() if len(prefixes) == 1 else ""


def _modules(adapter: Adapter, matrices: Collection[str], live_names: LiveNames) -> dict[str, str | None]:
    """The checkpoint's module that each trained module of an adapter is.

    PEFT's adapters have the live model's names, which may be others than the checkpoint's.
    """
    matched = names.match([module.module for module in adapter.modules], matrices)
    missing = [f"{path}.weight" for path, name in matched.items() if name is None]
    if missing and adapter.provenance is None and live_names.classes:
        found = live_names.stored(missing)
        matched |= {path.removesuffix(".weight"): name.removesuffix(".weight") for path, name in found.items()}
    return matched


def _prefix(adapter: Adapter, matched: Mapping[str, str | None], live_names: LiveNames) -> str:
    """What the live model's names have before the checkpoint's."""
    own = adapter.provenance.live_prefix if adapter.provenance else live_names.prefix
    return names.live_prefix(matched) if own is None else own


def _classes(adapter: Adapter) -> list[str]:
    """The class of the live model that PEFT trained, where it says it."""
    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return [named] if isinstance(named, str) else []


def _by_stored_names(adapter: Adapter, shapes: Mapping[str, Sequence[int]], live_names: LiveNames) -> Adapter:
    """The adapter with the checkpoint's names of what was trained as a whole, where a live model's are others."""
    matched = names.match(adapter.replaced, shapes)
    # what seems to be new may only be renamed, in a model that renames others
    asked = live_names.prefix is not None
    missing = [
        name for name, found in matched.items() if found is None and (asked or not adapter.is_saved_module(name))
    ]
    if not missing or adapter.provenance is not None or not live_names.classes:
        return adapter
    stored = live_names.stored(missing)
    return replace(adapter, replaced={stored.get(name, name): info for name, info in adapter.replaced.items()})


def _unmatched(tensor: str, module: str, where: str, adapter: Adapter) -> InvalidInput:
    if ties.is_head(f"{module}.weight"):
        return InvalidInput(
            f"{adapter.name}: {tensor}: {where} has no {module}.weight of its own; where that is tied to the input "
            "embedding, both would change"
        )
    return InvalidInput(
        f"{adapter.name}: tensor {tensor} matches nothing, or several things, in {where}: another base?"
    )

"""Where a model of transformers holds a checkpoint's tensors, which it may rename, split, join or stack.

transformers' own mapping says so, for a live model or for one on the meta device that is made from a config.json. What
an operation does is found by having it convert the numbers of the rows instead of the rows: whatever moves whole rows
is known by that, and what does not is refused by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from frodctl.checkpoint import names
from frodctl.checkpoint.records import Checkpoint
from frodctl.errors import InvalidInput

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

Shapes = Mapping[str, Sequence[int]]  #: of tensors, by name


@dataclass(frozen=True)
class Place:
    """Where a live model holds a checkpoint's tensor, or rows of it: one that is split has several places."""

    parameter: str
    rows: tuple[int, int] | None = None  #: from and to, of the parameter's; None: they are all from this tensor
    expert: int | None = None  #: which of the matrices that the parameter stacks
    transposed: bool = False  #: whether it is stored the other way round
    #: the numbers of the tensor's rows that are there, in their order; None: all of them, in the tensor's
    taken: HostArray | None = field(default=None, compare=False)

    @property
    def path(self) -> str:
        """Of the module whose weight it is, or that stacks it with others."""
        return self.parameter.removesuffix(".weight") if self.expert is None else self.parameter.rpartition(".")[0]


Places = dict[str, tuple[Place, ...]]


def places(model: Any, stored: Shapes, live: Shapes) -> tuple[Places, dict[str, str]]:
    """Where a model of transformers holds each of a checkpoint's tensors.

    Parameters
    ----------
    model : PreTrainedModel
        Live, or on the meta device.
    stored : mapping of str to sequence of int
        Shapes of the checkpoint's tensors, or of some of them.
    live : mapping of str to sequence of int
        Shapes of the model's parameters and buffers, by their names without adapters.

    Returns
    -------
    found : dict of str to tuple of Place
        By the tensors' names; of a tensor that stacks matrices by ``name[0]``, ``name[1]``, …
    refused : dict of str to str
        Why the place of a tensor cannot be said. Those that the model does not load are in neither.
    """
    found: Places = {}
    refused: dict[str, str] = {}
    for conversions in _conversions(model):
        rest = {name: shape for name, shape in stored.items() if name not in found and name not in refused}
        _convert(model, conversions, rest, live, found, refused)
    return found, refused


def _conversions(model: Any) -> Iterator[list[Any]]:
    """The mappings that a model may have been loaded with: its own, which may be its user's, and its class's."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before version 5
        return
    if own := getattr(model, "_weight_conversions", None):
        yield copy.deepcopy(own)
    yield get_model_conversion_mapping(model)


def _convert(
    model: Any, conversions: Sequence[Any], stored: Shapes, live: Shapes, found: Places, refused: dict[str, str]
) -> None:
    """Follow each tensor as `transformers.core_model_loading.convert_and_load_state_dict_in_model` does."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix: Any = model.base_model_prefix
    shapes: Any = live
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if renamed not in live and name in live:
            renamed, pattern = rename_source_key(name, [], [], prefix, shapes)
        if renamed in live and pattern is None:
            found[name] = (Place(renamed),)
        elif renamed in live and pattern is not None:
            groups.setdefault(renamed, []).append((name, pattern))
    for renamed, sources in groups.items():
        converter = copy.deepcopy(by_pattern[sources[0][1]])
        traced = _trace(converter, renamed, sources, stored, live, model.config)
        if traced is None:
            operations = ", ".join(map(repr, converter.operations))
            reason = f"transformers makes {renamed} from it by {operations}, which frodctl does not express"
            refused.update(dict.fromkeys((name for name, _ in sources), reason))
        else:
            found.update(traced)


def _trace(
    converter: Any, renamed: str, sources: Sequence[tuple[str, str]], stored: Shapes, live: Shapes, config: Any
) -> Places | None:
    """Where the rows of several tensors go in one conversion; None where that does not move whole rows."""
    import numpy as np
    import torch

    first = 0
    starts = []
    for name, pattern in sources:
        rows = _without_columns(stored[name])
        count = int(np.prod(rows))
        converter.add_tensor(renamed, name, pattern, torch.arange(first, first + count).view(rows))
        starts.append(first)
        first += count
    for pattern, count, rows in _absent(converter, sources, stored, live[renamed]):
        for number in range(count):
            converter.add_tensor(renamed, f"{pattern} {number}", pattern, torch.full(rows, -1))
    try:
        made = converter.convert(renamed, model=_Parameters(live), config=config)
    except Exception:  # whatever another library's operation raises where it is given rows without columns
        return None
    found: Places = {}
    for parameter, tensors in made.items():
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        numbers = _row_numbers(tensor.numpy(), live.get(parameter))
        if numbers is None:
            return None
        array, transposed = numbers
        stacked = list(enumerate(array)) if array.ndim == 2 else [(None, array)]
        for expert, row in stacked:
            for name, place in _places_in(parameter, expert, transposed, row, sources, starts, stored):
                if place is None:
                    return None
                found[name] = (*found.get(name, ()), place)
    return found


class _Parameters:
    """What conversions ask of the model: a parameter's shape."""

    def __init__(self, live: Shapes) -> None:
        self.live = live

    def get_parameter(self, name: str) -> Any:
        import torch

        return torch.empty(_without_columns(self.live[name]), device="meta")


def _without_columns(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the numbers of a tensor's rows: one column, and all of a vector."""
    return (*shape[:-1], 1) if len(shape) > 1 else tuple(shape)


def _absent(
    converter: Any, sources: Sequence[tuple[str, str]], stored: Shapes, whole: Sequence[int]
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Of tensors that are joined with those at hand the pattern, how many there are, and their rows' shape.

    A basis need not have all that a layer joins. Those it lacks share the rest of the layer's rows, evenly where they
    are several: a guess, which the check of the weights would not pass if it were wrong.
    """
    first = {pattern: stored[name] for name, pattern in reversed(sources)}
    absent = [pattern for pattern in converter.source_patterns if pattern not in first]
    if not absent or any(len(shape) != 2 for shape in first.values()) or len(whole) < 2:
        return
    rest, uneven = divmod(whole[-2] - sum(shape[0] for shape in first.values()), len(absent))
    if rest > 0 and not uneven:
        count = len(sources) // len(first)
        yield from ((pattern, count, (rest, 1)) for pattern in absent)


def _row_numbers(numbers: HostArray, shape: Sequence[int] | None) -> tuple[HostArray, bool] | None:
    """The numbers of a parameter's rows, or of a stack's (experts, rows), and whether it is stored the other way round;
    None where what was made is not the rows of something of the parameter's shape.
    """
    if shape is None or len(shape) > 3:
        return None
    if numbers.shape == _without_columns(shape):
        return (numbers[..., 0] if numbers.ndim > 1 else numbers), False
    if len(shape) > 1 and numbers.shape == (*shape[:-2], 1, shape[-1]):
        return numbers[..., 0, :], True
    return None


def _places_in(
    parameter: str,
    expert: int | None,
    transposed: bool,
    numbers: HostArray,
    sources: Sequence[tuple[str, str]],
    starts: Sequence[int],
    stored: Shapes,
) -> Iterator[tuple[str, Place | None]]:
    """The tensors, or matrices of tensors, whose rows a parameter has; None for one whose rows are not together."""
    import numpy as np

    owners = np.where(numbers < 0, -1, np.searchsorted(np.asarray(starts), numbers, side="right") - 1)
    for owner in np.unique(owners[owners >= 0]):
        name, _ = sources[owner]
        height = stored[name][-2] if len(stored[name]) > 1 else stored[name][0]
        matrices = np.where(owners == owner, (numbers - starts[owner]) // height, -1)
        for matrix in np.unique(matrices[matrices >= 0]):
            where = np.flatnonzero(matrices == matrix)
            label = f"{name.removesuffix('.weight')}[{matrix}]" if len(stored[name]) > 2 else name
            if where[-1] - where[0] + 1 != len(where):
                yield label, None
                continue
            rows = None if len(where) == len(numbers) else (int(where[0]), int(where[-1]) + 1)
            taken = (numbers[where] - starts[owner]) % height
            in_order = np.array_equal(taken, np.arange(height))
            yield label, Place(parameter, rows, expert, transposed, None if in_order else taken)


def base_prefix(model: Any, found: Places) -> str:
    """The base model's prefix, if it is before all that was found in a model and before no name in the checkpoint."""
    prefix = f"{model.base_model_prefix}."
    parameters = [place.parameter for places in found.values() for place in places]
    added = all(name.startswith(prefix) for name in parameters) and not any(n.startswith(prefix) for n in found)
    return prefix if added and prefix != "." else ""


class LiveNames:
    """What a live model calls a checkpoint's tensors, by the model of transformers that its config.json names.

    Parameters
    ----------
    checkpoint : Checkpoint
    classes : sequence of str
        Of the model, the first that transformers has; by default those of the config.
    """

    def __init__(self, checkpoint: Checkpoint, classes: Sequence[str] = ()) -> None:
        self.checkpoint = checkpoint
        architectures = checkpoint.config.get("architectures")
        self.classes = [*classes, *(map(str, architectures) if isinstance(architectures, list) else ())]
        self.prefix: str | None = None  #: that the live names have before the checkpoint's; None: never asked

    def stored(self, parameters: Sequence[str]) -> dict[str, str]:
        """The checkpoint's tensor that each of these parameters of a live model is, as far as it is one.

        Raises
        ------
        InvalidInput
            transformers makes a parameter from other tensors, or parts of some; or it is not installed, or knows no
            such model: code that comes with a model is never run.
        """
        matched = names.match(parameters, self._holders)
        outer = names.live_prefix({parameter: live for parameter, live in matched.items() if live is not None})
        places_in_model, inner = self._located
        self.prefix = outer + inner
        found = {}
        for parameter, live in matched.items():
            if live is None:
                continue
            (name, place), *others = self._holders[live]
            if others or len(places_in_model[name]) > 1 or place.rows or place.expert is not None or place.transposed:
                raise InvalidInput(
                    f"{self.checkpoint.model}: {parameter} is made from (parts of) {name} as it is loaded, and "
                    "what was trained of it alone cannot be merged there; merge it in the live model (merge_and_unload)"
                )
            found[parameter] = name
        return found

    @cached_property
    def _located(self) -> tuple[Places, str]:
        """Where the model holds the checkpoint's tensors, and the prefix that its names have."""
        model = _meta_model(self.checkpoint, self.classes)
        stored = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        found, _ = places(model, stored, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        return found, base_prefix(model, found)

    @cached_property
    def _holders(self) -> dict[str, list[tuple[str, Place]]]:
        """For each parameter the checkpoint's tensors that are in it, and where."""
        holders: dict[str, list[tuple[str, Place]]] = {}
        for name, held in self._located[0].items():
            for place in held:
                holders.setdefault(place.parameter, []).append((name, place))
        return holders


def _meta_model(checkpoint: Checkpoint, classes: Sequence[str]) -> Any:
    """The model of a config.json, without weights, of the first of these classes that transformers has."""
    try:
        import transformers
        from torch import device
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise InvalidInput(
            f"{checkpoint.model}: its tensors may have other names in the live model, and transformers, which knows "
            "them, is not installed: pip install 'frodctl[transformers]'"
        ) from None
    kind = str(checkpoint.config.get("model_type", ""))
    named = (getattr(transformers, name, None) for name in classes if name.isidentifier())
    chosen = next((c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    if kind not in CONFIG_MAPPING or chosen is None:
        raise InvalidInput(
            f"{checkpoint.model}: its tensors may have other names in the live model, but transformers has no model of "
            f"type {kind or 'none'} and class {' or '.join(classes) or 'none'}; code that comes with a model is not run"
        )
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its remarks on the config are for who uses the model
    try:
        with device("meta"):
            return chosen(CONFIG_MAPPING[kind].from_dict(_with_infinities(dict(checkpoint.config))))
    except Exception as error:  # of another library's code, given what a config.json may say
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInput(
            f"{checkpoint.model}: transformers cannot make {chosen.__name__} of its config.json ({reason})"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)


def _with_infinities(value: Any) -> Any:
    """What a config.json says, with the numbers that transformers writes there as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        plain = {key: _with_infinities(item) for key, item in value.items()}
        return float(plain["__float__"]) if plain.keys() == {"__float__"} else plain
    return [_with_infinities(item) for item in value] if isinstance(value, list) else value

"""Merging into what was trained: the base's weights as the live model held them, in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from frodctl.adapted.matching import Match
from frodctl.adapted.opening import Source
from frodctl.adapted.requantized import KINDS, require_library
from frodctl.checkpoint import names
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.targets import linear_layer, linear_layers, select
from frodctl.errors import InvalidInput, UsageError

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

STORED, AUTO = "stored", "auto"
#: Resident memory of torch and the library that quantizes.
LIBRARY_BYTES = 320_000_000


@dataclass(frozen=True)
class BaseAs:
    """Which of the result's tensors come from quantized weights, and how these were quantized."""

    kind: str  #: one of `KINDS`
    dtype: str | None  #: that the model was loaded in (the format's name); None: the one it is stored in
    library: str  #: that does it, with its version
    tensors: Mapping[str, bool] = field(repr=False)  #: by their names in the result, and whether they are transposed
    unknown: int = 0  #: quantized layers of the live model that are not in the base, or tied to what was not quantized

    def of(self, name: str, stored: HostArray) -> HostArray:
        """A tensor as the live model held it, in float32; as it is stored where that is how it was held."""
        from frodctl.adapted.requantized import requantized
        from frodctl.arrays import NAMES

        if name not in self.tensors:
            return stored
        dtype = self.dtype or NAMES[stored.dtype]
        if self.tensors[name]:
            return requantized(stored.T, self.kind, dtype).T
        return requantized(stored, self.kind, dtype)

    def as_dict(self) -> dict[str, Json]:
        """For JSON."""
        return {"kind": self.kind, "dtype": self.dtype, "library": self.library, "tensors": len(self.tensors)}


def base_as(found: Match, asked: str, new_names: Mapping[str, str]) -> BaseAs | None:
    """How to hold the base for a merge: as is asked for, or as the adapters say.

    Parameters
    ----------
    found : Match
        Base and adapters.
    asked : str
        "stored", "auto" or one of `KINDS`.
    new_names : mapping
        The base's tensors and what the result calls them.

    Raises
    ------
    UsageError
        The adapters were trained over different bases, or PEFT's rules are to be followed, which knows none of this.
    InvalidInput
        An adapter was trained over a quantization that is not one of `KINDS`.
    FrodctlError
        The library is not installed.
    """
    records = [_record(source) for source in found.sources]
    kind, dtype, modules = asked, None, []
    if asked == STORED or (asked == AUTO and not any(records)):
        return None
    if asked == AUTO:
        if len({(str(record.get("kind")), str(record.get("dtype"))) for record in records}) > 1:
            raise UsageError(
                "`base_as` auto: the adapters were trained over bases in different dtypes; say which it is"
            )
        kind = str(records[0]["kind"])
        if kind not in KINDS:
            name = found.sources[0].adapter.name
            raise InvalidInput(f"{name}: was trained over {kind}, which is not done here; say `base_as=stored`")
    if any(source.form == "reconstruct" for source in found.sources):
        raise UsageError("`base_as` goes with form delta: it is W_q + ΔW, and PEFT's adapters are not W + ΔW")
    for record in records:
        if record.get("kind") == kind:
            dtype = record["dtype"]
            modules += record["modules"]
    tensors = _tensors(found, modules) if modules else _usual(found)
    for name in found.checkpoint.ties.broken_by(tensors):  # an embedding that is no less than it was
        del tensors[name]
    unknown = len(set(modules)) - len(tensors) if modules else 0
    return BaseAs(kind, dtype, require_library(kind), {new_names[name]: t for name, t in tensors.items()}, unknown)


def notes(found: Match, asked: str, chosen: BaseAs | None) -> Iterable[str]:
    """What should be known of how the base is held."""
    for source in found.sources:
        record = _record(source)
        trained, held = record.get("kind", "the base as it is stored"), chosen.kind if chosen else None
        if asked == STORED and record:
            yield (
                f"{source.adapter.name}: was trained over the base in {trained}, and is merged into it as it is "
                "stored; `base_as=auto` merges into what was trained"
            )
        elif held and record.get("kind") != held:
            yield f"{source.adapter.name}: was trained over {trained}, and is merged into the base in {held}"
    if chosen and chosen.unknown:
        yield f"{chosen.unknown} layers that were in {chosen.kind} are not in the base, or tied, and stay as stored"


def _record(source: Source) -> Mapping[str, Json]:
    return source.adapter.provenance.quantization if source.adapter.provenance else {}


def _tensors(found: Match, modules: Iterable[str]) -> dict[str, bool]:
    """The base's tensors that these modules of adapters or live models are, and whether they are transposed."""
    trained = {part.trained.module: weight.target for weight in found.weights for part in weight.parts}
    matrices = {name: info for name, (info, index) in linear_layers(found.checkpoint).items() if index is None}
    others = names.match([module for module in modules if module not in trained], matrices)
    targets = [trained[module] for module in modules if module in trained]
    targets += [linear_layer(matrices[name], None, found.checkpoint) for name in others.values() if name is not None]
    return {target.tensor.name: target.transposed for target in targets if target.index is None}


def _usual(found: Match) -> dict[str, bool]:
    """What a library quantizes that is told nothing else: the linear layers of the blocks, and what is trained."""
    targets = [*select(found.checkpoint, "all-linear").targets, *(weight.target for weight in found.weights)]
    return {target.tensor.name: target.transposed for target in targets if target.index is None}

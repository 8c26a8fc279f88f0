"""What an inspection is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from frodctl.checkpoint.source import Location
from frodctl.errors import UsageError

SCHEMA_VERSION = 1

#: The figures of a spectrum, in the order of the columns.
FIGURES = (
    "spectral_norm", "frobenius_norm", "nuclear_norm", "stable_rank", "effective_rank", "numerical_rank",
    "condition_number", "energy_rank_90", "energy_rank_95", "energy_rank_99", "marchenko_pastur_edge", "above_edge",
    "power_law_alpha", "power_law_distance", "power_law_xmin",
)  # fmt: skip


@dataclass(frozen=True)
class InspectOptions:
    """What may be chosen about an inspection; the command line has a flag for each."""

    spectrum: bool = False  #: exact figures of every matrix
    estimate: bool = False  #: the same by randomised methods, with error bars
    against: str | None = None  #: another checkpoint, to compare with tensor by tensor
    base: str | None = None  #: the checkpoint that a basis or an adapter belongs to
    basis: str | Path | None = None  #: shared-basis file of an adapter without V
    trust_basis: bool = False
    adapter_name: str | None = None  #: which of several adapters in a folder
    include: tuple[str, ...] = ()  #: globs; a tensor's name must match one
    exclude: tuple[str, ...] = ()  #: globs; it must match none
    sort: str | None = None  #: a row's key: largest first; after a minus sign smallest first
    top: int | None = None  #: so many rows
    seed: int = 0  #: of the randomised methods
    device: str = "auto"
    revision: str | None = None
    subfolder: str = ""
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if self.spectrum and self.estimate:
            raise UsageError("--spectrum and --estimate exclude each other")
        if self.against is not None and self.estimate:
            raise UsageError("--against takes --spectrum, not --estimate")
        if self.top is not None and self.top < 1:
            raise UsageError(f"--top {self.top}: must be positive")

    @property
    def headers_only(self) -> bool:
        """Whether no tensor's bytes are needed."""
        return not (self.spectrum or self.estimate or self.against or self.base)

    def location(self, model: str) -> Location:
        """A target as these options reach it."""
        return Location(model, self.revision, self.subfolder, self.token, self.cache_dir, self.offline)

    def location_of_other(self, model: str) -> Location:
        """What a target is held against: its revision can only be in its name."""
        return Location(model, token=self.token, cache_dir=self.cache_dir, offline=self.offline)

    def selects(self, name: str) -> bool:
        """Whether a tensor of this name is wanted."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


@dataclass(frozen=True)
class Row:
    """One tensor: its figures by name, and its singular values where they were computed."""

    values: dict[str, Any]
    singular_values: Any = None  #: torch.Tensor (k,), float64, descending


@dataclass(frozen=True)
class Report:
    """One target: rows as they come, and a summary once they have come."""

    target: str
    kind: str  #: checkpoint, basis, adapter or comparison
    rows: Iterator[Row]
    summary: Callable[[], dict[str, Any]]
    count: int  #: of rows
    names: Collection[str]  #: of all that the rows were selected from


def arranged(rows: Iterator[Row], sort: str | None, top: int | None) -> Iterator[Row]:
    """The rows in the order and number asked for.

    Raises
    ------
    UsageError
        No row has the key.
    """
    if sort is None:
        yield from (row for number, row in enumerate(rows) if top is None or number < top)
        return
    key = sort.removeprefix("-")
    found = list(rows)
    if found and not any(key in row.values for row in found):
        columns = [name for name in found[0].values if name not in ("profile", "errors", "estimated")]
        raise UsageError(f"`sort` {sort}: no such column{_elsewhere(key)}; there are: {', '.join(columns)}")
    known = [row for row in found if row.values.get(key) is not None]
    numbers = all(isinstance(row.values[key], (int, float)) for row in known)
    known.sort(key=lambda row: row.values[key] if numbers else str(row.values[key]), reverse=(sort == key) == numbers)
    yield from [*known, *(row for row in found if row.values.get(key) is None)][:top]


def _elsewhere(key: str) -> str:
    """What has to be asked for, for rows to have this key."""
    if key in FIGURES:
        return " without `spectrum`"
    if key.removeprefix("delta_") in FIGURES:
        return ", which is of an adapter with its `base`"
    if key.removeprefix("difference_") in FIGURES:
        return ", which is of a checkpoint `against` another, with `spectrum`"
    return ""

"""What an inspection gives back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frodctl.checkpoint.inputs import Json
from frodctl.errors import UsageError
from frodctl.jobs.inspect.columns import FIGURES, Columns

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


@dataclass(frozen=True)
class Row:
    """One tensor: its figures by name, and its singular values where they were computed."""

    values: dict[str, Json]
    singular_values: HostArray | None = None  #: (k,), float64, descending


@dataclass(frozen=True)
class Report:
    """One target: rows as they come, and a summary once they have come."""

    target: str
    kind: str  #: checkpoint, basis, adapter or comparison
    columns: Columns
    rows: Iterator[Row]
    summary: Callable[[], dict[str, Json]]
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

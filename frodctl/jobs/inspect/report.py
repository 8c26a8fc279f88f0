"""What an inspection gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from frodctl.errors import UsageError

SCHEMA_VERSION = 1


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
        raise UsageError(f"--sort {sort}: no such column; there are: {', '.join(found[0].values)}")
    known = [row for row in found if row.values.get(key) is not None]
    numbers = all(isinstance(row.values[key], (int, float)) for row in known)
    known.sort(key=lambda row: row.values[key] if numbers else str(row.values[key]), reverse=(sort == key) == numbers)
    yield from [*known, *(row for row in found if row.values.get(key) is None)][:top]

"""What a job's rows hold, for tables and separated values alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from frodctl.checkpoint.inputs import Json

#: How a person is shown a value: as it is, as text (to the left), as a count of things or bytes, to three digits (with
#: its error, if it is an estimate) or to nine, in per cent, in thousandths. A few are of several values.
Kind = Literal[
    "value", "text", "count", "bytes", "figure", "exact", "seconds", "list", "shapes", "profile", "quantiles", "range",
    "heights", "share", "thousandths",
]  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of a table; those without a title are for programs only."""

    key: str
    title: str = ""
    kind: Kind = "value"
    absent: str = ""  #: what a person is shown where there is no value


@dataclass(frozen=True)
class Table:
    """A table for a person."""

    columns: tuple[Column, ...]
    of: str = ""  #: what the summary has under this key; the rows where there is none
    only: Callable[[Mapping[str, Json]], bool] = lambda row: True  #: which of them

    def lines(self, rows: Sequence[Mapping[str, Json]], summary: Mapping[str, Json]) -> list[Mapping[str, Json]]:
        """What is to be shown of a finished job."""
        return [row for row in (summary[self.of] if self.of else rows) if self.only(row)]

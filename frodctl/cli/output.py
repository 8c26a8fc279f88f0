"""What is printed: data on stdout as a table or in a format for programs, messages on stderr."""

from __future__ import annotations

import csv
import errno
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frodctl.errors import FrodctlError, OutOfResources


class OutputClosed(Exception):
    """The reader of stdout has gone."""


#: A column of names is broken over lines rather than wider than this, where there is no room.
_NARROWEST_NAME = 24
_FIRST_FEW = 5
_GAP = 2  # between columns

#: What would break a line of tab-separated values, as spaces.
_NO_BREAKS = str.maketrans("\t\n\r", "   ")
#: Names come from strangers' files, and a terminal obeys what it is sent.
NO_CONTROL = dict.fromkeys([*range(10), *range(11, 32), *range(127, 160)], "?")


@dataclass(frozen=True)
class Column:
    """A column of a table; those without a title are for programs only."""

    key: str
    title: str = ""
    show: Callable[[Mapping[str, Any]], str] | None = None  #: the cell, from the row; by default its value
    left: bool = False  #: align to the left


class Output:
    """Standard output in one of the formats."""

    def __init__(self, format_: str | None, as_json: bool) -> None:
        default = "human" if sys.stdout is not None and sys.stdout.isatty() else "tsv"
        self.format = "json" if as_json else format_ or default

    def emit(self, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        """Print the result: ``document`` as JSON, or ``rows`` in the format that was asked for."""
        if self.format == "json":
            self._write(json.dumps(_plain(document), indent=2, allow_nan=False) + "\n")
        elif self.format == "human":
            self.table(rows, columns)
        else:
            self.stream(rows, [column.key for column in columns])

    def stream(self, rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> None:
        """Print each row as it comes: as a JSON object, or what it has under ``keys`` as separated values."""
        if self.format == "jsonl":
            for row in rows:
                self._write(json.dumps(_plain(row), allow_nan=False) + "\n")
        elif self.format == "csv":
            writer = csv.writer(_Lines(self._write))
            writer.writerow(keys)
            writer.writerows([_cell(row.get(key)) for key in keys] for row in rows)
        else:
            self._write("\t".join(keys) + "\n")
            for row in rows:
                self._write("\t".join(_cell(row.get(key)).translate(_NO_BREAKS) for key in keys) + "\n")

    def line(self, text: str) -> None:
        """Print a line of text."""
        self._write(text.translate(NO_CONTROL) + "\n")

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[str]:
        """Print a table that fits the terminal; the titles of the columns there was no room for."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False, highlight=False)
        wanted = [column for column in columns if column.title]
        shown = _fitting(rows, wanted, console.width)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in shown:
            table.add_column(
                column.title,
                justify="left" if column.left else "right",
                overflow="fold",
                no_wrap=not column.left,  # numbers stay whole, names break where the terminal is narrow
            )
        for row in rows:
            table.add_row(*(_shown(column, row) for column in shown))
        with console.capture() as capture:
            console.print(table)
        self._write(capture.get())
        return [column.title for column in wanted if column not in shown]

    def _write(self, text: str) -> None:
        if sys.stdout is None:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise OutputClosed from None
        except OSError as error:
            failure = OutOfResources if error.errno == errno.ENOSPC else FrodctlError
            raise failure(f"stdout: {error.strerror}") from None


def _shown(column: Column, row: Mapping[str, Any]) -> str:
    return (column.show(row) if column.show else _cell(row.get(column.key))).translate(NO_CONTROL)


def _fitting(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], width: int) -> list[Column]:
    """As many of the columns, from the left, as the width has room for; names are broken only to save the first few."""
    shown: list[Column] = []
    for longest_name in (width, _NARROWEST_NAME):
        left, shown = width, []
        for column in columns:
            needed = max(len(column.title), *(len(_shown(column, row)) for row in rows), 0)
            left -= (min(needed, longest_name) if column.left else needed) + _GAP
            if left < -_GAP and len(shown) > 1:  # the last column needs no gap after it
                break
            shown.append(column)
        if len(shown) >= min(_FIRST_FEW, len(columns)):
            break
    return shown


class _Lines:
    """The little of a file that csv.writer needs. Lines end with a line feed alone, as in the other formats.

    csv.writer itself is left at its default line end: it quotes only those line breaks that its own consists of.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def write(self, line: str) -> None:
        self._write(line.removesuffix("\r\n") + "\n")


def _plain(value: Any) -> Any:
    """The value with what is not finite as None, as JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(item, int) for item in value) else ",").join(map(_cell, value))
    return str(value)


def human_bytes(count: float) -> str:
    """A size for a person: ``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_count(count: float) -> str:
    """A number for a person: ``1.23 M``."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def height_range(row: Mapping[str, Any]) -> str:
    """The cell for m: one height, or the range of a category's."""
    lowest, highest = row["m_min"], row["m_max"]
    return str(highest) if lowest == highest else f"{lowest}–{highest}"

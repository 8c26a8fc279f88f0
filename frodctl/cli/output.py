"""What is printed: data on stdout as a table or in a format for programs, messages on stderr."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from frodctl.checkpoint.inputs import Json
from frodctl.cli.agents import is_agent
from frodctl.errors import FrodctlError, OutOfResources
from frodctl.jobs.columns import Column


class OutputClosed(Exception):
    """The reader of stdout has gone."""


_GAP = 2  # between columns
#: So narrow a column of names may get, so that so many columns are shown: whole names, if that leaves a few figures.
_LAYOUTS = ((None, 5), (24, 4), (16, 3), (12, 3), (8, 1))
#: What names are broken into, the best first.
_PIECES = tuple(map(re.compile, (r"[^./]*[./]+|[^./]+", r"[^\s_,-]*[\s_,-]+|[^\s_,-]+", r".")))

#: What would break a line of tab-separated values, as spaces.
_NO_BREAKS = str.maketrans("\t\n\r", "   ")


def printable(text: str) -> str:
    """One line that shows all there is in the text: what a terminal would obey or hide is written as in Python.

    Names come from strangers' files. Control characters, line breaks, reversed directions and invisible characters
    in them would colour the screen, forge a message, or show one name as another.

    >>> printable("layers.0\\x1b[2J\\nError: none\\u202e")
    'layers.0\\\\x1b[2J\\\\nError: none\\\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def silence_stdout() -> None:
    """Whatever is left in the buffer cannot be written; without this the interpreter complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output:
    """Standard output in one of the formats.

    ``note`` is told what a person should know about what is printed. ``goes_on`` says that the command has more to do
    than to print, and does it although nobody reads any more.
    """

    def __init__(
        self,
        format_: str | None,
        as_json: bool,
        note: Callable[[str], None] = lambda text: None,
        *,
        goes_on: bool = False,
    ) -> None:
        self.note = note
        self.goes_on = goes_on
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.format = "json" if as_json else format_ or ""
        self.indent = None if self.format == "json" and is_agent(format_) else 2
        if self.format in ("", "agent"):
            self.format = "human" if self.terminal and not is_agent(format_) else "tsv"

    def emit(self, document: Mapping[str, Json], rows: Sequence[Mapping[str, Json]], columns: Sequence[Column]) -> None:
        """Print the result: ``document`` as JSON, or ``rows`` in the format that was asked for."""
        if self.format == "json":
            self._write(_json(document, self.indent) + "\n")
        elif self.format == "human":
            self.table(rows, columns)
        else:
            self.stream(rows, [column.key for column in columns])

    def stream(self, rows: Iterable[Mapping[str, Json]], keys: Sequence[str]) -> None:
        """Print each row as it comes: as a JSON object, or what it has under ``keys`` as separated values.

        Those are exact in a pipe; on a terminal they are made printable.
        """

        def cell(value: object) -> str:
            return printable(_cell(value)) if self.terminal else _cell(value)

        if self.format == "jsonl":
            for row in rows:
                self._write(_json(row) + "\n")
        elif self.format == "csv":
            writer = csv.writer(_Lines(self._write))
            writer.writerow(keys)
            writer.writerows([cell(row.get(key)) for key in keys] for row in rows)
        else:
            self._write("\t".join(keys) + "\n")
            for row in rows:
                self._write("\t".join(cell(row.get(key)).translate(_NO_BREAKS) for key in keys) + "\n")

    def line(self, text: str) -> None:
        """Print a line of text."""
        self._write(printable(text) + "\n")

    def table(self, rows: Sequence[Mapping[str, Json]], columns: Sequence[Column]) -> None:
        """Print a table that fits the terminal, and note which columns there was no room for."""
        text, hidden = drawn(rows, columns)
        self._write(text)
        if hidden:
            self.note(f"No room for: {', '.join(hidden)} (a wider terminal or --format tsv has them)")

    def _write(self, text: str) -> None:
        if sys.stdout is None:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            silence_stdout()
            if not self.goes_on:
                raise OutputClosed from None
        except OSError as error:
            failure = OutOfResources if error.errno == errno.ENOSPC else FrodctlError
            raise failure(f"stdout: {error.strerror}") from None


def drawn(
    rows: Sequence[Mapping[str, Json]], columns: Sequence[Column], width: int | None = None
) -> tuple[str, list[str]]:
    """A table that fits stdout's terminal, or ``width``, and the titles of columns that there was no room for.

    The first column has the names, which are broken where the terminal is narrow; figures stay whole.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=width)
    wanted = [column for column in columns if column.title]
    cells = [[column.title, *(_shown(column, row) for row in rows)] for column in wanted]
    widths = _layout([max(map(_width, column)) for column in cells], console.width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, width in widths.items():
        column = wanted[number]
        cells[number] = [wrapped(cell, width) for cell in cells[number]]
        table.add_column(
            cells[number][0],
            justify="left" if column.kind == "text" else "right",
            width=width,
            no_wrap=True,
            overflow="crop",
        )
    for number in range(1, len(rows) + 1):
        table.add_row(*(cells[column][number] for column in widths))
    with console.capture() as capture:
        console.print(table, crop=False)
    return capture.get(), [column.title for number, column in enumerate(wanted) if number not in widths]


def _shown(column: Column, row: Mapping[str, Json]) -> str:
    """What a person is shown of a row."""
    found = row.get(column.key)
    return printable(column.absent if found is None else _SHOWN.get(column.kind, _plainly)(row, column.key))


def _layout(needed: Sequence[int], width: int) -> dict[int, int]:
    """Which of the columns there is room for, the first ones first, and how wide each is made.

    Parameters
    ----------
    needed : sequence of int
        The widths of the columns' longest cells, that of names first.
    width : int
        Of the terminal.
    """
    names, *figures = needed
    shown: dict[int, int] = {}
    for narrowest, enough in _LAYOUTS:
        name = min(names, narrowest or names, width)
        shown, left = {0: name}, width - name
        for number, figure in enumerate(figures, 1):
            if figure + _GAP <= left:
                shown[number] = figure
                left -= figure + _GAP
        shown[0] = min(names, name + left)
        if len(shown) >= min(enough, len(needed)):
            break
    return shown


def wrapped(text: str, width: int) -> str:
    """The text in lines that fit: broken after dots, else after underscores, and inside of words only if need be."""
    if _width(text) <= width:
        return text
    indent = " " * min(2, width // 8)  # of the further lines, so that each row is seen to begin
    lines = [""]

    def put(text: str, pieces: Sequence[re.Pattern[str]]) -> None:
        for piece in pieces[0].findall(text):
            if _width(lines[-1] + piece) <= width:
                lines[-1] += piece
            elif len(pieces) == 1 or _width(indent + piece) <= width:
                lines.append(indent + piece)
            else:
                put(piece, pieces[1:])

    put(text, _PIECES)
    return "\n".join(line for line in lines if line.strip())


def _width(text: str) -> int:
    """How many cells of a terminal the text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


class _Lines:
    """The little of a file that csv.writer needs. Lines end with a line feed alone, as in the other formats.

    csv.writer itself is left at its default line end: it quotes only those line breaks that its own consists of.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def write(self, line: str) -> None:
        self._write(line.removesuffix("\r\n") + "\n")


def _json(value: object, indent: int | None = None) -> str:
    """JSON in ASCII without control characters."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


def _plain(value: object) -> object:
    """The value with what is not finite as None, as JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _cell(value: object) -> str:
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


def devices(device: str, ranks: int) -> str:
    """What computed, for a person: "cpu", or of several ranks the first's."""
    return device if ranks == 1 else f"{ranks} ranks, the first on {device}"


def about_time(seconds: float | None) -> str:
    """An estimate of time for a person, at the end of a list: ``, about 3.5 s``; nothing where there is none."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f", about {seconds:.2g} s"
    return f", about {seconds / 60:.0f} min" if seconds < 6000 else f", about {seconds / 3600:.1f} h"


def _plainly(row: Mapping[str, Json], key: str) -> str:
    return _cell(row[key])


def _figure(row: Mapping[str, Json], key: str) -> str:
    error = (row.get("errors") or {}).get(key)
    return f"{row[key]:.3g}" + (f" ±{error:.1g}" if error is not None else "")


def _range(row: Mapping[str, Json], key: str) -> str:
    """From the value under a key that ends with min to the one under the key with max."""
    return f"{row[key]:.3g}–{row[key.replace('min', 'max')]:.3g}"


def _heights(row: Mapping[str, Json], key: str) -> str:
    """m: one height, or the range of a category's."""
    lowest, highest = row[key.replace("max", "min")], row[key]
    return str(highest) if lowest == highest else f"{lowest}–{highest}"


def _quantiles(row: Mapping[str, Json], key: str) -> str:
    low, high = row[key]["p05"], row[key]["p95"]
    return f"{low:.1f}–{high:.1f}" if low is not None else ""


def _profile(row: Mapping[str, Json], key: str) -> str:
    """The profile of the singular values, the largest first."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value))] for value in row[key])


#: How a value of each kind is written for a person; of the others as in separated values.
_SHOWN: dict[str, Callable[[Mapping[str, Json], str], str]] = {
    "count": lambda row, key: human_count(row[key]),
    "bytes": lambda row, key: human_bytes(row[key]),
    "figure": _figure,
    "exact": lambda row, key: f"{row[key]:.9g}",
    "seconds": lambda row, key: "resumed" if row["resumed"] else f"{row[key]:.2f} s",
    "list": lambda row, key: ", ".join(row[key]),
    "shapes": lambda row, key: ", ".join("×".join(map(str, shape)) for shape in row[key][:3]),
    "profile": _profile,
    "quantiles": _quantiles,
    "range": _range,
    "share": lambda row, key: f"{row[key]:.0%}",
    "thousandths": lambda row, key: f"{row[key]:.3f}",
    "heights": _heights,
}

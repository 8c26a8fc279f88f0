"""Options that commands share, declared once, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("human", "tsv", "csv", "json", "jsonl")


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


source_options = _together(
    click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub."),
    click.option("--subfolder", default="", metavar="DIR", help="Folder inside the repository or folder."),
    click.option("--token", metavar="TOKEN", help="Hub token; HF_TOKEN is honoured."),
    click.option("--cache-dir", metavar="DIR", help="Where downloads are cached; HF_HOME is honoured."),
    click.option("--offline", is_flag=True, help="Use what is cached; do not ask the Hub."),
)
"""Where a checkpoint comes from."""

device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)

run_options = _together(
    click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone; download and write nothing."),
    click.option("--force", is_flag=True, help="Replace an output that exists."),
    click.option(
        "--resume/--no-resume", default=True, help="Take up what a killed run had finished.  [default: resume]"
    ),
)
"""How a job that writes an output is run."""

output_options = _together(
    click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        help="Of stdout. Default: human on a terminal, tsv in a pipe.",
    ),
    click.option("--json", "json_", is_flag=True, help="Short for --format json."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
"""What goes to stdout and stderr."""


class ScaledAdapter(click.ParamType[tuple[str, float]]):
    """An adapter and how much of it: ``ADAPTER`` or ``ADAPTER:SCALE``."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        if Path(value).exists():
            return value, 1.0
        adapter, colon, scale = str(value).rpartition(":")
        try:
            return (adapter, float(scale)) if colon and adapter else (str(value), 1.0)
        except ValueError:
            return str(value), 1.0


class Share(click.ParamType[float]):
    """A share of a whole: ``1.72%`` or ``0.0172``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{text!r}: expected a share such as 1.72% or 0.0172", param, ctx)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Size(click.ParamType[int]):
    """A number of bytes: ``500000``, ``128MB``, ``2GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(value).upper())
        if not match:
            self.fail(f"{value!r}: expected a size such as 500000, 128MB or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or ""])

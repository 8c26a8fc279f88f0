"""A job's progress on stderr: a bar with the time left on a terminal, a line a step elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import click

from frodctl.checkpoint.inputs import Json
from frodctl.cli.agents import is_agent
from frodctl.cli.options import as_flags
from frodctl.cli.output import drawn, printable
from frodctl.errors import FrodctlError
from frodctl.jobs.columns import Column
from frodctl.jobs.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_WIDE = 120  #: columns of a table where no terminal sets its width


class Reporter:
    """Shows the reports of a job; a context manager, whose call is the job's callback."""

    def __init__(self, quiet: bool, format_: str | None) -> None:
        self.quiet = quiet
        self.bars = not quiet and _bars_wanted() and not is_agent(format_)
        self.bar: Bar | None = None
        self.last = ""
        if not self.bars:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if quiet:
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")

    def __call__(self, report: Progress) -> None:
        if self.quiet:
            return
        if not report.total:
            self.note(report.text)
        elif self.bars:
            self._update_bar(report)
        elif report.text != self.last:
            self.last = report.text
            self.note(f"{report.text} ({min(report.done / report.total, 1):.0%} done)")

    def note(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if self.quiet:
            return
        context = click.get_current_context(silent=True)
        text = printable(as_flags(text, context.command if context else None))
        try:
            if self.bar is not None:
                self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(text, err=True)
        except OSError:  # nobody reads stderr any more, or its disk is full; the work goes on
            self.quiet = True

    def table(self, rows: Sequence[Mapping[str, Json]], columns: Sequence[Column]) -> None:
        """A table on stderr, unless quiet; whole where that is no terminal."""
        if self.quiet:
            return
        width = None if sys.stderr is not None and sys.stderr.isatty() else _WIDE
        for line in drawn(rows, columns, width)[0].splitlines():
            self.note(line.rstrip())

    def refusal(self, check: Callable[[], None]) -> None:
        """A line with what a check would refuse: what a dry run foresees."""
        try:
            check()
        except FrodctlError as error:
            self.note(f"Warning: {error}.")

    def _update_bar(self, report: Progress) -> None:
        text = printable(report.text)
        if self.bar is None:
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left:"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.add_task(text, total=report.total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], description=text, completed=min(report.done, report.total))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _bars_wanted() -> bool:
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return not disabled and sys.stderr is not None and sys.stderr.isatty()

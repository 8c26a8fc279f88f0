"""How a job tells what it is doing; whoever runs it decides what to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a job."""

    text: str
    done: float = 0.0  #: work done so far, in the unit of ``total``
    total: float = 0.0  #: all work; 0 where the report is a message


Callback = Callable[[Progress], None]


def silent(report: Progress) -> None:
    """The callback that shows nothing."""

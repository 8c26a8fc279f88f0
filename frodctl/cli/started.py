"""How the command was started."""

from __future__ import annotations

from dataclasses import dataclass

import click

from frodctl.jobs.ranks import Launch


@dataclass(frozen=True)
class Started:
    """What a command knows of its process."""

    own_process: bool  #: it has the process to itself
    launch: Launch  #: alone, or as one of several ranks


def started() -> Started:
    """Of the command that is running."""
    found: Started = click.get_current_context().obj
    return found

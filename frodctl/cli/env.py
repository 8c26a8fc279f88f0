"""``frodctl env``."""

from __future__ import annotations

import click

from frodctl.cli.options import output_options
from frodctl.cli.output import Output
from frodctl.jobs import environment as job


@click.command("env")
@click.option("--devices", is_flag=True, help="GPUs as well, for which torch is imported.")
@output_options
def command(devices: bool, format_: str | None, json_: bool, quiet: bool) -> None:
    """Print what a bug report needs: versions, threads, devices, cache folders; no token.

    \b
    Examples:
      frodctl env
      frodctl env --devices --json
    """
    facts = job.environment(devices=devices)
    Output(format_, json_).emit({"schema_version": 1} | facts, job.rows(facts), job.COLUMNS)

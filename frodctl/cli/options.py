"""Options that commands share, declared once, and parameters by the names that a command gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from frodctl.cli import completion

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("human", "tsv", "csv", "json", "jsonl", "agent")


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
    click.option(
        "--cache-dir",
        metavar="DIR",
        shell_complete=completion.files,
        help="Where downloads are cached; HF_HOME is honoured.",
    ),
    click.option("--offline", is_flag=True, help="Use what is cached; do not ask the Hub."),
)
"""Where a checkpoint comes from."""

device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    shell_complete=completion.devices,
    help="Where to compute.",
)

profile_option = click.option(
    "--profile", is_flag=True, help="On stderr at the end: where the time went, and how near the device's peak."
)

verify_option = click.option(
    "--verify/--no-verify", default=True, help="Read the result again at the end.  [default: verify]"
)

run_options = _together(
    click.option(
        "--dry-run",
        is_flag=True,
        help="Print the plan, from headers alone: nothing is downloaded or written, no digest compared.",
    ),
    click.option("--force", is_flag=True, help="Replace an output that exists."),
    click.option(
        "--resume/--no-resume", default=True, help="Take up what a killed run had finished.  [default: resume]"
    ),
)
"""How a job that writes an output is run."""

push_options = _together(
    click.option(
        "--push-to-hub", metavar="ORG/NAME", help="Send the result to this repository too, when it has been checked."
    ),
    click.option("--private", is_flag=True, help="Of a repository that --push-to-hub makes."),
)
"""Where the result goes beside its place here."""

lora_options = _together(
    click.option("--rank", metavar="R", help="Of a LoRA adapter; its alpha is the same."),
    click.option("--energy", metavar="SHARE", help="The rank with which each layer keeps so much of its change: 95%."),
    click.option("--max-rank", default="256", show_default=True, metavar="R", help="Whatever --energy would take."),
    click.option("--rank-pattern", is_flag=True, help="Ranks layer by layer, which PEFT reads and others do not."),
)
"""How large a LoRA adapter is made."""

output_options = _together(
    click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        help="Of stdout. Default: human on a terminal, tsv in a pipe. agent: tsv, and nothing for the eye.",
    ),
    click.option("--json", "json_", is_flag=True, help="Short for --format json."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)
"""What goes to stdout and stderr."""


def as_flags(text: str, command: click.Command | None) -> str:
    """A message of the library, which names parameters in backticks, with the command's own names for them.

    >>> as_flags("exists; `force=True` replaces it", None)
    'exists; --force replaces it'
    """
    owner = command or click.Command(None)
    known = {str(param.name): param for param in owner.params}

    def shown(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        param = known.get(name)
        if isinstance(param, click.Argument):
            return param.make_metavar(click.Context(owner))
        flag = max(param.opts, key=len) if param is not None else "--" + name.replace("_", "-")
        if value == "False":  # of a pair such as --resume/--no-resume
            return flag.replace("--", "--no-", 1)
        return flag if value in (None, "True") else f"{flag} {value}"

    return re.sub(r"`(?P<name>[a-z]+(_[a-z]+)*_?)(=(?P<value>[^`\n]*))?`", shown, text)

"""The ``frodctl`` command: finds the subcommand, runs it, and turns what went wrong into an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

import frodctl
from frodctl.cli.agents import format_in, is_agent
from frodctl.cli.options import as_flags
from frodctl.cli.output import OutputClosed, printable, silence_stdout
from frodctl.cli.started import Started
from frodctl.errors import FrodctlError, OutOfResources, UsageError
from frodctl.jobs.ranks import BY_ITSELF, Launch
from frodctl.jobs.resources import is_out_of_memory, require_address_space

_COMMANDS = {
    "decompose": "Joint decomposition of a checkpoint into one shared-basis file.",
    "merge": "Trained perturbations folded back into dense weights.",
    "extract": "What a fine-tuning changed in a checkpoint, compressed to an adapter.",
    "inspect": "Rank and spectrum statistics of checkpoints, bases and adapters.",
    "env": "What a bug report needs: versions, threads, devices, cache folders.",
}


#: What several ranks can do together.
_SHARED = ("decompose", "merge")
_PATIENCE_SECONDS = 5  # from an interrupt to the end


class _LazyGroup(click.Group):
    """Imports a subcommand when it is asked for, so that --help is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"frodctl.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(frodctl.__version__, prog_name="frodctl")
def cli() -> None:
    """Full-rank fine-tuning with few trainable numbers (FRoD), for Hugging Face checkpoints.

    \b
    Examples:
      frodctl decompose meta-llama/Llama-3.2-1B --target-modules all-linear
      frodctl decompose ./my-model -o basis.safetensors --budget 1.72%
      frodctl merge ./my-model ./my-adapter ./merged
      frodctl inspect ./merged --spectrum --sort stable_rank

    Data goes to stdout, everything else to stderr. `frodctl COMMAND --help` has the rest.
    """


class _Terminated(BaseException):
    """SIGTERM arrived."""


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the command line, as one of several ranks where torchrun's ``environ`` says so, and return its exit code."""
    own_process, launch = arguments is None, BY_ITSELF
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the terminal's encoding lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        launch = Launch(environ or {})
        if own_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, partial(_interrupt, arguments, launch))
        if launch.number:
            silence_stdout()  # the first rank's is all there is to see
        code = _run(arguments, Started(own_process, launch))
        launch.leave()
        return code
    except (KeyboardInterrupt, click.Abort):
        if own_process:
            _end_soon(lambda: 130)
        return _interrupted(arguments, 130, launch)
    except _Terminated:
        return _interrupted(arguments, 143, launch)
    except BaseException as error:
        return _failed(error, arguments, launch)


def _failed(error: BaseException, arguments: list[str], launch: Launch) -> int:
    """Say what went wrong, unless another rank has; the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if _closed_pipe(error):
        return 0
    if "--debug" in arguments and not isinstance(error, click.ClickException):
        _show_traceback()
    message, code = _explain(error)
    if launch.first_to_fail():
        with suppress(BrokenPipeError):
            if isinstance(error, click.ClickException):
                _show_misuse(error, arguments)
            else:
                click.echo(f"Error: {printable(message)}", err=True)
    return code


def _show_misuse(error: click.ClickException, arguments: Sequence[str]) -> None:
    """What was wrong with the command line, with its usage; in one line to an agent."""
    message = printable(error.format_message())
    if is_agent(format_in(arguments)):
        click.echo(f"Error: {message}", err=True)
    else:
        click.UsageError(message, getattr(error, "ctx", None)).show()


def _run(arguments: list[str], started: Started) -> int:
    """What click's own ``main`` does, which turns a closed pipe into exit code 1."""
    completion = os.environ.get("_FRODCTL_COMPLETE")
    if completion:
        return shell_complete(cli, {}, "frodctl", "_FRODCTL_COMPLETE", completion)
    extension = started.own_process and Path(sys.argv[0]).stem == "hf-frod"
    with cli.make_context("hf frod" if extension else "frodctl", arguments, obj=started) as context:
        if not {"-h", "--help"} & set(arguments):
            require_address_space()
        if started.launch.count > 1 and arguments[0] in _COMMANDS and arguments[0] not in _SHARED:
            raise UsageError(f"{arguments[0]} runs in one process, and this is one of torchrun's; start it without")
        try:
            code = cli.invoke(context)
        except FrodctlError as error:
            command = cli.get_command(context, context.invoked_subcommand or "")
            error.args = (as_flags(str(error), command),)
            raise
    return code if isinstance(code, int) else 0


def _interrupted(arguments: list[str], code: int, launch: Launch) -> int:
    """Say that the work was interrupted, and what becomes of it."""
    if launch.number:
        return code
    keeps = arguments[:1] in (["decompose"], ["merge"]) or (arguments[:1] == ["extract"] and "frod" not in arguments)
    resumes = keeps and not {"--no-resume", "--dry-run"} & set(arguments)
    with suppress(OSError):
        click.echo(f"Interrupted{'; the same command resumes' if resumes else ''}.", err=True)
    return code


def _interrupt(arguments: list[str], launch: Launch, number: int, frame: FrameType | None) -> NoReturn:
    _end_soon(lambda: _interrupted(arguments, 130, launch))
    raise KeyboardInterrupt


def _end_soon(code: Callable[[], int]) -> None:
    """End the process, come what may: the Hub's client waits for its threads, and they for a body that need not end.

    What is half done is as a kill leaves it, which the next run takes up.
    """
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(code()))
        signal.alarm(_PATIENCE_SECONDS)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _closed_pipe(error: BaseException) -> bool:
    """Whether the reader of our output has gone, which is its right."""
    if isinstance(error, BrokenPipeError):
        silence_stdout()
    return isinstance(error, OutputClosed | BrokenPipeError)


def _show_traceback() -> None:
    """Set in, as no line of an exception's text is to pass for one of ours."""
    for line in traceback.format_exc().split("\n"):
        click.echo(f"  {printable(line)}", err=True)


def _explain(error: BaseException) -> tuple[str, int]:
    """The text and the exit code for an exception."""
    if isinstance(error, FrodctlError | click.ClickException):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return "out of memory; choose fewer target modules", OutOfResources.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        # what the jobs write has a name: without one it was stdout
        message = f"{error.filename or 'stdout'}: {error.strerror or error}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return message, OutOfResources.exit_code if full else FrodctlError.exit_code
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", FrodctlError.exit_code

"""Processes that need not import torch, which takes longer than most tests: forked from one that has.

They are for what a test kills or interrupts, and for an environment that is read as modules are imported, as
huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE: nothing but torch is imported before a process has its
environment. (This module is, so it imports nothing of the kind.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch"])
#: The audit events of changes to files, beside that of opening one to write.
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

Moment = tuple[int, str]


def frodctl(
    words: Sequence[object],
    cwd: Path,
    env: Mapping[str, str] | None = None,
    *,
    moment: Moment | None = None,
    number: int = signal.SIGKILL,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, with an environment of its own.

    With ``moment`` it sends itself the signal ``number`` there, so that no clock decides where a run ends. A moment is
    a report of its progress, or just before it changes a file or folder: (3, "") is the third, (3, "merging") the
    third that has the word in its text or path.
    """
    moments = {} if moment is None else {0: moment}
    return together([str(word) for word in words], cwd, [os.environ if env is None else env], moments, number)[0]


def together(
    command: list[str],
    cwd: Path,
    environments: Sequence[Mapping[str, str]],
    moments: Mapping[int, Moment],
    number: int = signal.SIGKILL,
) -> list[subprocess.CompletedProcess[str]]:
    """Run the command once in each environment, beside each other, with a moment for some of them."""
    with TemporaryDirectory() as folder:
        streams = [[Path(folder, f"{name}-{i}") for name in ("stdout", "stderr")] for i in range(len(environments))]
        processes = [start(command, cwd, env, streams[i], moments.get(i), number) for i, env in enumerate(environments)]
        done = []
        for process, shown in zip(processes, streams, strict=True):
            process.join(600)
            process.kill()
            process.join()
            assert process.exitcode is not None
            texts = [stream.read_text("utf-8") for stream in shown]
            done.append(subprocess.CompletedProcess(command, process.exitcode, *texts))
        return done


def start(
    words: Sequence[object],
    cwd: Path,
    env: Mapping[str, str],
    streams: Sequence[Path],
    moment: Moment | None = None,
    number: int = signal.SIGKILL,
) -> BaseProcess:
    """Start the command with these files, or terminals, as stdout and stderr."""
    arguments = ([str(word) for word in words], cwd, dict(env), list(streams), moment, number)
    process = _SERVER.Process(target=_command, args=arguments)
    process.start()
    return process


def _command(
    words: list[str], cwd: Path, env: dict[str, str], streams: list[Path], moment: Moment | None, number: int
) -> None:
    for handle, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), handle)
    sys.stdout, sys.stderr = (os.fdopen(handle, "w", 1, "utf-8", closefd=False) for handle in (1, 2))  # as they now are
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    from frodctl.cli.main import main

    if moment is not None:
        end_at(moment, number)
    sys.exit(main(words, env))


def end_at(moment: Moment, number: int) -> None:
    """Have this process send itself a signal at a moment."""
    from frodctl.cli.progress import Reporter
    from frodctl.jobs.progress import Progress

    which, word = moment
    passed = 0
    show = Reporter.__call__

    def passing(what: str) -> None:
        nonlocal passed
        passed += word in what
        if word in what and passed == which:
            os.kill(os.getpid(), number)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in _CHANGES) and not str(arguments[0]).endswith(".pyc"):
            passing(str(arguments[0]))

    def watched(self: Reporter, report: Progress) -> None:
        passing(report.text)
        show(self, report)

    Reporter.__call__ = watched  # type: ignore[method-assign]
    sys.addaudithook(audit)

"""Where a job's finished pieces wait until its output is whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

from frodctl.checkpoint import sink
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.push import PushOptions


class Plan(Protocol):
    """What a job's plan says of its output."""

    @property
    def output(self) -> Path: ...
    @property
    def options(self) -> PushOptions: ...
    def check_output(self, key: str | None = None) -> None: ...


def staging_of(plan: Plan, key: str, progress: Callback) -> sink.Staging:
    """The staging of the job ``key``; errors are those of `sink.Staging`."""
    return sink.Staging(
        plan.output,
        key,
        partial(plan.check_output, key),
        resume=plan.options.resume,
        notice=lambda text: progress(Progress(text)),
    )

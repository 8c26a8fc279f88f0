"""Every error frodctl raises on purpose, each with the exit code the command line gives it."""

from __future__ import annotations


class FrodctlError(Exception):
    """The job failed (exit code 1). The message is one or two lines: what is wrong, where, the way out."""

    exit_code = 1


class UsageError(FrodctlError):
    """The request itself is wrong: an output that exists, a target that matches nothing (exit code 2)."""

    exit_code = 2


class InvalidInput(FrodctlError):
    """A file is corrupt, unsupported or does not belong with another (exit code 3)."""

    exit_code = 3


class OutOfResources(FrodctlError):
    """Not enough disk or memory (exit code 4)."""

    exit_code = 4

"""Whether a program that is no person reads what is printed: then it is plain and short."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

#: Set by whatever agent, whether huggingface_hub knows it or not.
_STANDARD = ("AI_AGENT", "AGENT")


def is_agent(format_: str | None) -> bool:
    """Whether an agent is served: with ``--format agent``, or where one runs the command and asks for no other."""
    return format_ == "agent" or (format_ in (None, "json") and _detected())


def format_in(arguments: Sequence[str]) -> str | None:
    """The format that is asked for, of a command line that could not be read."""
    named = [word.partition("=")[2] for word in arguments if word.startswith("--format=")]
    named += [value for word, value in pairwise(arguments) if word == "--format"]
    return named[-1] if named else None


def _detected() -> bool:
    """As huggingface_hub detects agents, by the list that it has in its cache: none is fetched for this."""
    if any(os.environ.get(name, "").strip() for name in _STANDARD):
        return True
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import is_agent  # type: ignore[attr-defined]  # it is in its __all__ alone
    except ImportError:  # of an older version
        return False
    path = getattr(constants, "AGENT_HARNESSES_PATH", "")
    if not Path(path).is_file():
        return False
    asked, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # a list of yesterday will do
    try:
        return bool(is_agent())
    finally:
        constants.HF_HUB_OFFLINE = asked

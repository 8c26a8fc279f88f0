"""What a shell is offered where a name is to be typed."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

_MODULES = ("default", "all-linear")
_DEVICES = ("auto", "cpu", "cuda")


def models(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders, and models in the Hub's cache."""
    cached = [name for name in _cached() if incomplete and name.startswith(incomplete)]
    if not cached:
        return files(context, param, incomplete)
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    here = [path for path in folder.glob("*") if str(path).startswith(incomplete)] if folder.is_dir() else []
    return [CompletionItem(name) for name in (*map(str, here), *cached)]


def files(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What the shell itself knows of files."""
    return [CompletionItem(incomplete, type="file")]


def modules(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The words that stand for many modules."""
    return [CompletionItem(word) for word in _MODULES if word.startswith(incomplete)]


def devices(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The kinds of devices."""
    return [CompletionItem(word) for word in _DEVICES if word.startswith(incomplete)]


def _cached() -> list[str]:
    """The ids of the models in the Hub's cache, in order."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]

"""What a target is: found out from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frodctl.checkpoint import codec
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Checkpoint
from frodctl.formats.adapter import Adapter, is_adapter, open_adapter
from frodctl.formats.basis_file import BasisFile, open_basis
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.progress import Callback, Progress


@dataclass(frozen=True)
class Target:
    """A target and what it turned out to be: one of the three."""

    name: str
    checkpoint: Checkpoint | None = None
    basis: BasisFile | None = None
    adapter: Adapter | None = None


def open_target(name: str, options: InspectOptions, progress: Callback) -> Target:
    """Find out what a target is and read its headers; nothing more is fetched from the Hub than is needed.

    Errors are those of `open_checkpoint`, `open_basis` and `open_adapter`.
    """
    location = options.location(name)
    path = location.local_path()
    if path is None and location.file.endswith(".safetensors"):
        from frodctl.checkpoint import hub

        if "frodctl" in hub.file_metadata(location):
            path = hub.fetch_file(location)
    if path is not None and path.is_file() and _is_basis(path):
        return Target(name, basis=open_basis(path))
    if is_adapter(location):
        headers_only = not (options.spectrum or options.base)
        return Target(name, adapter=open_adapter(location, options.adapter_name, headers_only=headers_only))
    checkpoint = open_checkpoint(
        location, headers_only=options.headers_only, progress=lambda text: progress(Progress(text))
    )
    return Target(name, checkpoint=checkpoint)


def _is_basis(path: Path) -> bool:
    return path.suffix == ".safetensors" and "frodctl" in codec.read_header(path).metadata

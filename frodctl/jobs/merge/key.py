"""What an unfinished merge is known by: all that its bytes depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from frodctl.adapted.matching import Part
from frodctl.adapted.opening import Source
from frodctl.checkpoint import codec, files
from frodctl.checkpoint.inputs import Json


def source_key(source: Source) -> list[Json]:
    """Everything of one adapter that the result depends on, in the order of the adapters."""
    adapter = source.adapter
    assert adapter.root is not None
    return [
        _digest(adapter.root / adapter.modules[0].scales.file),
        dict(adapter.config),
        _digest(source.basis.path) if source.basis else None,
        [source.form, source.scale, source.recompute, source.projection_dtype],
    ]


def _digest(path: Path) -> str:
    """Of a file's bytes: size and time may stay as they are where those change."""
    sha256 = hashlib.sha256()
    for chunk in codec.read_chunks(path, 0, files.stat(path).st_size):
        sha256.update(chunk)
    return sha256.hexdigest()


def part_key(sources: Sequence[Source], part: Part) -> list[Json]:
    """What one of the adapters does to one weight."""
    return [sources.index(part.source), part.trained.scales.name, part.trained.category]


def state_of(path: Path) -> tuple[str, int, int]:
    """What changes where a file is written to, as a rule."""
    state = files.stat(path)
    return str(path.resolve()), state.st_size, state.st_mtime_ns

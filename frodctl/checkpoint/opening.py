"""Where a checkpoint is and what it holds: a folder, a file or a Hub id becomes a `Checkpoint`.

Only headers and configs are read here; the tensors' bytes are read by `frodctl.checkpoint.stream`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from frodctl.checkpoint import codec, manifest
from frodctl.checkpoint.inputs import kind_of, read_json
from frodctl.checkpoint.quantized import with_scales
from frodctl.checkpoint.records import (
    Checkpoint,
    Location,
    TensorInfo,
    check_complete,
    check_is_checkpoint,
    choose_weights,
    shards_of,
)
from frodctl.errors import FrodctlError, InvalidInput


def open_checkpoint(
    location: Location,
    *,
    headers_only: bool = False,
    later: bool = False,
    streamed: bool = False,
    everything: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Find the checkpoint and read its headers; download it first if it is on the Hub.

    A weight that is stored in 8 bits with scales of a known form is one tensor with these (`quantized.with_scales`).

    Parameters
    ----------
    location : Location
    headers_only : bool
        Fetch no weights from the Hub: headers come by range requests, and the result cannot be streamed.
    later : bool
        Leave the weights on the Hub, where their headers can be read there: `Checkpoint.repository` brings them.
        Where the Hub must not be asked, shards that are not in the cache are `Checkpoint.absent`.
    streamed : bool
        The same, and no weights that have to be downloaded whole.
    everything : bool
        Fetch also what the model needs beside its weights (see `frodctl.checkpoint.companions`).
    progress : callable, optional
        Called with a line of text before anything slow.

    Raises
    ------
    FrodctlError
        The model does not exist, or the Hub cannot be reached.
    InvalidInput
        A file is truncated, missing from beside its index, or not a checkpoint.
    """
    return with_scales(_opened(location, headers_only, later, streamed, everything, progress))


def _opened(
    location: Location,
    headers_only: bool,
    later: bool,
    streamed: bool,
    everything: bool,
    progress: Callable[[str], None] | None,
) -> Checkpoint:
    """The checkpoint with all of its tensors as they are stored."""
    path = location.local_path()
    if path is None:
        from frodctl.checkpoint import hub
        from frodctl.checkpoint.hub_errors import is_offline

        if (headers_only or later or streamed) and not is_offline(location):
            remote = hub.open_remote(location, later=not headers_only)
            if remote is not None:
                return remote
            if headers_only or streamed:
                raise FrodctlError(
                    f"{location.model}: its weights are pickled, and no part of them can be read remotely; "
                    "download the checkpoint first"
                )
        model, revision, root = hub.download(location, progress, everything=everything, partial_offline=later)
        return _from_folder(root, model, revision, location.file, partially=later)
    if path.is_file() and path.name.endswith(".index.json"):
        return _from_folder(path.parent, location.model, None, path.name)
    if path.is_file():
        return replace(_from_file(path, location.model), path=path)
    folder = path / location.subfolder
    if not folder.is_dir():
        raise FrodctlError(f"{folder}: no such folder")
    return _from_folder(folder, location.model, None)


def _from_file(path: Path, model: str) -> Checkpoint:
    tensors = _read_headers(path.parent, path.name, {})
    return Checkpoint(model, None, path.parent, _read_config(path.parent), tensors)


def _from_folder(
    folder: Path, model: str, revision: str | None, entry: str = "", *, partially: bool = False
) -> Checkpoint:
    entry = entry or choose_weights([p.name for p in folder.iterdir()], str(folder), _one_below(folder))
    indexed = entry.endswith(".index.json")
    shards = shards_of(read_json(folder / entry), str(folder / entry)) if indexed else {}
    here = {name: shard for name, shard in shards.items() if not partially or (folder / shard).exists()}
    tensors = _read_headers(folder, entry, here)
    absent = {name: shard for name, shard in shards.items() if name not in here}
    return Checkpoint(model, revision, folder, _read_config(folder), tensors, absent=absent)


def _one_below(folder: Path) -> Iterator[str]:
    """The paths of what is in the sub-folders."""
    for inner in folder.iterdir():
        with suppress(OSError):  # not ours to read
            yield from (f"{inner.name}/{path.name}" for path in inner.iterdir())


def _read_config(folder: Path) -> dict[str, object]:
    """The folder's config.json; empty where there is none, which a folder or a broken link of that name is not."""
    path = folder / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def _read_headers(folder: Path, entry: str, shards: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of the files that an index names, ``shards``, or of ``entry`` alone where there is none."""
    tensors: dict[str, TensorInfo] = {}
    digests = manifest.digests(folder)
    for file in sorted(set(shards.values()) or {entry}):
        path = folder / file
        if kind_of(path) is None:
            raise InvalidInput(f"{path}: named by the index but missing; download the checkpoint again")
        infos = read_file_header(path)
        check_is_checkpoint(str(path), [info.name for info in infos])
        infos = manifest.with_digests(infos, digests.get(file, {}), str(path))
        tensors.update({info.name: info for info in infos if shards.get(info.name, file) == file})
    check_complete(shards, tensors, str(folder))
    return tensors


def read_file_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file, safetensors or pickled."""
    if path.suffix == ".safetensors":
        header = codec.read_header(path)
        return [TensorInfo(s.name, s.dtype, s.shape, path.name, at) for s, at in header.tensors.values()]
    if path.suffix in (".bin", ".pt", ".pth"):
        from frodctl.checkpoint import pickled

        return pickled.read_header(path)
    raise InvalidInput(f"{path}: not a checkpoint; expected .safetensors or .bin")

"""Where a checkpoint is and what it holds: a folder, a file or a Hub id becomes a `Checkpoint`.

Only headers and configs are read here; the tensors' bytes are read by `frodctl.checkpoint.stream`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from frodctl import values
from frodctl.checkpoint import codec
from frodctl.checkpoint.inputs import kind_of, read_json
from frodctl.checkpoint.records import TensorInfo as TensorInfo
from frodctl.checkpoint.ties import Ties, find_ties
from frodctl.errors import FrodctlError, InvalidInput, UsageError

#: What transformers and diffusers call their weights, in the order in which one is preferred to another.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
#: What PEFT calls an adapter's config and weights.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_URL = re.compile(r"[a-z]+://|(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)


@dataclass(frozen=True)
class Location:
    """A model as its user names it, and how to reach it."""

    model: str
    revision: str | None = None
    subfolder: str = ""
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", values.model(self.model, "model"))

    def local_path(self) -> Path | None:
        """The file or folder on disk; None for a Hub id.

        Raises
        ------
        FrodctlError
            There is nothing at the path.
        UsageError
            It is a URL.
        InvalidInput
            It is neither a file nor a folder.
        """
        path = Path(os.path.expanduser(self.model))
        kind = kind_of(path)
        if kind in ("file", "folder"):
            return path
        if kind is not None:
            raise InvalidInput(f"{self.model}: is a {kind}, neither a file nor a folder")
        if _URL.match(self.model):
            raise UsageError(f"{self.model}: URLs are not taken; give the Hub id in it, org/name or org/name@revision")
        repo = self.model.partition("@")[0]  # a revision may hold slashes: refs/pr/1
        if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or "\\" in repo:
            raise FrodctlError(f"{self.model}: no such file or folder")
        return None

    def short_name(self) -> str:
        """The last part of the model's name, for naming files after it."""
        path = self.local_path()
        name = path.resolve().name if path else self.model.partition("@")[0].rsplit("/", 1)[-1]
        return re.sub(r"\.(safetensors|bin)$", "", name)


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint."""

    model: str  #: as the user named it, without the revision
    revision: str | None  #: the commit, of a checkpoint from the Hub
    root: Path | None  #: folder that holds the files; None where only headers were fetched
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    path: Path | None = None  #: the file, of a checkpoint that was named by one

    def files(self) -> list[Path]:
        """The files that hold its tensors; none of headers alone."""
        names = sorted({info.file for info in self.tensors.values()})
        return [self.root / name for name in names] if self.root is not None else []

    @cached_property
    def ties(self) -> Ties:
        """The tensors that the model uses as one."""
        return find_ties(self.tensors, self.config, self.root)

    def parameters(self) -> int:
        """Number of parameters: floating-point elements, tied tensors counted once."""
        seen: dict[tuple[str, int], int] = {}
        for info in self.tensors.values():
            if info.dtype in codec.FLOAT_DTYPES and info.name not in self.ties.copies:
                place = info.file, info.offset  # where an empty tensor may be beside another, and views overlap
                seen[place] = max(info.parameters, seen.get(place, 0))
        return sum(seen.values())


def open_checkpoint(
    location: Location,
    *,
    headers_only: bool = False,
    everything: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Find the checkpoint and read its headers; download it first if it is on the Hub.

    Parameters
    ----------
    location : Location
    headers_only : bool
        Fetch no weights from the Hub: headers come by range requests, and the result cannot be streamed.
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
    path = location.local_path()
    if path is None:
        from frodctl.checkpoint import hub

        if headers_only and not hub.is_offline(location):
            return hub.remote_headers(location)
        model, revision, root = hub.download(location, progress, everything=everything)
        return _from_folder(root, model, revision)
    if path.is_file() and path.name.endswith(".index.json"):
        return _from_folder(path.parent, location.model, None, path.name)
    if path.is_file():
        return replace(_from_file(path, location.model), path=path)
    folder = path / location.subfolder
    if not folder.is_dir():
        raise FrodctlError(f"{folder}: no such folder")
    return _from_folder(folder, location.model, None)


def choose_weights(files: Collection[str], where: str) -> str:
    """The weights' entry point among a folder's file names: an index or a single file."""
    for name in WEIGHT_FILES:
        if name in files:
            return name
    single = sorted(f for f in files if f.endswith(".safetensors") and not f.startswith("adapter_"))
    single = [f for f in single if not f.endswith(".frod.safetensors")]  # a basis, beside what it was made from
    if len(single) == 1:
        return single[0]
    if single:
        raise InvalidInput(f"{where}: several safetensors files and no index; name the one you mean")
    hint = " (it holds an adapter: name its base model)" if "adapter_config.json" in files else ""
    raise InvalidInput(f"{where}: no weights here, neither safetensors nor pytorch_model.bin{hint}")


def shards_of(index: dict[str, Any], where: str) -> dict[str, str]:
    """The ``weight_map`` of an index, each of its file names checked to lie in the folder itself."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(f"{where}: the index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or PurePosixPath(file).name != file or "\\" in file or "\0" in file:
            raise InvalidInput(f"{where}: tensor {name} is said to be in {file!r}, outside the folder")
    return weight_map


def _from_file(path: Path, model: str) -> Checkpoint:
    tensors = _read_headers(path.parent, {None: path.name})
    return Checkpoint(model, None, path.parent, _read_config(path.parent), tensors)


def _from_folder(folder: Path, model: str, revision: str | None, entry: str | None = None) -> Checkpoint:
    entry = entry or choose_weights([p.name for p in folder.iterdir()], str(folder))
    if entry.endswith(".index.json"):
        shards: dict[Any, str] = dict(shards_of(read_json(folder / entry), str(folder / entry)))
    else:
        shards = {None: entry}
    tensors = _read_headers(folder, shards)
    return Checkpoint(model, revision, folder, _read_config(folder), tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none, which a folder or a broken link of that name is not."""
    path = folder / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def _read_headers(folder: Path, shards: dict[Any, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(shards.values())):
        path = folder / file
        if kind_of(path) is None:
            raise InvalidInput(f"{path}: named by the index but missing; download the checkpoint again")
        infos = read_file_header(path)
        check_is_checkpoint(str(path), [info.name for info in infos])
        for info in infos:
            if shards.get(info.name, file) == file:
                tensors[info.name] = info
    check_complete(shards, tensors, str(folder))
    return tensors


def check_is_checkpoint(where: str, tensors: Collection[str]) -> None:
    """`InvalidInput` where a file's tensors are named as those that frodctl or PEFT writes beside a checkpoint."""
    if tensors and all(name.startswith(("V.", "tau.", "lambda.", "indices.")) for name in tensors):
        raise InvalidInput(f"{where}: is a shared-basis file, not a checkpoint")
    if tensors and all(name.startswith("base_model.") for name in tensors):
        raise InvalidInput(f"{where}: is an adapter, not a checkpoint: name its base model")


def check_complete(shards: dict[Any, str], tensors: Collection[str], where: str) -> None:
    """Every tensor that the index promises must be in the shard it names."""
    missing = sorted(name for name in shards if name is not None and name not in tensors)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidInput(f"{where}: tensor {missing[0]}{more} is in the index but not in {shards[missing[0]]}")


def read_file_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file, safetensors or pickled."""
    if path.suffix == ".safetensors":
        header = codec.read_header(path)
        return [TensorInfo(s.name, s.dtype, s.shape, path.name, at) for s, at in header.tensors.values()]
    if path.suffix in (".bin", ".pt", ".pth"):
        from frodctl.checkpoint import pickled

        return pickled.read_header(path)
    raise InvalidInput(f"{path}: not a checkpoint; expected .safetensors or .bin")

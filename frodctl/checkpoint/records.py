"""A checkpoint as its headers describe it: where it is, its tensors, and what its files are called."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from frodctl import values
from frodctl.checkpoint import codec, hub_urls
from frodctl.checkpoint.inputs import kind_of
from frodctl.checkpoint.source import Folder, Source
from frodctl.checkpoint.ties import Ties, find_ties
from frodctl.errors import FrodctlError, InvalidInput, UsageError

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.checkpoint.remote import Repository

#: What models are trained in, and a basis stored: torch's name of the dtype, and the safetensors format's.
MODEL_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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
_MOST_NAMED = 8  #: sub-folders in a message


@dataclass(frozen=True)
class Scaled:
    """A matrix of 8 bits an element, and the scales that its blocks of rows and columns are multiplied by."""

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]  #: rows and columns of a block; the last of a row or column may have fewer


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and where its bytes lie.

    A weight that is stored with scales has the dtype and size of its values, which are float32 (`stream.read_tensor`).
    """

    name: str
    dtype: str  #: the safetensors format's name of the dtype
    shape: tuple[int, ...]
    file: str  #: path of the file inside the checkpoint
    offset: int  #: of the first byte, in that file
    stride: tuple[int, ...] | None = None  #: in elements, where a pickled tensor is not contiguous
    data: HostArray | None = field(default=None, repr=False, compare=False)  #: of an old-format pickle: it is in memory
    #: ``sha256:…`` of the bytes of the file's tensors by name, where frodctl wrote it
    recorded: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    scaled: Scaled | None = None  #: what it is made from as it is read

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors in the files that it is read from: itself, or a matrix and its scales."""
        return (self,) if self.scaled is None else (self.scaled.codes, self.scaled.scales)

    @property
    def stored_dtype(self) -> str:
        """That of its elements in the file, where it may have scales."""
        return self.parts[0].dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in the files, with its scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether its bytes lie in its file as they are read."""
        return self.data is None and self.stride is None and self.scaled is None

    @property
    def nbytes(self) -> int:
        """Bytes it takes as it is read, which without scales are those in the file, from the first to the last."""
        elements = prod(self.shape)
        if self.stride is not None and elements:
            elements = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return elements * codec.DTYPE_BITS[self.dtype] // 8

    def slice(self, index: int) -> TensorInfo:
        """One slice of the first dimension, as a tensor called ``name[index]``."""
        if self.stride is None:
            step, stride = prod(self.shape[1:]), None
        else:
            step, stride = self.stride[0], self.stride[1:]
        offset = self.offset + index * step * codec.DTYPE_BITS[self.dtype] // 8
        data = None if self.data is None else self.data[index]
        return replace(
            self, name=f"{self.name}[{index}]", shape=self.shape[1:], offset=offset, stride=stride, data=data
        )


@dataclass(frozen=True)
class Location:
    """A model as its user names it, and how to reach it; of a URL its parts.

    Raises
    ------
    UsageError
        A URL is not the Hub's, or says something else than ``revision`` or ``subfolder`` beside it.
    """

    model: str
    revision: str | None = None
    subfolder: str = ""
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    offline: bool = False
    file: str = ""  #: the one that a URL names
    remote: bool = False  #: on the Hub whatever there is of that name here: it was a URL

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", values.model(self.model, "model"))
        if hub_urls.is_url(self.model) and kind_of(self.model) is None:
            url = hub_urls.parse(self.model)
            parts = {"revision": url.revision, "subfolder": url.folder}
            for name, part in parts.items():
                given = getattr(self, name)
                if given and part and given.strip("/") != part:
                    raise UsageError(f"`{name}` {given}: {self.model} says {part}; one of them is enough")
                object.__setattr__(self, name, given or part)
            object.__setattr__(self, "model", url.repo)
            object.__setattr__(self, "file", url.file)
            object.__setattr__(self, "remote", True)

    def local_path(self) -> Path | None:
        """The file or folder on disk; None for what is on the Hub.

        Raises
        ------
        FrodctlError
            There is nothing at the path.
        InvalidInput
            It is neither a file nor a folder.
        """
        if self.remote:
            return None
        path = Path(os.path.expanduser(self.model))
        kind = kind_of(path)
        if kind in ("file", "folder"):
            return path
        if kind is not None:
            raise InvalidInput(f"{self.model}: is a {kind}, neither a file nor a folder")
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
    root: Path | None  #: folder that holds the files; None where only headers are here
    config: dict[str, object]
    tensors: dict[str, TensorInfo]
    path: Path | None = None  #: the file, of a checkpoint that was named by one
    repository: Repository | None = None  #: where its weights are, of headers whose weights come later
    absent: Mapping[str, str] = field(default_factory=dict)  #: by tensor the shard that would hold it and is not here

    def files(self) -> list[Path]:
        """The files that hold its tensors, as far as they are here."""
        names = sorted({part.file for info in self.tensors.values() for part in info.parts})
        if self.repository is not None:
            return [path for name in names if (path := self.repository.cached(name)) is not None]
        return [self.root / name for name in names] if self.root is not None else []

    @property
    def source(self) -> Source | None:
        """What its tensors can be read from; None of headers alone."""
        return Folder(self.root) if self.root is not None else self.repository

    @cached_property
    def ties(self) -> Ties:
        """The tensors that the model uses as one."""
        return find_ties(self.tensors, self.config, self.source)

    def parameters(self) -> int:
        """Number of parameters: floating-point elements, tied tensors counted once.

        Raises
        ------
        FrodctlError
            Some shards are not here.
        """
        for shard in self.absent.values():
            raise FrodctlError(
                f"{self.model}: {shard} is not in the local cache, so nobody knows how many parameters there are; run "
                "without `offline`, or give a `sparsity` in place of a `budget`"
            )
        seen: dict[tuple[str, int], int] = {}
        for info in self.tensors.values():
            if info.dtype in codec.FLOAT_DTYPES and info.name not in self.ties.copies:
                place = info.file, info.offset  # where an empty tensor may be beside another, and views overlap
                seen[place] = max(info.parameters, seen.get(place, 0))
        return sum(seen.values())


def choose_weights(files: Collection[str], where: str, below: Iterable[str] = ()) -> str:
    """The weights' entry point among a folder's file names: an index or a single file.

    ``below`` are the paths in its sub-folders, of which the error names those that hold weights.
    """
    for name in WEIGHT_FILES:
        if name in files:
            return name
    single = sorted(f for f in files if f.endswith(".safetensors") and not f.startswith("adapter_"))
    single = [f for f in single if not f.endswith(".frod.safetensors")]  # a basis, beside what it was made from
    if len(single) == 1:
        return single[0]
    if single:
        raise InvalidInput(f"{where}: several safetensors files and no index; name the one you mean")
    if "adapter_config.json" in files:
        raise InvalidInput(f"{where}: no weights here (it holds an adapter: name its base model)")
    folders = sorted({str(path.parent) for path in map(PurePosixPath, below) if path.name in WEIGHT_FILES})
    if folders:
        named = ", ".join([*folders[:_MOST_NAMED], *(["…"] if len(folders) > _MOST_NAMED else [])])
        raise InvalidInput(f"{where}: no weights here, but in {named}: choose one with `subfolder`")
    raise InvalidInput(f"{where}: no weights here, neither safetensors nor pytorch_model.bin")


def weights_name(config: Mapping[str, object]) -> str:
    """What the library of the model calls a file of weights, without its ending: diffusers' have their own name."""
    return "diffusion_pytorch_model" if "_class_name" in config else "model"


def shards_of(index: dict[str, object], where: str) -> dict[str, str]:
    """The ``weight_map`` of an index, each of its file names checked to lie in the folder itself."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(f"{where}: the index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or PurePosixPath(file).name != file or "\\" in file or "\0" in file:
            raise InvalidInput(f"{where}: tensor {name} is said to be in {file!r}, outside the folder")
    return weight_map


def check_is_checkpoint(where: str, tensors: Collection[str]) -> None:
    """`InvalidInput` where a file's tensors are named as those that frodctl or PEFT writes beside a checkpoint."""
    if tensors and all(name.startswith(("V.", "tau.", "lambda.", "indices.")) for name in tensors):
        raise InvalidInput(f"{where}: is a shared-basis file, not a checkpoint")
    if tensors and all(name.startswith("base_model.") for name in tensors):
        raise InvalidInput(f"{where}: is an adapter, not a checkpoint: name its base model")


def check_complete(shards: Mapping[str, str], tensors: Collection[str], where: str) -> None:
    """Every tensor that the index promises must be in the shard it names."""
    missing = sorted(name for name in shards if name not in tensors)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidInput(f"{where}: tensor {missing[0]}{more} is in the index but not in {shards[missing[0]]}")

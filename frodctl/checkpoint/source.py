"""Where the bytes of a checkpoint's tensors come from: a folder's files here, or a repository's elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from frodctl.checkpoint import files
from frodctl.checkpoint.codec import read_chunks, read_into
from frodctl.errors import InvalidInput

if TYPE_CHECKING:
    from frodctl.checkpoint.records import TensorInfo  # which compares tensors' bytes to find ties


#: What a merged checkpoint says of itself (see `frodctl.checkpoint.manifest`).
MANIFEST = "frodctl.json"


class Source(Protocol):
    """What tensors are read from; its errors name the file and the tensor."""

    def wait(self, info: TensorInfo) -> None:
        """Return once the tensor can be read without delay that the caller could not interrupt."""

    def read(self, info: TensorInfo, view: memoryview) -> None:
        """Fill the view with the tensor's bytes, which are as many."""

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes in pieces, the same for every source, each valid until the next."""

    def where(self, info: TensorInfo) -> str:
        """The tensor's file, as messages name it."""


@dataclass(frozen=True)
class Folder:
    """Files that are here."""

    root: Path

    def wait(self, info: TensorInfo) -> None:
        """Nothing: they are here."""

    def read(self, info: TensorInfo, view: memoryview) -> None:
        path = self.root / info.file
        with files.open_read(path) as file:
            file.seek(info.offset)
            read_into(file, view, f"{path}: tensor {info.name}: the file ends before it; download it again")
        check(info, view, path)

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        path = self.root / info.file
        return checked(info, read_chunks(path, info.offset, info.nbytes), path)

    def where(self, info: TensorInfo) -> str:
        return str(self.root / info.file)


def check(info: TensorInfo, view: memoryview, where: str | Path) -> None:
    """`InvalidInput` where a tensor's bytes have another digest than is recorded."""
    if info.name in info.recorded:
        _compare(info, hashlib.sha256(view).hexdigest(), where)


def checked(info: TensorInfo, chunks: Iterator[memoryview], where: str | Path) -> Iterator[memoryview]:
    """The same pieces of a tensor, and after the last what `check` raises."""
    if info.name not in info.recorded:
        yield from chunks
        return
    sha256 = hashlib.sha256()
    for chunk in chunks:
        sha256.update(chunk)
        yield chunk
    _compare(info, sha256.hexdigest(), where)


def _compare(info: TensorInfo, digest: str, where: str | Path) -> None:
    if info.recorded[info.name] != f"sha256:{digest}":
        raise InvalidInput(
            f"{where}: tensor {info.name} is damaged: its digest is not the one in {MANIFEST}; "
            f"remove that file if another program wrote the weights anew"
        )

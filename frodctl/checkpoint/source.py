"""Where the bytes of a checkpoint's tensors come from: a folder's files here, or a repository's elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from frodctl.checkpoint.codec import read_chunks, read_into

if TYPE_CHECKING:
    from frodctl.checkpoint.records import TensorInfo  # which compares tensors' bytes to find ties


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
        with open(path, "rb", buffering=0) as file:
            file.seek(info.offset)
            read_into(file, view, f"{path}: tensor {info.name}: the file ends before it; download it again")

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        return read_chunks(self.root / info.file, info.offset, info.nbytes)

    def where(self, info: TensorInfo) -> str:
        return str(self.root / info.file)

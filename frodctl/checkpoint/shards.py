"""A checkpoint's weights on their way out: which tensor goes into which file, and each to its place in any order.

The headers are written first and the files have their full size from the beginning, so that tensors can come
one at a time, in whatever order the arithmetic likes, and what is finished survives a killed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from frodctl.checkpoint import codec, files
from frodctl.checkpoint.codec import TensorSpec
from frodctl.errors import FrodctlError
from frodctl.pipeline import in_order

_METADATA = {"format": "pt"}

_FLAGS = os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint, its tensors in the order in which they lie there."""

    file: str
    specs: tuple[TensorSpec, ...]
    sliced: frozenset[str] = frozenset()  #: tensors of which each slice of the first dimension is written by itself

    @property
    def header(self) -> bytes:
        return codec.header_bytes(self.specs, _METADATA)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return codec.file_bytes(self.specs, _METADATA)

    def offsets(self) -> dict[str, int]:
        """Where in the file each tensor begins."""
        position = len(self.header)
        places = {}
        for spec in self.specs:
            places[spec.name] = position
            position += spec.nbytes
        return places

    def pieces(self) -> Iterator[tuple[TensorSpec, int]]:
        """What is written at once, and where it begins: tensors, and slices called ``name[index]``."""
        offsets = self.offsets()
        for spec in self.specs:
            for number, piece in enumerate(_slices(spec) if spec.name in self.sliced else [spec]):
                yield piece, offsets[spec.name] + number * piece.nbytes


def _slices(spec: TensorSpec) -> list[TensorSpec]:
    """Of the first dimension."""
    return [TensorSpec(f"{spec.name}[{index}]", spec.dtype, spec.shape[1:]) for index in range(spec.shape[0])]


def index_file(shards: Sequence[Shard]) -> str:
    """What the index of several files is called."""
    return re.sub(r"-\d+-of-\d+\.safetensors$", ".safetensors.index.json", shards[0].file)


def plan_shards(
    specs: Iterable[TensorSpec], max_bytes: int, name: str = "model", sliced: Collection[str] = frozenset()
) -> tuple[Shard, ...]:
    """Fill files with the tensors in the order given, none with more than ``max_bytes`` of tensors.

    A tensor larger than that has a file to itself. The files are called ``NAME.safetensors`` or
    ``NAME-00001-of-00002.safetensors``. Those that are ``sliced`` are written slice by slice.
    """

    def shard(file: str, group: Sequence[TensorSpec]) -> Shard:
        return Shard(file, tuple(codec.layout(group)), frozenset(sliced) & {spec.name for spec in group})

    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (shard(f"{name}.safetensors", groups[0]),)
    count = len(groups)
    return tuple(
        shard(f"{name}-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def index(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of the index file, total_size in bytes of tensors."""
    files = {spec.name: shard.file for shard in shards for spec in shard.specs}
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}


class ShardWriter:
    """Writes tensors to their places and keeps a journal of those that are finished, with their digests.

    Parameters
    ----------
    folder : Path
        Where the files are, or will be.
    shards : sequence of Shard
    journal : Path
        The journal's file. What it says of an earlier run is believed where the bytes have the digest it names, and
        what they were made from still has its own.
    origin : callable
        The digest of what a tensor is to be made from, by its name; "" where it depends on nothing that can change.
    others : sequence of Path
        Journals of other processes that wrote to the files in the earlier run; taken over into this one.
    finished : mapping, optional
        Where another process writes to the files now and has begun them: the digests of what was finished then, which
        its journal has.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        journal: Path,
        origin: Callable[[str], str] = lambda name: "",
        *,
        others: Sequence[Path] = (),
        finished: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.places = {spec.name: (shard.file, offset, spec) for shard in shards for spec, offset in shard.pieces()}
        self._handles: dict[str, int] = {}
        try:
            for shard in shards:
                self._begin(shard, new=finished is None)
            found = self._finished([journal, *others], origin) if finished is None else {}
            self._journal = files.open_write(journal, "w")
        except BaseException:
            self._close_files()
            raise
        self.digests: dict[str, str] = dict(finished or {})  #: of the finished tensors, by name
        self.others = frozenset(finished or ())  #: those of them that another process's journal has
        self._lock = threading.Lock()
        for name, (digest, made_from) in found.items():
            self._note(name, digest, made_from)
        for path in others:
            files.unlink(path)

    def _begin(self, shard: Shard, *, new: bool) -> None:
        """Open a file; give it its size, and write its header, unless another process has."""
        path = self.folder / shard.file
        handle = self._handles[shard.file] = files.open_handle(path, _FLAGS)
        if not new:
            return
        with files.named(path):
            files.truncate(handle, shard.nbytes)
            files.write_all(handle, shard.header, 0)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, name: str, chunks: Iterable[bytes | memoryview], origin: Callable[[], str] = lambda: "") -> None:
        """Write the tensor's bytes, which come in pieces of any size, and note that it is finished.

        ``origin``, asked after the last piece, gives the digest of what they were made from.
        """
        file, offset, spec = self.places[name]
        sha256 = hashlib.sha256()
        position = offset
        for chunk in chunks:
            sha256.update(chunk)
            with files.named(self.folder / file):
                position += files.write_all(self._handles[file], chunk, position)
        if position - offset != spec.nbytes:
            raise AssertionError(f"{name}: wrote {position - offset} bytes where the header says {spec.nbytes}")
        self._note(name, sha256.hexdigest(), origin())

    def flush(self) -> None:
        """Bring all that was written to the disk."""
        for handle in self._handles.values():
            files.flush(handle)

    def close(self) -> None:
        with closing(self._journal):
            self._close_files()

    def _close_files(self) -> None:
        with ExitStack() as stack:  # all, whichever fails
            for file, handle in self._handles.items():
                stack.enter_context(files.named(self.folder / file))
                stack.callback(files.close, handle)
            self._handles.clear()

    def _note(self, name: str, digest: str, made_from: str) -> None:
        with self._lock:
            self.digests[name] = digest
            self._journal.write(json.dumps([name, digest, made_from]).encode() + b"\n")
            self._journal.flush()

    def _finished(self, journals: Sequence[Path], origin: Callable[[str], str]) -> dict[str, tuple[str, str]]:
        """The noted tensors that are as they were written, with their digests and those of what they were made from."""
        noted = {name: rest for path in journals for name, *rest in _lines(path) if name in self.places}
        found = _digests(self.folder, {name: self.places[name] for name in noted})
        whole = [name for name, (digest, _) in noted.items() if found[name] == digest]
        origins = in_order([partial(origin, name) for name in whole], count=2)
        return {name: (noted[name][0], now) for name, now in zip(whole, origins, strict=True) if now == noted[name][1]}


def _lines(journal: Path) -> Iterator[list[str]]:
    """The entries of a journal; without the line that was being written as the run was killed, and any damaged one."""
    for line in files.read_bytes(journal).splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, list) and len(entry) == 3 and all(isinstance(item, str) for item in entry):
            yield entry


def verify(folder: Path, shards: Sequence[Shard], digests: Mapping[str, str]) -> None:
    """Read the files again: headers as planned, and these tensors' bytes with the digests they were written with.

    Raises
    ------
    FrodctlError
        Something differs: the disk or the memory of this machine is not to be trusted.
    """
    places = {}
    for shard in shards:
        found = codec.read_header(folder / shard.file).tensors
        offsets = shard.offsets()
        if found != {spec.name: (spec, offsets[spec.name]) for spec in shard.specs}:
            raise FrodctlError(f"{shard.file}: the header read back is not the one written; check the disk")
        places.update({s.name: (shard.file, offset, s) for s, offset in shard.pieces() if s.name in digests})
    for name, digest in _digests(folder, places).items():
        if digests[name] != digest:
            raise FrodctlError(f"{places[name][0]}: tensor {name} reads back differently from what was written")


def _digests(folder: Path, places: Mapping[str, tuple[str, int, TensorSpec]]) -> dict[str, str]:
    def digest(place: tuple[str, int, TensorSpec]) -> str:
        file, offset, spec = place
        sha256 = hashlib.sha256()
        for chunk in codec.read_chunks(folder / file, offset, spec.nbytes):
            sha256.update(chunk)
        return sha256.hexdigest()

    found = in_order([partial(digest, place) for place in places.values()], count=2)
    return dict(zip(places, found, strict=True))

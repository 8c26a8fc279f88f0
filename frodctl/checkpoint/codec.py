"""The safetensors file format: headers in, headers and tensors out, nothing held but one tensor.

A file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes without gaps. Headers of
local files are read and judged by the safetensors library, which maps them. What it cannot do is here: write below a
header that is there first, one tensor at a time, in any order, resumed, equal bytes for equal input (see
`frodctl.checkpoint.shards`); read at a place, so that nothing stays resident; check the header of a file that is
elsewhere, or cannot be mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from frodctl.checkpoint import files
from frodctl.checkpoint.bounds import MAX_DIMENSIONS, MAX_JSON_BYTES, MAX_NAME
from frodctl.checkpoint.inputs import Json, check_amount, decode_json, open_input
from frodctl.errors import InvalidInput

CHUNK_BYTES = 8 << 20  #: of what is read in pieces

#: Bits per element, by the format's name of the dtype.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

#: The dtypes a weight may have for the arithmetic here.
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (the format's name for it) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """A validated header: ``tensors`` maps a name to (spec, offset of its first byte in the file)."""

    tensors: dict[str, tuple[TensorSpec, int]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of the safetensors file at ``path``.

    Beyond what the library refuses: more JSON than there may be memory for, which it is not even given; a key that an
    object has twice, of which it takes the last and other tools the first; what `_check_spec` finds in a tensor.

    Raises
    ------
    InvalidInput
        If it is no ordinary file, truncated, or its header is refused.
    """
    with open_input(path) as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= MAX_JSON_BYTES else b""  # which the library refuses
        size = file.seek(0, os.SEEK_END)
    try:
        check_amount(raw)
        try:
            specs, metadata = _by_library(path)
        except (OSError, MemoryError):
            return _unmapped(raw, 8 + length, size, str(path))
        names = decode_json(raw, strict=True)  # in their order, which the library does not keep
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise InvalidInput(f"{path}: not a valid safetensors file, or truncated ({reason:.300})") from None
    tensors = _placed(specs, 8 + length, str(path))
    return Header({name: tensors[name] for name in names if name != "__metadata__"}, metadata)


def _by_library(path: Path) -> tuple[list[TensorSpec], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata."""
    with files.open_mapped(path) as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        specs = [TensorSpec(name, it.get_dtype(), tuple(it.get_shape())) for name, it in slices.items()]
        return specs, opened.metadata() or {}


def _unmapped(raw: bytes, start: int, size: int, where: str) -> Header:
    """The header of a file that cannot be mapped, by its file system or a limit on addresses.

    Its tensors begin at ``start``, and it has ``size`` bytes.
    """
    entries = decode_json(raw, strict=True)
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else 0
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the header or its metadata are no JSON object, or of other things than text")
    tensors = {name: (spec, start + at) for name, (spec, at) in check_remote(entries, where).items()}
    if size != start + sum(spec.nbytes for spec, _ in tensors.values()):
        raise ValueError("the file is shorter or longer than its header says")
    return Header(tensors, metadata)


def check_remote(entries: Mapping[str, Json], where: str) -> dict[str, tuple[TensorSpec, int]]:
    """The tensors of a decoded header whose file is elsewhere, checked as `read_header` does; offsets are from its end.

    Raises
    ------
    InvalidInput
        The format does not allow it, or `read_header` would not.
    """
    try:
        spans = sorted((tuple(entry["data_offsets"]), name) for name, entry in entries.items())
        specs = [TensorSpec(name, entries[name]["dtype"], tuple(entries[name]["shape"])) for _, name in spans]
        tensors = _placed(specs, 0, where)
    except (TypeError, KeyError, OverflowError):
        raise InvalidInput(f"{where}: a tensor's dtype, shape or data_offsets are missing, or none at all") from None
    for span, name in spans:
        spec, begin = tensors[name]
        whole = all(type(number) is int and number >= 0 for number in (*spec.shape, *span))
        if not whole or span != (begin, begin + spec.nbytes) or prod(spec.shape) * DTYPE_BITS[spec.dtype] % 8:
            raise InvalidInput(f"{where}: tensor {name}: its data_offsets do not fit its shape, overlap or leave a gap")
    return {name: tensors[name] for name in entries}


def check_name(name: str, where: str) -> None:
    """`InvalidInput` for a tensor's name that could not be shown or written."""
    if len(name) > MAX_NAME:
        raise InvalidInput(f"{where}: a tensor's name has {len(name)} characters, {MAX_NAME} allowed")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{where}: tensor {name!a}: its name holds half a surrogate pair") from None


def _placed(specs: Iterable[TensorSpec], position: int, where: str) -> dict[str, tuple[TensorSpec, int]]:
    """Tensors in the order of their bytes, each with its place, the first at ``position``; there are no gaps."""
    tensors = {}
    for spec in specs:
        _check_spec(spec, where)
        tensors[spec.name] = spec, position
        position += spec.nbytes
    return tensors


def _check_spec(spec: TensorSpec, where: str) -> None:
    """Refuse what the library lets pass: a name too long to show, a dtype newer than this, a shape beyond numpy's."""
    check_name(spec.name, where)
    if spec.dtype not in DTYPE_BITS:
        raise InvalidInput(f"{where}: tensor {spec.name}: unknown dtype {spec.dtype!r:.40}")
    span = prod(max(size, 1) for size in spec.shape) * DTYPE_BITS[spec.dtype] // 8  # which strides count in 64 bits
    if len(spec.shape) > MAX_DIMENSIONS or span >= 2**63:
        raise InvalidInput(f"{where}: tensor {spec.name}: no tensor can have the shape {list(spec.shape)!s:.100}")


def layout(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which tensors are written: widest dtype first, so that each is aligned; then by name."""
    return sorted(specs, key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.name))


def file_bytes(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> int:
    """Size in bytes of the file that `write_file` makes of these."""
    return len(header_bytes(specs, metadata)) + sum(spec.nbytes for spec in specs)


def write_file(
    file: IO[bytes], specs: Sequence[TensorSpec], metadata: dict[str, str], chunks: Iterable[bytes | memoryview]
) -> None:
    """Write a safetensors file: the header first, then ``chunks``.

    Parameters
    ----------
    file : binary file
        Where to write, from its current position.
    specs : sequence of TensorSpec
        The tensors in the order in which their bytes come (see `layout`).
    metadata : dict of str
        The header's ``__metadata__``. Keys are written sorted, so equal input gives equal bytes.
    chunks : iterable of bytes or memoryview
        The tensors' bytes, one after another, in pieces of any size.
    """
    file.write(header_bytes(specs, metadata))
    expected, written = sum(spec.nbytes for spec in specs), 0
    for chunk in chunks:
        written += file.write(chunk)
    if written != expected:
        raise AssertionError(f"wrote {written} bytes of tensors where the header says {expected}")


def header_bytes(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """The beginning of a file with these tensors in this order: the length and the header itself."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_chunks(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """A file's bytes from ``offset`` on, in pieces of 8 MiB and a rest; each is valid until the next.

    Raises
    ------
    InvalidInput
        The file ends before them.
    """
    buffer = memoryview(bytearray(min(nbytes, CHUNK_BYTES)))
    with files.open_read(path) as file:
        file.seek(offset)
        while nbytes > 0:
            piece = buffer[: min(nbytes, len(buffer))]
            read_into(file, piece, f"{path}: truncated while it was read")
            yield piece
            nbytes -= len(piece)


def read_into(file: FileIO, view: memoryview, fault: str) -> None:
    """Fill the view from an unbuffered file; `InvalidInput` with the text ``fault`` if it ends before."""
    done = 0
    while done < len(view):
        with files.named(file.name):
            count = files.read_into(file, view[done:])
        if not count:
            raise InvalidInput(fault)
        done += count

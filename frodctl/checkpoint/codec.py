"""The safetensors file format: headers in, headers and tensors out, nothing held but one tensor.

A file is an 8-byte little-endian length, a JSON header of that length, then the tensors' bytes.
Headers come from strangers, so everything they claim is checked before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from frodctl.checkpoint.inputs import MAX_JSON_BYTES, decode_json, open_input
from frodctl.errors import InvalidInput

_CHUNK_BYTES = 8 << 20
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_NAME = 1000

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
    """Read and validate the header of the safetensors file at ``path``.

    Raises
    ------
    InvalidInput
        If it is no ordinary file, truncated, or its header is not what the format allows.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise InvalidInput(
                f"{path}: not a safetensors file, or truncated (header of {length} bytes in a file of {size})"
            )
        raw = file.read(length)
    try:
        entries = decode_json(raw, strict=True)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: the safetensors header is not valid JSON ({error})") from None
    return check_header(entries, where=str(path), data_start=8 + length, data_bytes=size - 8 - length)


def check_header(entries: Any, *, where: str, data_start: int, data_bytes: int | None) -> Header:
    """Validate the decoded header ``entries`` against the number of data bytes (None: not known)."""
    if not isinstance(entries, dict):
        raise InvalidInput(f"{where}: the safetensors header is not a JSON object")
    metadata = entries.get("__metadata__")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidInput(f"{where}: __metadata__ must map strings to strings")
    spans = []
    tensors: dict[str, tuple[TensorSpec, int]] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        spec, begin, end = _check_entry(name, entry, where)
        spans.append((begin, end, name))
        tensors[name] = (spec, data_start + begin)
    _check_spans(sorted(spans), where, data_bytes)
    return Header(tensors, metadata)


def check_name(name: str, where: str) -> None:
    """`InvalidInput` for a tensor's name that could not be shown or written."""
    if len(name) > _MAX_NAME:
        raise InvalidInput(f"{where}: a tensor's name has {len(name)} characters, {_MAX_NAME} allowed")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{where}: tensor {name!a}: its name holds half a surrogate pair") from None


def _check_entry(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    check_name(name, where)
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InvalidInput(f"{where}: tensor {name}: the header lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidInput(f"{where}: tensor {name}: unknown dtype {dtype!r:.40}")
    if isinstance(shape, (list, tuple)) and len(shape) > _MAX_DIMENSIONS:
        raise InvalidInput(f"{where}: tensor {name}: {len(shape)} dimensions, {_MAX_DIMENSIONS} allowed")
    numbers = [*shape, begin, end] if isinstance(shape, (list, tuple)) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise InvalidInput(f"{where}: tensor {name}: shape and data_offsets must be non-negative integers")
    if prod(max(size, 1) for size in shape) >= 2**63:
        raise InvalidInput(f"{where}: tensor {name}: shape {list(shape)!s:.100} is beyond 64 bits")
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != spec.nbytes or prod(spec.shape) * DTYPE_BITS[dtype] % 8:
        raise InvalidInput(
            f"{where}: tensor {name}: {end - begin} bytes at data_offsets, but {dtype} {list(shape)!s:.100} "
            f"takes {spec.nbytes}"
        )
    return spec, begin, end


def _check_spans(spans: list[tuple[int, int, str]], where: str, data_bytes: int | None) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            fault = "overlaps another" if begin < position else "leaves a gap before it"
            raise InvalidInput(f"{where}: tensor {name}: its bytes {begin}..{end} {fault}")
        position = end
    if data_bytes is not None and position != data_bytes:
        fault = "truncated" if position > data_bytes else "too long"
        raise InvalidInput(f"{where}: the file is {fault}: {position} bytes of tensors, {data_bytes} there")


def layout(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which tensors are written: widest dtype first, so that each is aligned; then by name."""
    return sorted(specs, key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.name))


def file_bytes(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> int:
    """Size in bytes of the file that `write_file` makes of these."""
    return len(header_bytes(specs, metadata)) + sum(spec.nbytes for spec in specs)


def write_file(file: IO[bytes], specs: Sequence[TensorSpec], metadata: dict[str, str], chunks: Iterator[Any]) -> None:
    """Write a safetensors file: the header first, then ``chunks``.

    Parameters
    ----------
    file : binary file
        Where to write, from its current position.
    specs : sequence of TensorSpec
        The tensors in the order in which their bytes come (see `layout`).
    metadata : dict of str
        The header's ``__metadata__``. Keys are written sorted, so equal input gives equal bytes.
    chunks : iterator of buffers
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
    entries: dict[str, Any] = {"__metadata__": metadata}
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
    buffer = memoryview(bytearray(min(nbytes, _CHUNK_BYTES)))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while nbytes > 0:
            piece = buffer[: min(nbytes, len(buffer))]
            read_into(file, piece, f"{path}: truncated while it was read")
            yield piece
            nbytes -= len(piece)


def read_into(file: Any, view: memoryview, fault: str) -> None:
    """Fill the view from an unbuffered file; `InvalidInput` with the text ``fault`` if it ends before."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise InvalidInput(fault)
        done += count

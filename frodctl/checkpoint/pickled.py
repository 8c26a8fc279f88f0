"""Headers of ``pytorch_model.bin``, through torch's restricted unpickler: no code of the file is run.

A checkpoint that torch >= 1.6 wrote is a zip archive with the storages uncompressed inside, so the
unpickler is asked for tensors without data (device "meta"), which say where in the file their storage
begins; the bytes are then read like a safetensors file's. Older files hold one pickle stream and are loaded
as a whole.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from math import prod
from mmap import PAGESIZE
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from frodctl.arrays import NAMED, NAMES, dtype_name, from_torch
from frodctl.checkpoint.bounds import MAX_DIMENSIONS, MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES
from frodctl.checkpoint.codec import check_name
from frodctl.checkpoint.inputs import open_input
from frodctl.checkpoint.records import TensorInfo
from frodctl.errors import FrodctlError, InvalidInput, OutOfResources

_ZIP = b"PK\x03\x04"
#: What torch says of a pickle that wants more than tensors, and of the opcodes of pickle's newer protocols.
_NEEDS_CODE = re.compile(r"GLOBAL|global|create new object|unrecognized function|Can only build|must be imported")
_NEWER = re.compile(r"operand 14\d\b")
_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of the pickled state dict at ``path``.

    Raises
    ------
    InvalidInput
        If the file is corrupt, needs code to load, holds something else than tensors by name, or fewer of their bytes
        than it says.
    OutOfResources
        If there is no memory for a file of the old kind.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(len(_ZIP)) == _ZIP
    if not zipped:
        with _Instructions(path, MAX_PICKLE_BYTES) as stream:
            state = _load(path, stream, size, "cpu")
        return [_in_memory(name, tensor, path) for name, tensor in state.items()]
    records = _records(path, size)
    state = _load(path, path, size, "meta")
    places = {name: getattr(tensor.untyped_storage(), "_checkpoint_offset", None) for name, tensor in state.items()}
    if not set(places.values()) <= records.keys():
        # an older torch does not say where they begin, and of what another program wrote torch says it wrongly
        state = _load(path, path, size, "cpu", mmap=True)
        places = _mapped_places(state, records)
    return [_info(name, tensor, path, places[name], records) for name, tensor in state.items()]


class _Instructions(io.BufferedReader):
    """A file of which only so much may be read as pickled instructions; torch takes the storages by its descriptor."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(io.FileIO(path))
        self.left = limit

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().read(size if size is not None and 0 <= size <= self.left else self.left + 1))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().readline(self.left + 1))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("too long")
        return data


def _load(path: Path, source: Path | IO[bytes], size: int, device: str, mmap: bool | None = None) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(source, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise _explained(error, path, size) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(_is_named_dense(name, item) for name, item in state.items()):
        raise InvalidInput(f"{path}: holds something else than a state dict of dense tensors")
    _check_tensors(path, state, size, device)
    return state


def _explained(error: Exception, path: Path, size: int) -> FrodctlError:
    text = str(error)
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    if isinstance(error, MemoryError) or "Cannot allocate memory" in text or (asked and int(asked[1]) <= size):
        return OutOfResources(f"{path}: out of memory; convert it to safetensors, which is read piece by piece")
    where = "convert it to safetensors where you trust it"
    reason = f"it is damaged or no checkpoint ({type(error).__name__}); download it again"
    if isinstance(error, pickle.UnpicklingError):
        if _NEEDS_CODE.search(text) or _is_code(path):
            reason = f"it needs code to load, which is never run; {where}"
        elif _NEWER.search(text):
            reason = f"its pickle protocol is above 3; {where}"
    return InvalidInput(f"{path}: torch's weights_only loader refuses it: {reason}")


def _is_code(path: Path) -> bool:
    """Whether the file is a whole pickle (a short one) that names code, and so not a damaged one."""
    try:
        with _Instructions(path, MAX_PICKLE_BYTES // 10) as stream:
            return not _CODE.isdisjoint({opcode.name for opcode, _, _ in pickletools.genops(stream)})
    except Exception:  # as in _load
        return False


def _is_named_dense(name: object, item: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(item, Tensor)
        and item.layout == torch.strided
        and not (item.is_nested or item.is_neg() or item.is_conj())
    )


def _check_tensors(path: Path, state: Mapping[str, Tensor], size: int, device: str) -> None:
    """`InvalidInput` unless all of the tensors lie in their storages, and stand for no more bytes than the file has."""
    viewed = 0
    for name, tensor in state.items():
        check_name(name, str(path))
        if dtype_name(tensor) not in NAMED:
            raise InvalidInput(f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported")
        if tensor.device.type != device:
            raise InvalidInput(f"{path}: tensor {name} was saved without its data (on the meta device)")
        shape, strides, begin = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        elements = prod(shape)
        span = 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if elements else 0
        end = (begin + span) * tensor.element_size()
        widest = max(prod(max(length, 1) for length in shape), *strides, 0) * tensor.element_size()
        if min((*shape, *strides, begin)) < 0 or widest >= 2**63 or len(shape) > MAX_DIMENSIONS:
            raise InvalidInput(f"{path}: tensor {name} has an impossible shape or strides")
        if elements and end > tensor.untyped_storage().nbytes():
            raise InvalidInput(f"{path}: tensor {name} reaches past the end of its storage")
        viewed += 0 if tensor.is_contiguous() else elements * tensor.element_size()
        if viewed > size:
            raise InvalidInput(f"{path}: tensor {name} repeats its storage, and is larger than the file")


def _records(path: Path, size: int) -> dict[int, int]:
    """Where the archive's storages begin and how many bytes they take.

    Raises
    ------
    InvalidInput
        It is not as torch writes it: compressed, of another byte order, or larger unpacked than it is.
    """
    try:
        with open(path, "rb") as file:
            _check_directory(file, size)
            with zipfile.ZipFile(file) as archive:
                items = archive.infolist()
                if any(item.compress_type != zipfile.ZIP_STORED for item in items):
                    raise InvalidInput(f"{path}: its members are compressed; load and save it again with torch")
                if sum(item.file_size for item in items) > size:
                    raise ValueError("members larger than the file")
                for item in items:
                    _check_member(item, archive, path)
                return dict(_place(item, file) for item in items if re.search(r"/data/\d+$", item.filename))
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        struct.error,
    ) as error:
        raise InvalidInput(f"{path}: damaged ({error}); download it again") from None


def _check_directory(file: IO[bytes], size: int) -> None:
    """`ValueError` unless the archive ends as torch ends it, so that zipfile and torch read the same directory."""
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98)
    wide, locator, end = tail[:56], tail[56:76], tail[76:]
    if locator.startswith(b"PK\x06\x07"):
        (place,) = struct.unpack("<8xQ4x", locator)
        count, offset = struct.unpack("<40xQQ", wide)
        whole = place == size - 98 and wide.startswith(b"PK\x06\x06") and offset + count == size - 98
    else:
        count, offset = struct.unpack("<12xLL2x", end)
        whole = offset + count == size - 22
    if not whole or not end.startswith(b"PK\x05\x06") or end[20:] != bytes(2) or count > MAX_DIRECTORY_BYTES:
        raise ValueError("no archive of torch's")


def _check_member(item: zipfile.ZipInfo, archive: zipfile.ZipFile, path: Path) -> None:
    name = item.filename.lower().rpartition("/")[2]  # as torch looks for it
    if name.endswith(".pkl") and item.file_size > MAX_PICKLE_BYTES:
        raise InvalidInput(f"{path}: {item.file_size} bytes of pickle, {MAX_PICKLE_BYTES} allowed")
    if name == "byteorder" and (item.file_size != 6 or archive.read(item) != b"little"):
        raise InvalidInput(f"{path}: its numbers are big-endian; save it again on a little-endian machine")
    if name == ".storage_alignment" and (item.file_size > 6 or not 0 < int(archive.read(item)) <= 1 << 16):
        raise ValueError("storage alignment")


def _place(item: zipfile.ZipInfo, file: IO[bytes]) -> tuple[int, int]:
    """The offset and the size of a member."""
    file.seek(item.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return item.header_offset + 30 + name_bytes + extra_bytes, item.file_size


def _mapped_places(state: Mapping[str, Tensor], records: Mapping[int, int]) -> dict[str, int | None]:
    """Where the storages of a mapped archive begin in it; None where that is not certain.

    The mapping begins at a page, and each of the storages where a record of its size does.
    """
    storages = {name: tensor.untyped_storage() for name, tensor in state.items()}
    addresses = {storage.data_ptr(): storage.nbytes() for storage in storages.values() if storage.nbytes()}
    first, nbytes = next(iter(addresses.items()), (0, 0))
    pages = [first - begin for begin, size in records.items() if size == nbytes and (first - begin) % PAGESIZE == 0]
    bases = [base for base in pages if all(records.get(at - base) == size for at, size in addresses.items())]
    if len(bases) != 1:
        return dict.fromkeys(state)
    return {name: storage.data_ptr() - bases[0] for name, storage in storages.items()}


def _info(name: str, tensor: Tensor, path: Path, begin: int | None, records: Mapping[int, int]) -> TensorInfo:
    """Where the tensor's bytes lie in the archive."""
    nbytes = tensor.untyped_storage().nbytes()
    if nbytes and (begin is None or records.get(begin) != nbytes):
        raise InvalidInput(f"{path}: tensor {name}: no storage of the size that the pickle says is where it should be")
    stride = None if tensor.is_contiguous() else tensor.stride()
    offset = (begin or 0) + int(tensor.storage_offset()) * tensor.element_size()
    return TensorInfo(name, NAMES[NAMED[dtype_name(tensor)]], tuple(tensor.shape), path.name, offset, stride)


def _in_memory(name: str, tensor: Tensor, path: Path) -> TensorInfo:
    data = from_torch(tensor.contiguous())
    offset = data.ctypes.data  # stands for a place in the file: equal where tensors are tied
    return TensorInfo(name, NAMES[data.dtype], data.shape, path.name, offset, data=data)

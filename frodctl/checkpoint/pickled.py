"""Headers of ``pytorch_model.bin``, through torch's restricted unpickler: no code of the file is run.

A checkpoint that torch >= 1.6 wrote is a zip archive with the storages uncompressed inside, so the
unpickler is asked for tensors without data (device "meta"), which say where in the file their storage
begins; the bytes are then read like a safetensors file's. Older files hold one pickle stream and are loaded
as a whole.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from frodctl.checkpoint.source import TensorInfo
from frodctl.checkpoint.stream import DTYPE_NAMES
from frodctl.errors import InvalidInput


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of the pickled state dict at ``path``.

    Raises
    ------
    InvalidInput
        If the file is corrupt, needs code to load, or holds something else than tensors by name.
    """
    state = _load(path, "meta")
    records = _records(path)
    infos = [_info(name, tensor, path, records) for name, tensor in state.items()]
    if any(info is None for info in infos):
        state = _load(path, "cpu")
        return [_in_memory(name, tensor, path) for name, tensor in state.items()]
    return [info for info in infos if info is not None]


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            reason = "it needs code to load, which is never run; convert it to safetensors where you trust it"
        else:
            reason = f"it is damaged or no checkpoint ({type(error).__name__}); download it again"
        raise InvalidInput(f"{path}: torch's weights_only loader refuses it: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(_is_named_dense(name, item) for name, item in state.items()):
        raise InvalidInput(f"{path}: holds something else than a state dict of dense tensors")
    return state


def _records(path: Path) -> dict[int, int]:
    """Where the archive's storages begin and how many bytes they take; empty if any is not as torch writes it.

    torch computes their places from how it writes archives itself, which is wrong where another program
    wrote this one. Records that lie in the order of their numbers can have the computed places only if
    those are right.
    """
    if not zipfile.is_zipfile(path):
        return {}
    records: dict[int, int] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        items = [item for item in archive.infolist() if re.search(r"/data/\d+$", item.filename)]
        numbers = [int(item.filename.rsplit("/", 1)[-1]) for item in sorted(items, key=lambda i: i.header_offset)]
        if numbers != sorted(numbers) or any(item.compress_type != zipfile.ZIP_STORED for item in items):
            return {}
        for item in items:
            file.seek(item.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            records[item.header_offset + 30 + name_bytes + extra_bytes] = item.file_size
    return records


def _info(name: str, tensor: torch.Tensor, path: Path, records: Mapping[int, int]) -> TensorInfo | None:
    """Where the tensor's bytes lie in the archive; None where that is not certain."""
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None or records.get(begin) != storage.nbytes():
        return None
    end = begin + storage.nbytes()
    begin += tensor.storage_offset() * tensor.element_size()
    stride = None if tensor.is_contiguous() else tensor.stride()
    info = TensorInfo(name, _dtype(name, tensor, path), tuple(tensor.shape), path.name, begin, stride)
    if begin + info.nbytes > end:
        raise InvalidInput(f"{path}: tensor {name} reaches past the end of its storage")
    return info


def _in_memory(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    data = tensor.contiguous()
    offset = data.data_ptr()  # stands for a place in the file: equal where tensors are tied
    return TensorInfo(name, _dtype(name, tensor, path), tuple(data.shape), path.name, offset, data=data)


def _is_named_dense(name: object, item: object) -> bool:
    return isinstance(name, str) and isinstance(item, torch.Tensor) and item.layout == torch.strided


def _dtype(name: str, tensor: torch.Tensor, path: Path) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise InvalidInput(f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported")
    return DTYPE_NAMES[tensor.dtype]

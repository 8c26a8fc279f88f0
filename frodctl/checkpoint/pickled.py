"""Headers of ``pytorch_model.bin``, through torch's restricted unpickler: no code of the file is run.

A checkpoint that torch >= 1.6 wrote is a zip archive with the storages uncompressed inside, so the
unpickler is asked for tensors without data (device "meta"), which say where in the file their storage
begins; the bytes are then read like a safetensors file's. Older files hold one pickle stream and are loaded
as a whole.
"""

from __future__ import annotations

import warnings
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
    infos = [_info(name, tensor, path) for name, tensor in state.items()]
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
        reason = str(error).strip().split("\n")[0][:200]
        raise InvalidInput(
            f"{path}: torch's weights_only loader refuses it ({reason}); convert it to safetensors"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InvalidInput(f"{path}: holds something else than a state dict of tensors")
    return state


def _info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo | None:
    """Where the tensor's bytes lie in the archive; None where the format does not say."""
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        return None
    begin += tensor.storage_offset() * tensor.element_size()
    stride = None if tensor.is_contiguous() else tensor.stride()
    info = TensorInfo(name, _dtype(name, tensor, path), tuple(tensor.shape), path.name, begin, stride)
    if begin + info.nbytes > path.stat().st_size:
        raise InvalidInput(f"{path}: tensor {name} reaches past the end of the file")
    return info


def _in_memory(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    data = tensor.contiguous()
    offset = data.untyped_storage().data_ptr()  # stands for a place in the file: equal where tensors are tied
    return TensorInfo(name, _dtype(name, tensor, path), tuple(data.shape), path.name, offset, data=data)


def _dtype(name: str, tensor: torch.Tensor, path: Path) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise InvalidInput(f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported")
    return DTYPE_NAMES[tensor.dtype]

"""The tensors' bytes: read one tensor at a time, ahead of the arithmetic, digested on the way.

Files are read into buffers of our own, never mapped, so that what was read does not stay resident.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from frodctl.checkpoint.codec import read_into
from frodctl.errors import InvalidInput, OutOfResources

if TYPE_CHECKING:
    from frodctl.arrays import Array
    from frodctl.checkpoint.records import TensorInfo  # which compares tensors' bytes to find ties

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Tensors that may wait, read, for the arithmetic.
READ_AHEAD = 1

_PIECE = 1 << 20  # elements

T = TypeVar("T")
_Results: TypeAlias = Queue[tuple[T, None] | tuple[None, BaseException]]


def read_tensor(root: Path, info: TensorInfo, index: int | None = None, buffer: Array | None = None) -> Array:
    """Read one tensor, or slice ``index`` of its first dimension, in its stored dtype and shape.

    Its bytes go to the beginning of ``buffer`` (uint8) if one is given, else to fresh memory. The result is
    contiguous (except where a pickled tensor was stored with other strides) and aligned regardless of its
    place in the file, so that equal bytes give equal arithmetic.

    Raises
    ------
    InvalidInput
        The file has become shorter than its header says.
    OutOfResources
        There is no memory for it.
    """
    if info.data is not None:
        return info.data if index is None else info.data[index]
    if index is not None:
        info = info.slice(index)
    path, nbytes = root / info.file, info.nbytes
    buffer = _empty(nbytes, info.name) if buffer is None else buffer[:nbytes]
    with open(path, "rb", buffering=0) as file:
        file.seek(info.offset)
        read_into(file, tensor_bytes(buffer), f"{path}: tensor {info.name}: the file ends before it; download it again")
    flat = buffer.view(TORCH_DTYPES[info.dtype])
    return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)


def _empty(nbytes: int, name: str) -> Array:
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except (MemoryError, RuntimeError):
        raise OutOfResources(f"out of memory: tensor {name} takes {nbytes / 1e9:.2f} GB") from None


def tensor_bytes(tensor: Array) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest(tensor: Array) -> str:
    """``sha256:…`` of the tensor's bytes in their stored order."""
    if not tensor.is_contiguous():  # a view over a pickled storage: its bytes are the storage's
        tensor = torch.as_strided(tensor, (_span(tensor),), (1,))
    return "sha256:" + hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _span(tensor: Array) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def check_finite(tensor: Array, name: str, file: str) -> None:
    """Raise `InvalidInput` that names the tensor if it holds NaN or Inf."""
    rows = tensor.reshape(-1) if tensor.is_contiguous() else tensor
    step = max(1, _PIECE * len(rows) // max(1, rows.numel()))
    pieces = [rows[i : i + step] for i in range(0, len(rows), step)]
    # piece by piece: the sum in float64 converts all that it is given; only a sum that is not finite is counted
    bad = sum(
        int((~torch.isfinite(piece)).sum()) for piece in pieces if not torch.isfinite(piece.sum(dtype=torch.float64))
    )
    if bad:
        raise InvalidInput(f"{file}: tensor {name} holds {bad} values that are NaN or Inf; the weights are damaged")


def prefetch(tasks: Sequence[Callable[[], T]], depth: int = READ_AHEAD) -> Iterator[T]:
    """Yield each task's result in order, computed by a thread that stays ``depth`` results ahead.

    An exception in a task is raised at its place. Leaving the iteration early stops the thread. A task is begun
    only when the caller is done with the result ``depth + 2`` places before, so that many buffers are enough.
    """
    queue: _Results[T] = Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(tasks, queue, stop), name="frodctl-read")
    thread.start()
    try:
        for _ in tasks:
            result, error = queue.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
            del result  # before the next one comes
    finally:
        stop.set()
        thread.join()


def _work(tasks: Sequence[Callable[[], T]], queue: _Results[T], stop: threading.Event) -> None:
    """Put each task's result, or the exception that ended them, into the queue."""

    def abandoned() -> bool:
        # An interrupted main thread may leave the iteration open; the interpreter must find this thread ended.
        return stop.is_set() or not threading.main_thread().is_alive()

    for task in tasks:
        try:
            item: tuple[T, None] | tuple[None, BaseException] = (task(), None)
        except BaseException as error:
            item = (None, error)
        while not abandoned():
            try:
                queue.put(item, timeout=0.1)
                break
            except Full:
                continue
        if abandoned() or item[1] is not None:
            return
        del item

"""The tensors of a merge: read ahead, updated, written behind."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from frodctl.adapted.matching import Weight
from frodctl.adapted.opening import Source
from frodctl.adapted.updates import Task, WeightUpdates
from frodctl.arrays import DTYPES
from frodctl.checkpoint import codec, stream
from frodctl.checkpoint.records import TensorInfo
from frodctl.checkpoint.shards import ShardWriter
from frodctl.errors import InvalidInput
from frodctl.jobs.merge.plan import MergePlan, flops
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.pipeline import AHEAD, Workers, in_order

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.kernels import Kernels


class TensorMerger:
    """Makes the tensors of the output with these names and gives them to the writer."""

    def __init__(
        self,
        plan: MergePlan,
        names: Collection[str],
        writer: ShardWriter,
        kernels: Kernels,
        progress: Callback,
        profile: Unprofiled,
    ) -> None:
        assert plan.checkpoint.root is not None, "the plan of a dry run cannot be run"
        self.plan = plan
        self.names = names
        self.weights = [weight for weight in plan.weights if plan.name(weight) in names]
        self.root = plan.checkpoint.root
        self.writer = writer
        self.progress = progress
        self.profile = profile
        self.kernels = kernels
        self.updates = WeightUpdates(plan.checkpoint, plan.weights, kernels)
        self.unchanged: list[str] = []
        self.done = 0.0
        self.total = sum(flops(weight) for weight in self.weights)
        largest = max((weight.target.nbytes for weight in self.weights), default=0)
        self._read_buffers = _ring(AHEAD + 1, largest)
        widest = max((self._output_bytes(weight) for weight in self.weights), default=0)
        self._write_buffer = np.empty(widest, np.uint8)

    def run(self) -> None:
        """Write all tensors that are not finished."""
        waiting = []
        for weight in self.weights:
            if self._is_waiting(self.plan.name(weight)):
                waiting.append(weight)
            elif self.updates.untouched(weight):
                self.unchanged.append(self.plan.name(weight))
        self._advance(self.total - sum(flops(w) for w in waiting))
        with Workers[None]() as writes, Workers[None]() as copies:
            for name, info in self.plan.copied.items():
                if self._is_waiting(name):
                    copies.add(partial(self._copy, name, info))
            for name, (source, info) in self.plan.replaced.items():
                if self._is_waiting(name):
                    self._replace(name, source, info)
            tasks = [partial(self._read, weight, next(self._read_buffers)) for weight in waiting]
            for task, digest in self.profile.waiting("waiting for weights", in_order(tasks)):
                self._merge(task, digest, writes)
                self._advance(flops(task.weight))
            with self.profile.step("waiting for writes"):
                writes.finish()
                copies.finish()

    def _is_waiting(self, name: str) -> bool:
        return name in self.names and name not in self.writer.digests

    def _advance(self, amount: float) -> None:
        self.done += amount
        self.progress(Progress("merging", self.done, self.total))

    def _output_bytes(self, weight: Weight) -> int:
        bits = codec.DTYPE_BITS[self.plan.dtypes[self.plan.name(weight)]]
        return weight.target.m * weight.target.n * bits // 8

    def _read(self, weight: Weight, buffer: HostArray) -> tuple[Task, str]:
        """One weight and the digest of its bytes."""
        with self.profile.step("reading and digests"):
            task = self.updates.read(weight, buffer)
            return task, "" if task.stored is None else self.updates.digest(task)

    def _merge(self, task: Task, digest: str, writes: Workers[None]) -> None:
        """Compute one weight and have it written."""
        name = self.plan.name(task.weight)
        info = task.weight.target.stored
        if task.stored is None:
            self.unchanged.append(name)
            writes.add(partial(self._copy, name, info))
            return
        dtype = DTYPES[self.plan.dtypes[name]]
        transposed = task.weight.target.transposed
        W = task.stored.T if transposed else task.stored
        out = self._write_buffer[: self._output_bytes(task.weight)].view(dtype).reshape(info.shape)
        rows_first = out.T if transposed else out
        for rows, block in self.updates.rows(W, task):
            with self.profile.step("waiting for writes"):
                writes.finish()  # of what was in the buffer before
            self.kernels.get(block, rows_first[rows])
        if not _all_finite(out):
            stream.check_finite(task.stored, info.name, str(self.root / info.file))
            cause = "the adapter's values are too large, or it belongs to another base"
            raise InvalidInput(f"{name}: the merged weight holds NaN or Inf in {dtype.name}; {cause}")
        writes.add(partial(self._write, name, out, digest))

    def _write(self, name: str, out: HostArray, digest: str) -> None:
        with self.profile.step("writing"):
            self.writer.write(name, [stream.tensor_bytes(out)], lambda: digest)

    def _replace(self, name: str, source: Source, info: TensorInfo) -> None:
        tensor = source.adapter.tensor(info)
        converted = _cast(tensor, self.plan.dtypes[name])
        if not _all_finite(converted):
            raise InvalidInput(f"{source.adapter.name}: tensor {info.name} holds NaN or Inf, or has them as {name}")
        self.writer.write(name, [stream.tensor_bytes(np.ascontiguousarray(converted))])

    def _copy(self, name: str, info: TensorInfo) -> None:
        sha256 = hashlib.sha256()
        pieces = self._converted(info, self.plan.dtypes[name], sha256)
        with self.profile.step("copying"):
            self.writer.write(name, pieces, lambda: f"sha256:{sha256.hexdigest()}")

    def _converted(self, info: TensorInfo, dtype: str, sha256: hashlib._Hash) -> Iterator[memoryview]:
        """The base's tensor, piece by piece, in the dtype; digested as it is stored."""
        for piece in _pieces(self.root, info):
            sha256.update(piece)
            if dtype == info.dtype:
                yield piece
                continue
            before = np.frombuffer(piece, DTYPES[info.dtype])
            after = _cast(before, dtype)
            if not np.array_equal(np.isfinite(after), np.isfinite(before)):
                raise InvalidInput(f"{self.root / info.file}: tensor {info.name} is too large for {dtype}")
            yield stream.tensor_bytes(after)


def origin(plan: MergePlan, name: str) -> str:
    """The digest of what a tensor of the output is made from in the base; "" where it comes from an adapter alone."""
    root = plan.checkpoint.root
    assert root is not None
    if name in plan.replaced:
        return ""
    sha256 = hashlib.sha256()
    for piece in _pieces(root, plan.origins[name]):
        sha256.update(piece)
    return f"sha256:{sha256.hexdigest()}"


def _pieces(root: Path, info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes, by rows where a pickle has them otherwise, and of its values where it has scales."""
    if info.is_plain:
        yield from codec.read_chunks(root / info.file, info.offset, info.nbytes)
    else:
        yield stream.tensor_bytes(np.ascontiguousarray(stream.read_tensor(root, info)))


@np.errstate(over="ignore", invalid="ignore")  # what does not fit becomes infinity, which is looked for
def _cast(tensor: HostArray, dtype: str) -> HostArray:
    return tensor.astype(DTYPES[dtype])


def _all_finite(tensor: HostArray) -> bool:
    return bool(np.isfinite(tensor).all())


def _ring(count: int, nbytes: int) -> Iterator[HostArray]:
    """Buffers that are used in turn: fresh memory would cost page faults."""
    return itertools.cycle([np.empty(nbytes, np.uint8) for _ in range(count)])

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
from frodctl.checkpoint.source import Folder
from frodctl.errors import InvalidInput
from frodctl.jobs.merge.plan import MergePlan, flops
from frodctl.jobs.notes import Notes
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.method.fidelity import Fidelity
from frodctl.method.float8 import quantize_sum
from frodctl.pipeline import AHEAD, Workers, in_order

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.kernels import Kernels


class TensorMerger:
    """Makes the tensors of the output with these names and gives them to the writer.

    ``notes`` is for how much of the update is in the weights that are written in 8 bits.
    """

    def __init__(
        self,
        plan: MergePlan,
        names: Collection[str],
        writer: ShardWriter,
        notes: Notes,
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
        self.notes = notes
        self.progress = progress
        self.profile = profile
        self.kernels = kernels
        self.updates = WeightUpdates(plan.checkpoint, plan.weights, kernels)
        self.unchanged: list[str] = []
        self.done = 0.0
        self.total = sum(flops(weight) for weight in self.weights)
        largest = max((weight.target.nbytes for weight in self.weights), default=0)
        self._read_buffers = itertools.cycle([kernels.buffer(largest) for _ in range(AHEAD + 1)])
        widest = max((self._output_bytes(weight) for weight in self.weights), default=0)
        self._write_buffer = np.empty(widest, np.uint8)  # or for ΔW, of a weight that is written in 8 bits

    def run(self) -> None:
        """Write all tensors that are not finished."""
        waiting = []
        for weight in self.weights:
            name = self.plan.name(weight)
            untouched = self._is_written(name) and self.updates.untouched(weight)
            if untouched:
                self.unchanged.append(name)
            elif not self._is_written(name) or (name in self.plan.scales and name not in self.notes.known):
                waiting.append(weight)
        self._advance(self.total - sum(flops(w) for w in waiting))
        with Workers[None]() as writes, Workers[None]() as copies:
            for name, info in self.plan.copied.items():
                if name in self.names and not self._is_written(name):
                    copies.add(partial(self._copy, name, info))
            for name, (source, info) in self.plan.replaced.items():
                if name in self.names and name not in self.writer.digests:
                    self._replace(name, source, info)
            tasks = [partial(self._read, weight, next(self._read_buffers)) for weight in waiting]
            for task, digest in self.profile.waiting("waiting for weights", in_order(tasks)):
                self._merge(task, digest, writes)
                self._advance(flops(task.weight))
            with self.profile.step("waiting for writes"):
                writes.finish()
                copies.finish()

    def _is_written(self, name: str) -> bool:
        """Whether a tensor is finished, with its scales if it has some."""
        return {name, self.plan.scales.get(name, name)} <= self.writer.digests.keys()

    def _advance(self, amount: float) -> None:
        self.done += amount
        self.progress(Progress("merging", self.done, self.total))

    def _output_bytes(self, weight: Weight) -> int:
        name = self.plan.name(weight)
        bits = 32 if name in self.plan.scales else codec.DTYPE_BITS[self.plan.dtypes[name]]
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
        if name in self.plan.scales:
            self._quantize(task, digest, writes)
            return
        dtype = DTYPES[self.plan.dtypes[name]]
        transposed = task.weight.target.transposed
        stored = self._held(name, task.stored)
        W = stored.T if transposed else stored
        out = self._write_buffer[: self._output_bytes(task.weight)].view(dtype).reshape(info.shape)
        rows_first = out.T if transposed else out
        for rows, block in self.updates.rows(W, task):
            with self.profile.step("waiting for writes"):
                writes.finish()  # of what was in the buffer before
            self.kernels.get(block, rows_first[rows])
        self._require_finite(out, task, dtype.name)
        writes.add(partial(self._write, name, out, digest))

    def _require_finite(self, out: HostArray, task: Task, dtype: str) -> None:
        """`InvalidInput` where what was made of a weight holds NaN or Inf."""
        if _all_finite(out):
            return
        info = task.weight.target.stored
        assert task.stored is not None
        stream.check_finite(task.stored, info.name, str(self.root / info.file))
        cause = "the adapter's values are too large, or it belongs to another base"
        raise InvalidInput(f"{self.plan.name(task.weight)}: the merged weight holds NaN or Inf in {dtype}; {cause}")

    def _quantize(self, task: Task, digest: str, writes: Workers[None]) -> None:
        """Compute the change of one weight, and have the sum written in 8 bits."""
        assert task.stored is not None
        W = self._held(self.plan.name(task.weight), task.stored)
        delta = self._write_buffer[: 4 * W.size].view(np.float32).reshape(W.shape)
        for rows, block in self.updates.changes(W, task):
            with self.profile.step("waiting for writes"):
                writes.finish()
            delta[rows] = block
        codes, scales, found = self._in_8_bits(W, delta)
        self._require_finite(scales, task, "float8_e4m3")
        writes.add(partial(self._write_codes, self.plan.name(task.weight), codes, scales, digest, found))

    def _held(self, name: str, stored: HostArray) -> HostArray:
        """A tensor of the base as the model that was trained held it."""
        if self.plan.base_as is None:
            return stored
        with self.profile.step("quantizing as in training"):
            return self.plan.base_as.of(name, stored)

    def _in_8_bits(self, W: HostArray, delta: HostArray | None) -> tuple[HostArray, HostArray, Fidelity | None]:
        quantization = self.plan.quantization
        assert quantization is not None
        return quantize_sum(W, delta, quantization.block(W.shape[1]), DTYPES[quantization.scales_dtype])

    def _write_codes(self, name: str, codes: HostArray, scales: HostArray, digest: str, found: Fidelity | None) -> None:
        with self.profile.step("writing"):
            self.writer.write(name, [stream.tensor_bytes(codes)], lambda: digest)
            self.writer.write(self.plan.scales[name], [stream.tensor_bytes(scales)], lambda: digest)
        if found is not None:
            self.notes.add(name, found)

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
        if name in self.plan.scales or (self.plan.base_as and name in self.plan.base_as.tensors):
            self._copy_changed(name, info)
            return
        sha256 = hashlib.sha256()
        pieces = self._converted(info, self.plan.dtypes[name], sha256)
        with self.profile.step("copying"):
            self.writer.write(name, pieces, lambda: f"sha256:{sha256.hexdigest()}")

    def _copy_changed(self, name: str, info: TensorInfo) -> None:
        """Write a tensor that nothing is added to, but is held otherwise or written in 8 bits."""
        stored = np.ascontiguousarray(stream.read_tensor(self.root, info))
        stream.check_finite(stored, info.name, str(self.root / info.file))
        digest, W = stream.digest(stored), self._held(name, stored)
        if name in self.plan.scales:
            codes, scales, found = self._in_8_bits(W, None)
            self._write_codes(name, codes, scales, digest, found)
            return
        converted = np.ascontiguousarray(_cast(W, self.plan.dtypes[name]))
        if not _all_finite(converted):
            raise InvalidInput(f"{self.root / info.file}: tensor {info.name} is too large for {self.plan.dtypes[name]}")
        self._write(name, converted, digest)

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
        yield from Folder(root).chunks(info)
    else:
        yield stream.tensor_bytes(np.ascontiguousarray(stream.read_tensor(root, info)))


@np.errstate(over="ignore", invalid="ignore")  # what does not fit becomes infinity, which is looked for
def _cast(tensor: HostArray, dtype: str) -> HostArray:
    return tensor.astype(DTYPES[dtype])


def _all_finite(tensor: HostArray) -> bool:
    return bool(np.isfinite(tensor).all())

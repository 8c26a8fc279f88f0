"""The tensors of a merge: read ahead, updated, written behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from frodctl.checkpoint import codec, stream
from frodctl.checkpoint.shards import ShardWriter
from frodctl.checkpoint.source import TensorInfo
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter
from frodctl.jobs.merge.plan import MergePlan, Part, Source, Weight, flops
from frodctl.jobs.merge.projection import Projections
from frodctl.jobs.progress import Callback, Progress
from frodctl.method.update import Blocks, CategoryUpdate

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class _Trained:
    """What one adapter holds for one weight, read."""

    part: Part
    scales: Tensor  #: λ', (n,)
    values: Tensor  #: of S, (nnz,)
    base_scales: Tensor | None  #: λ, (n,), where the file says it

    @property
    def reconstructs(self) -> bool:
        """Whether W' itself is computed, rather than W' − W."""
        return self.part.source.form == "reconstruct"

    @property
    def untouched(self) -> bool:
        """Whether the update is 0 exactly."""
        if self.part.source.scale == 0:
            return True
        at_start = self.base_scales is not None and torch.equal(self.scales, self.base_scales)
        return not self.reconstructs and at_start and not self.values.any()


@dataclass(frozen=True)
class _Task:
    """One weight, ready for the arithmetic; without its bytes where they will be copied."""

    weight: Weight
    stored: Tensor | None
    trained: tuple[_Trained, ...]


class TensorMerger:
    """Makes every tensor of the output and gives it to the writer."""

    def __init__(self, plan: MergePlan, writer: ShardWriter, device: torch.device, progress: Callback) -> None:
        assert plan.checkpoint.root is not None, "the plan of a dry run cannot be run"
        self.plan = plan
        self.root = plan.checkpoint.root
        self.writer = writer
        self.progress = progress
        self.device = device
        self.projections = Projections(plan)
        self.updates: dict[tuple[tuple[int, str], ...], list[CategoryUpdate]] = {}  #: of the current group
        self.unchanged: list[str] = []
        self.done = 0.0
        self.total = plan.flops
        largest = max((weight.target.nbytes for weight in plan.weights), default=0)
        self._read_buffers = _ring(stream.READ_AHEAD + 2, largest)
        widest = max((self._output_bytes(weight) for weight in plan.weights), default=0)
        self._write_buffer = torch.empty(widest, dtype=torch.uint8)

    def run(self) -> None:
        """Write all tensors that are not finished."""
        waiting = [w for w in self.plan.weights if self._name(w) not in self.writer.digests]
        self._advance(self.total - sum(flops(w) for w in waiting))
        behind, copies = _Behind(), _Behind()
        try:
            for name, info in self.plan.copied.items():
                if name not in self.writer.digests:
                    copies.add(partial(self._copy, name, info))
            for name, (source, info) in self.plan.replaced.items():
                if name not in self.writer.digests:
                    self._replace(name, source, info)
            tasks = [partial(self._read, weight, next(self._read_buffers)) for weight in waiting]
            for task in stream.prefetch(tasks):
                self._merge(task, behind)
                self._advance(flops(task.weight))
            behind.finish()
            copies.finish()
        finally:
            behind.abandon()
            copies.abandon()

    def _advance(self, amount: float) -> None:
        self.done += amount
        self.progress(Progress("merging", self.done, self.total))

    def _name(self, weight: Weight) -> str:
        return self.plan.names[weight.target.tensor.name]

    def _output_bytes(self, weight: Weight) -> int:
        bits = codec.DTYPE_BITS[self.plan.dtypes[self._name(weight)]]
        return weight.target.m * weight.target.n * bits // 8

    def _read(self, weight: Weight, buffer: Tensor) -> _Task:
        trained = tuple(self._read_part(part, weight) for part in weight.parts)
        stored = stream.read_tensor(self.root, weight.target.tensor, buffer=buffer)
        self._check_digest(weight, stored)
        touched = tuple(item for item in trained if not item.untouched)
        return _Task(weight, stored if touched else None, touched)

    def _read_part(self, part: Part, weight: Weight) -> _Trained:
        adapter, trained, basis = part.source.adapter, part.trained, part.source.basis
        scales = adapter.tensor(trained.scales)
        values = adapter.tensor(trained.values) if trained.values is not None else scales.new_zeros(0)
        for info, tensor in ((trained.scales, scales), (trained.values, values)):
            if not _all_finite(tensor):
                raise InvalidInput(f"{adapter.name}: tensor {info and info.name} holds NaN or Inf")
        base_scales = None
        if trained.base_scales is not None:
            base_scales = adapter.tensor(trained.base_scales)
        elif adapter.provenance is not None and basis is not None:
            name = f"lambda.{weight.target.module}"
            if name not in basis.header.tensors:
                raise InvalidInput(f"{basis.path}: no {name}, which {adapter.name} needs")
            base_scales = basis.tensor(name)
        return _Trained(part, scales, values, base_scales)

    def _check_digest(self, weight: Weight, stored: Tensor) -> None:
        """Compare the base's bytes with what basis or adapter say they were made from."""
        recorded = [
            (where, digest)
            for part in weight.parts
            for where, digest in _recorded_digests(part.source, weight.target.module)
        ]
        found = stream.digest(stored) if recorded else ""
        for where, digest in recorded:
            if digest != found:
                info = weight.target.tensor
                raise InvalidInput(
                    f"{self.root / info.file}: tensor {info.name} is not the one that {where} was made from (digests "
                    "differ); give that base"
                )

    def _merge(self, task: _Task, behind: _Behind) -> None:
        """Compute one weight and have it written."""
        name = self._name(task.weight)
        info = task.weight.target.tensor
        if task.stored is None:
            self.unchanged.append(name)
            behind.add(partial(self._copy, name, info))
            return
        dtype = stream.TORCH_DTYPES[self.plan.dtypes[name]]
        transposed = task.weight.target.transposed
        W = task.stored.T if transposed else task.stored
        out = self._write_buffer[: self._output_bytes(task.weight)].view(dtype).view(info.shape)
        rows_first = out.T if transposed else out
        for rows, block in self._updated(W, task):
            behind.finish()  # writing what was in the buffer before
            rows_first[rows].copy_(block)
        if not _all_finite(out):
            stream.check_finite(task.stored, info.name, str(self.root / info.file))
            cause = "the adapter's values are too large, or it belongs to another base"
            raise InvalidInput(f"{name}: the merged weight holds NaN or Inf in {str(dtype)[6:]}; {cause}")
        behind.add(partial(self.writer.write, name, [stream.tensor_bytes(out)]))

    def _updated(self, W: Tensor, task: _Task) -> Blocks:
        """Rows of W + Σ s (W' − W), not rounded yet."""
        updates = dict(zip(task.weight.parts, self._updates_of(task.weight), strict=True))
        first = task.trained[0]
        if len(task.trained) == 1 and first.reconstructs and first.part.source.scale == 1:
            yield from updates[first.part].reconstruct(W, first.scales, first.values)
            return
        wide = W.dtype == torch.float64 or any(update.work == torch.float64 for update in updates.values())
        dtype = torch.float64 if wide else torch.float32
        kept = 1 - sum(item.part.source.scale for item in task.trained if item.reconstructs)
        for blocks in zip(*(_change(updates[item.part], W, item) for item in task.trained), strict=True):
            rows = blocks[0][0]
            total = W[rows].to(self.device, dtype) * kept
            for (_, block), item in zip(blocks, task.trained, strict=True):
                total.add_(block, alpha=item.part.source.scale)
            yield rows, total

    def _updates_of(self, weight: Weight) -> list[CategoryUpdate]:
        """V and pattern of each of the weight's adapters, kept while weights of the same group follow."""
        if weight.group not in self.updates:
            self.updates.clear()
            dtype = stream.TORCH_DTYPES[weight.target.tensor.dtype]
            self.updates[weight.group] = [
                CategoryUpdate(*self.projections.of(part.source, part.trained.category, dtype), self.device)
                for part in weight.parts
            ]
        return self.updates[weight.group]

    def _replace(self, name: str, source: Source, info: TensorInfo) -> None:
        tensor = source.adapter.tensor(info)
        converted = tensor.to(stream.TORCH_DTYPES[self.plan.dtypes[name]])
        if not _all_finite(converted):
            raise InvalidInput(f"{source.adapter.name}: tensor {info.name} holds NaN or Inf, or has them as {name}")
        self.writer.write(name, [stream.tensor_bytes(converted.contiguous())])

    def _copy(self, name: str, info: TensorInfo) -> None:
        self.writer.write(name, self._converted(info, self.plan.dtypes[name]))

    def _converted(self, info: TensorInfo, dtype: str) -> Iterator[Any]:
        """The base's tensor, piece by piece, in the dtype."""
        if info.data is not None or info.stride is not None:
            tensor = stream.read_tensor(self.root, info).contiguous()
            pieces: Iterator[Any] = iter([stream.tensor_bytes(tensor)])
        else:
            pieces = codec.read_chunks(self.root / info.file, info.offset, info.nbytes)
        if dtype == info.dtype:
            yield from pieces
            return
        for piece in pieces:
            before = torch.frombuffer(piece, dtype=stream.TORCH_DTYPES[info.dtype])
            after = before.to(stream.TORCH_DTYPES[dtype])
            if not torch.isfinite(after).equal(torch.isfinite(before)):
                raise InvalidInput(f"{self.root / info.file}: tensor {info.name} is too large for {dtype}")
            yield stream.tensor_bytes(after)


def _change(update: CategoryUpdate, W: Tensor, trained: _Trained) -> Blocks:
    if trained.reconstructs:
        return update.reconstruct(W, trained.scales, trained.values)
    return update.delta(W, trained.scales, trained.values, trained.base_scales)


def _recorded_digests(source: Source, module: str) -> Iterator[tuple[str, str]]:
    adapter: Adapter = source.adapter
    if adapter.provenance is not None and module in adapter.provenance.base:
        yield adapter.name, adapter.provenance.base[module]
    if source.basis is not None:
        for record in source.basis.metadata.modules:
            if record.name == module:
                yield str(source.basis.path), record.digest


def _all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or Inf, without a mask of the tensor's size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tuple(torch.aminmax(tensor)))).all())


def _ring(count: int, nbytes: int) -> Iterator[Tensor]:
    """Buffers that are used in turn: fresh memory would cost page faults."""
    return itertools.cycle([torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)])


class _Behind:
    """A thread that does what it is given, in order, while the caller goes on."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "frodctl-write")
        self.futures: list[Future[None]] = []

    def add(self, work: Callable[[], None]) -> None:
        self.futures.append(self.pool.submit(work))

    def finish(self) -> None:
        """Until all are done; raises what went wrong."""
        while self.futures:
            self.futures.pop(0).result()

    def abandon(self) -> None:
        """Drop what has not begun."""
        self.pool.shutdown(cancel_futures=True)

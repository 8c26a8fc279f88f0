"""Running the plan of a decomposition, category by category."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

import frodctl
from frodctl.checkpoint import codec, files, sink
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.source import Source
from frodctl.checkpoint.targets import Target
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.formats import basis_file
from frodctl.jobs.columns import Column
from frodctl.jobs.decompose.card import model_card
from frodctl.jobs.decompose.plan import SHAPE_COLUMNS, CategoryPlan, DecomposePlan
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.push import Written, push_file
from frodctl.jobs.resources import choose_device, memory_errors, require_memory
from frodctl.pipeline import AHEAD, in_order

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.joint_basis import Held, JointBasis
    from frodctl.method.kernels import Kernels


@dataclass(frozen=True)
class Outcome:
    """What came of one category."""

    precision: str  #: of the products: float32 or float64
    rank: int  #: directions of V that are not null
    condition_number: float  #: of the stacked weights, on their range
    tau_min: float
    tau_max: float
    rms_singular_value: float  #: of the stacked weights
    seconds: float


@dataclass(frozen=True)
class CategoryResult:
    """A finished category."""

    plan: CategoryPlan
    outcome: Outcome
    resumed: bool  #: taken from an earlier run

    def row(self) -> dict[str, Json]:
        """The category as a line of a table."""
        return self.plan.row() | asdict(self.outcome) | {"resumed": self.resumed}


@dataclass(frozen=True)
class DecomposeResult(Written):
    """A finished decomposition."""

    columns: ClassVar[tuple[Column, ...]] = (
        *SHAPE_COLUMNS,
        Column("flops"),
        Column("precision"),
        Column("rank", "rank"),
        Column("condition_number", "cond", "figure"),
        Column("tau_min", "τ", "range"),
        Column("tau_max"),
        Column("seconds", "time", "seconds"),
        Column("resumed"),
        Column("rms_singular_value"),
        Column("trainable_per_token"),
    )

    plan: DecomposePlan
    categories: tuple[CategoryResult, ...]
    output: Path
    output_bytes: int
    device: str
    seconds: float

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan's figures and what came of them."""
        return (
            self.profile_dict()
            | self.pushed_dict()
            | self.plan.as_dict()
            | {
                "output_bytes": self.output_bytes,
                "device": self.device,
                "seconds": self.seconds,
                "categories": [category.row() for category in self.categories],
            }
        )


def run_decompose(
    plan: DecomposePlan, progress: Callback = silent, profile: Unprofiled = UNPROFILED
) -> DecomposeResult:
    """Carry out a plan of `plan_decompose`. Errors are those of `decompose`."""
    started = time.perf_counter()
    if plan.checkpoint.source is None:
        raise UsageError(f"{plan.checkpoint.model}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        kernels = profile.kernels(choose_device(plan.options.device))
    require_memory(plan.most_memory_bytes, kernels.name)
    order = _order(plan)
    with (
        sink.Staging(plan.output, _job_key(plan, kernels), plan.check_output, resume=plan.options.resume) as staging,
        _source(plan, order, progress) as source,
    ):
        needed = 2 * plan.output_bytes - staging.finished_bytes() + plan.parked_bytes
        sink.require_disk(staging.folder, needed)
        parts = _Parts(plan, source, staging, kernels, progress, profile)
        finished = {number: parts.finish(number) for number in order}
        results = tuple(finished[number] for number in sorted(finished))
        progress(Progress(f"writing {plan.output}"))
        plan = plan.settled([result.outcome.rms_singular_value for result in results])
        results = tuple(replace(r, plan=c) for r, c in zip(results, plan.categories, strict=True))
        metadata = plan.metadata(parts.tensors, parts.modules)
        paths = [parts.path(i) for i in range(len(results))]

        def write(file: IO[bytes]) -> None:
            basis_file.write_basis(file, paths, metadata)
            file.flush()
            with profile.step("checking the file"):
                _check_written(Path(file.name), parts.tensors)

        with profile.step("writing"):
            staging.publish(write)
    size = files.stat(plan.output).st_size
    result = DecomposeResult(plan, results, plan.output, size, kernels.name, time.perf_counter() - started)
    return push_file(result, plan.output, plan.options, model_card(plan), progress)


def _order(plan: DecomposePlan) -> list[int]:
    """The numbers of the categories, those first that wait for the fewest files."""
    here = {path.name for path in plan.checkpoint.files()}
    missing = [len({target.tensor.file for target in c.targets} - here) for c in plan.categories]
    return sorted(range(len(missing)), key=missing.__getitem__)


def _source(plan: DecomposePlan, order: Sequence[int], progress: Callback) -> AbstractContextManager[Source]:
    """What the weights are read from: files that are here, or come in the order of the categories, or the Hub."""
    if plan.checkpoint.repository is None or plan.options.stream:
        assert plan.checkpoint.source is not None
        return nullcontext(plan.checkpoint.source)
    from frodctl.checkpoint.remote import Downloads

    targets = [target for number in order for target in plan.categories[number].targets]
    tensors = [part for target in targets for part in target.tensor.parts]
    return Downloads(plan.checkpoint.repository, tensors, lambda text: progress(Progress(text)))


class _Parts:
    """The finished categories, each a safetensors file in the staging folder."""

    def __init__(
        self,
        plan: DecomposePlan,
        source: Source,
        staging: sink.Staging,
        kernels: Kernels,
        progress: Callback,
        profile: Unprofiled,
    ) -> None:
        self.plan = plan
        self.source = source
        self.staging = staging
        self.kernels = kernels
        self.progress = progress
        self.profile = profile
        self.done = 0.0
        self.total = plan.flops
        self.tensors: dict[str, str] = {}  #: digest of each tensor of the file
        self.modules: dict[str, str] = {}  #: digest of each module's weight

    def path(self, number: int) -> Path:
        return self.staging.path(f"{number:04d}.safetensors")

    def finish(self, number: int) -> CategoryResult:
        """Take the category from an earlier run, or compute and keep it."""
        category = self.plan.categories[number]
        weights = _Weights(self.source, category.targets, self.profile)
        record = _read_part(self.path(number), self.plan.specs(category), weights)
        resumed = record is not None
        if record is None:
            record = self._compute(number, category)
        else:
            self._advance(category, category.flops)
        self.tensors.update(record["tensors"])
        self.modules.update(record["modules"])
        return CategoryResult(category, Outcome(**record["outcome"]), resumed)

    def _compute(self, number: int, category: CategoryPlan) -> dict[str, Json]:
        with self.profile.step("start and imports"):
            from frodctl.checkpoint import stream
            from frodctl.method.joint_basis import (
                NonFiniteWeights,
                NotPositiveDefinite,
                Unrepresentable,
                in_memory,
                joint_basis,
            )

        options, memory = self.plan.options, self.plan.memory(category)
        started = time.perf_counter()
        begun = self.done
        layers = _Weights(self.source, category.targets, self.profile)
        try:
            with memory_errors(self.kernels.name), self.profile.step("other arithmetic"):
                basis = joint_basis(
                    layers,
                    alpha=options.alpha,
                    precision=options.precision,
                    dtype=options.dtype,
                    kernels=self.kernels,
                    cache_bytes=memory.cache_bytes,
                    park=self._park if memory.parked else in_memory,
                    advance=lambda flops: self._advance(category, flops),
                )
        except NonFiniteWeights:
            layers.check_finite()
            raise
        except Unrepresentable as error:
            where = category.name if error.layer is None else category.targets[error.layer].module
            raise FrodctlError(f"{where}: {error}") from None
        except NotPositiveDefinite as error:
            advice = (
                "try `precision=float64` or a larger `alpha`"
                if options.precision == "float32"
                else "try a larger `alpha`"
            )
            raise FrodctlError(f"{category.name}: {error}; {advice}") from None
        outcome = Outcome(
            precision=basis.precision,
            rank=basis.rank,
            condition_number=basis.condition,
            tau_min=float(basis.tau[0]),
            tau_max=float(basis.tau[-1]),
            rms_singular_value=basis.rms_singular_value,
            seconds=time.perf_counter() - started,
        )
        tensors = _tensors(category, basis)
        with self.profile.step("digests"):
            digests = {name: stream.digest(tensor) for name, tensor in tensors.items()}
        record = {"tensors": digests, "modules": layers.digests, "outcome": asdict(outcome)}
        specs = codec.layout(self.plan.specs(category))
        chunks = (stream.tensor_bytes(tensors[spec.name]) for spec in specs)
        text = json.dumps(record)
        metadata = {"record": text, "digest": _text_digest(text)}
        with self.profile.step("writing"):
            self.staging.write(self.path(number).name, lambda file: codec.write_file(file, specs, metadata, chunks))
        self._advance(category, begun + category.flops - self.done)
        return record

    def _park(self, matrix: Array) -> Held:
        """Have a matrix wait beside the finished categories."""
        from frodctl.checkpoint.parking import park

        back = park(self.kernels.get(matrix), self.staging.folder)
        return lambda: self.kernels.put(back())

    def _advance(self, category: CategoryPlan, flops: float) -> None:
        self.done += flops
        self.progress(Progress(category.name, self.done, self.total))


def _read_part(path: Path, specs: Sequence[codec.TensorSpec], weights: _Weights) -> dict[str, Json] | None:
    """The record of a finished category; None where there is none, a damaged one, or one made from other weights."""
    try:
        header = codec.read_header(path)
        text = header.metadata["record"]
        record: dict[str, Json] = json.loads(text)
        whole = (
            header.metadata["digest"] == _text_digest(text)
            and {spec for spec, _ in header.tensors.values()} == set(specs)
            and _file_digests(path) == record["tensors"]
        )
        return record if whole and weights.read_digests() == record["modules"] else None
    except (FileNotFoundError, InvalidInput, KeyError, ValueError):
        return None


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digests(path: Path) -> dict[str, str]:
    """``sha256:…`` of each tensor in a file, as `stream.digest` gives it."""
    digests = {}
    for name, (spec, offset) in codec.read_header(path).tensors.items():
        sha256 = hashlib.sha256()
        for chunk in codec.read_chunks(path, offset, spec.nbytes):
            sha256.update(chunk)
        digests[name] = f"sha256:{sha256.hexdigest()}"
    return digests


def _check_written(path: Path, digests: Mapping[str, str]) -> None:
    """Read a file again that is about to be published."""
    differing = sorted(dict(digests.items() ^ _file_digests(path).items()))
    if differing:
        raise FrodctlError(
            f"{path}: tensor {differing[0]} reads back differently from what was computed; check the disk"
        )


def _tensors(category: CategoryPlan, basis: JointBasis) -> Mapping[str, HostArray]:
    tensors = {f"V.{category.name}": basis.V, f"tau.{category.name}": basis.tau}
    for target, scale in zip(category.targets, basis.scales, strict=True):
        tensors[f"lambda.{target.module}"] = scale
    return tensors


class _Weights:
    """The weights of a category, read from their source at each walk; digested at the first."""

    def __init__(self, source: Source, targets: tuple[Target, ...], profile: Unprofiled) -> None:
        self.source = source
        self.targets = targets
        self.profile = profile
        self.digests: dict[str, str] = {}
        self.buffers: list[HostArray] | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(target.m, target.n) for target in self.targets]

    def read(self, numbers: Sequence[int]) -> Iterator[HostArray]:
        """The weights with these numbers, each valid until the next."""
        return self.profile.waiting("waiting for weights", in_order(self._reads(numbers)))

    def read_digests(self) -> dict[str, str]:
        """The digests of all, of which none is kept."""
        for _ in self.read(range(len(self.targets))):
            pass
        return self.digests

    def check_finite(self) -> None:
        """Raise `InvalidInput` that names the first weight that holds NaN or Inf."""
        from frodctl.checkpoint.stream import check_finite

        for target, weight in zip(self.targets, self.read(range(len(self.targets))), strict=True):
            check_finite(weight, target.tensor.name, self.source.where(target.tensor))

    def _reads(self, numbers: Sequence[int]) -> Iterator[Callable[[], HostArray]]:
        """What reads each of them, once there is something to read."""
        for number, buffer in zip(numbers, itertools.cycle(self._buffers()), strict=False):
            for part in self.targets[number].tensor.parts:
                self.source.wait(part)
            yield partial(self._read, self.targets[number], buffer)

    def _buffers(self) -> list[HostArray]:
        """Memory to read into: for the weight in use and those ahead of it."""
        import numpy as np

        if self.buffers is None:
            largest = max(target.nbytes for target in self.targets)
            self.buffers = [np.empty(largest, np.uint8) for _ in range(AHEAD + 1)]
        return self.buffers

    def _read(self, target: Target, buffer: HostArray) -> HostArray:
        from frodctl.checkpoint import stream

        with self.profile.step("reading"):
            weight = stream.read_tensor(self.source, target.stored, buffer)
        if target.module not in self.digests:
            with self.profile.step("digests"):
                self.digests[target.module] = stream.digest(weight)
        return weight.T if target.transposed else weight


def _job_key(plan: DecomposePlan, kernels: Kernels) -> str:
    """A digest of everything that the output's bytes depend on but the weights' values."""
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": kernels.identity(),
        "weights": _weights_key(plan),
        "options": [plan.options.alpha, plan.options.precision, plan.options.dtype, plan.options.cache_size],
        "memory_limit": plan.options.memory_limit,
        "categories": [
            [c.name, [(t.module, t.tensor.file, t.tensor.offset, t.transposed) for t in c.targets]]
            for c in plan.categories
        ],
    }
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]


def _weights_key(plan: DecomposePlan) -> list[Json]:
    """What tells the weights' files from others: on the Hub a commit, here the times of the files."""
    root, revision = plan.checkpoint.root, plan.checkpoint.revision
    if root is None or revision is not None:
        return [plan.checkpoint.model, plan.options.subfolder, revision]
    names = sorted({part.file for c in plan.categories for t in c.targets for part in t.tensor.parts})
    states = [files.stat(root / name) for name in names]
    return [str(root.resolve()), [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True)]]

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
from frodctl.jobs.decompose.plan import SHAPE_COLUMNS, CategoryPlan, DecomposePlan, Memory
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.push import Written, push_file
from frodctl.jobs.ranks import BY_ITSELF, Launch, World, staged
from frodctl.jobs.resources import is_out_of_memory, memory_errors, take_devices
from frodctl.jobs.staging import staging_of
from frodctl.pipeline import AHEAD, in_order

if TYPE_CHECKING:
    from frodctl.arrays import Array, HostArray
    from frodctl.method.joint_basis import Held, JointBasis
    from frodctl.method.kernels import Kernels
    from frodctl.method.ranks import Ranks


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
    device: str  #: that it was computed on


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

    _columns: ClassVar[tuple[Column, ...]] = (
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
        Column("memory_bytes"),
        Column("ranks"),
    )

    plan: DecomposePlan
    categories: tuple[CategoryResult, ...]
    output: Path
    output_bytes: int
    device: str  #: or devices, where a GPU was too small for some categories
    seconds: float

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of its rows."""
        several = len({category.outcome.device for category in self.categories}) > 1
        return (*self._columns, Column("device", "device", "text") if several else Column("device"))

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
                "categories": [
                    planned | category.row()
                    for planned, category in zip(self.plan.rows(), self.categories, strict=True)
                ],
            }
        )


def run_decompose(
    plan: DecomposePlan,
    progress: Callback = silent,
    profile: Unprofiled = UNPROFILED,
    launch: Launch = BY_ITSELF,
) -> DecomposeResult:
    """Carry out a plan of `plan_decompose`, as one of its ranks. Errors are those of `decompose`."""
    started = time.perf_counter()
    if plan.checkpoint.source is None:
        raise UsageError(f"{plan.checkpoint.model}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        needs = [category.most_memory_bytes(plan.memory(category)) for category in plan.categories]
        taken = take_devices(plan.options.device, progress, needs, launch)
        kernels = [profile.kernels(each) for each in taken]
    with profile.step("start and imports"):
        world = launch.world

    def open_staging() -> sink.Staging:
        return staging_of(plan, _job_key(plan, kernels), progress)

    order = _order(plan)
    with (
        staged(world, plan.output, open_staging) as staging,
        _source(plan, order, world.number, progress) as source,
    ):
        if isinstance(staging, sink.Staging):
            needed = 2 * plan.output_bytes - staging.finished_bytes() + plan.parked_bytes
            sink.require_disk(staging.folder, needed)
        parts = _Parts(plan, source, staging, kernels, world, progress, profile)
        results = parts.finish(order)
        plan = plan.settled([result.outcome.rms_singular_value for result in results])
        results = tuple(replace(r, plan=c) for r, c in zip(results, plan.categories, strict=True))
        if isinstance(staging, sink.Staging):
            progress(Progress(f"writing {plan.output}"))
            with profile.step("writing"):
                _publish(plan, staging, parts, profile)
        world.gather(None)
        size = files.stat(plan.output).st_size
        result = DecomposeResult(plan, results, plan.output, size, _devices(results), time.perf_counter() - started)
        if isinstance(staging, sink.Staging):
            result = push_file(result, staging, plan.options, model_card(plan), progress)
        return result


def _publish(plan: DecomposePlan, staging: sink.Staging, parts: _Parts, profile: Unprofiled) -> None:
    """Put the finished categories together."""
    metadata = plan.metadata(parts.tensors, parts.modules)
    paths = [parts.path(i) for i in range(len(plan.categories))]

    def write(file: IO[bytes]) -> None:
        basis_file.write_basis(file, paths, metadata)
        file.flush()
        with profile.step("checking the file"):
            _check_written(Path(file.name), parts.tensors)

    staging.publish(write, unsent=plan.options.pushes)


def _order(plan: DecomposePlan) -> list[int]:
    """The numbers of the categories, those first that wait for the fewest files; with several ranks the longest."""
    if plan.ranks > 1:  # who have not all the same files, and begin what they divide together
        return sorted(range(len(plan.categories)), key=lambda i: -plan.categories[i].flops_of_ranks)
    here = {path.name for path in plan.checkpoint.files()}
    missing = [len({target.tensor.file for target in c.targets} - here) for c in plan.categories]
    return sorted(range(len(missing)), key=missing.__getitem__)


def _source(plan: DecomposePlan, order: Sequence[int], rank: int, progress: Callback) -> AbstractContextManager[Source]:
    """What the weights are read from: files that are here, or come in the order of the categories, or the Hub."""
    if plan.checkpoint.repository is None or plan.options.stream:
        assert plan.checkpoint.source is not None
        return nullcontext(plan.checkpoint.source)
    from frodctl.checkpoint.remote import Downloads

    mine = [plan.categories[number] for number in order if rank in plan.categories[number].ranks]
    tensors = [part for category in mine for i in category.own(rank) for part in category.targets[i].tensor.parts]
    return Downloads(plan.checkpoint.repository, tensors, lambda text: progress(Progress(text)))


class _Parts:
    """The finished categories, each a safetensors file in the staging folder."""

    def __init__(
        self,
        plan: DecomposePlan,
        source: Source,
        staging: sink.Pieces,
        kernels: Sequence[Kernels],
        world: World,
        progress: Callback,
        profile: Unprofiled,
    ) -> None:
        self.plan = plan
        self.source = source
        self.staging = staging
        self.kernels = kernels  #: by category
        self.progress = progress
        self.profile = profile
        self.world = world
        self.groups = {members: world.group(members) for members in dict.fromkeys(c.ranks for c in plan.categories)}
        self.done = 0.0
        self.total = sum(_flops_of_rank(c) for c in plan.categories if world.number in c.ranks)
        self.tensors: dict[str, str] = {}  #: digest of each tensor of the file
        self.modules: dict[str, str] = {}  #: digest of each module's weight

    def path(self, number: int) -> Path:
        return self.staging.path(f"{number:04d}.safetensors")

    def finish(self, order: Sequence[int]) -> tuple[CategoryResult, ...]:
        """Take the categories from an earlier run, or compute and keep them; all are known to all ranks."""
        own = {number: self._finish(number, group) for number in order if (group := self._group(number))}
        found = {number: made for each in self.world.gather(own) for number, made in each.items()}
        results = []
        for number, category in enumerate(self.plan.categories):
            record, resumed = found[number]
            self.tensors.update(record["tensors"])
            self.modules.update(record["modules"])
            results.append(CategoryResult(category, Outcome(**record["outcome"]), resumed))
        return tuple(results)

    def _group(self, number: int) -> Ranks | None:
        return self.groups[self.plan.categories[number].ranks]

    def _finish(self, number: int, ranks: Ranks) -> tuple[dict[str, Json], bool]:
        """The record of a category, and whether it is of an earlier run."""
        category = self.plan.categories[number]
        weights = _Weights(self.source, category.targets, self.kernels[number], self.profile, ranks)
        record = _read_part(self.path(number), self.plan.specs(category), weights)
        if record is None:
            return self._compute(number, category, ranks), False
        self._advance(category, _flops_of_rank(category))
        return record, True

    def _compute(self, number: int, category: CategoryPlan, ranks: Ranks) -> dict[str, Json]:
        with self.profile.step("start and imports"):
            from frodctl.checkpoint import stream
            from frodctl.method.joint_basis import NonFiniteWeights, NotPositiveDefinite, Unrepresentable

        options = self.plan.options
        started = time.perf_counter()
        begun = self.done
        kernels = self.kernels[number]
        layers = _Weights(self.source, category.targets, kernels, self.profile, ranks)
        try:
            with memory_errors(kernels.name), self.profile.step("other arithmetic"):
                basis = self._joint_basis(category, layers)
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
            device=kernels.name,
        )
        tensors = _tensors(category, basis)
        with self.profile.step("digests"):
            digests = {name: stream.digest(tensor) for name, tensor in tensors.items()}
        record = {"tensors": digests, "modules": layers.all_digests(), "outcome": asdict(outcome)}
        specs = codec.layout(self.plan.specs(category))
        chunks = (stream.tensor_bytes(tensors[spec.name]) for spec in specs)
        text = json.dumps(record)
        metadata = {"record": text, "digest": _text_digest(text)}
        if ranks.number == 0:
            with self.profile.step("writing"):
                self.staging.write(self.path(number).name, lambda file: codec.write_file(file, specs, metadata, chunks))
        self._advance(category, begun + _flops_of_rank(category) - self.done)
        return record

    def _joint_basis(self, category: CategoryPlan, layers: _Weights) -> JointBasis:
        """As planned; where a GPU has no room for that after all, once more with as little memory as can be."""
        begun = self.done
        try:
            return self._joint_basis_in(self.plan.memory(category), category, layers)
        except Exception as error:
            if layers.kernels.name == "cpu" or layers.ranks.count > 1 or not is_out_of_memory(error):
                raise
        self.done = begun
        self.progress(
            Progress(f"out of memory on {layers.kernels.name}: {category.name} again, with what waits on disk")
        )
        return self._joint_basis_in(Memory(0, parked=True), category, layers)

    def _joint_basis_in(self, memory: Memory, category: CategoryPlan, layers: _Weights) -> JointBasis:
        from frodctl.method.joint_basis import in_memory, joint_basis

        return joint_basis(
            layers,
            alpha=self.plan.options.alpha,
            precision=self.plan.options.precision,
            dtype=self.plan.options.dtype,
            kernels=layers.kernels,
            cache_bytes=memory.cache_bytes,
            park=partial(self._park, layers.kernels) if memory.parked else in_memory,
            advance=lambda flops: self._advance(category, flops),
            ranks=layers.ranks,
        )

    def _park(self, kernels: Kernels, matrix: Array) -> Held:
        """Have a matrix wait beside the finished categories."""
        from frodctl.checkpoint.parking import park

        back = park(kernels.get(matrix), self.staging.folder)
        return lambda: kernels.put(back())

    def _advance(self, category: CategoryPlan, flops: float) -> None:
        self.done += flops
        self.progress(Progress(category.name, self.done, self.total))


def _flops_of_rank(category: CategoryPlan) -> float:
    """Of each rank's part, about."""
    return category.flops / len(category.ranks)


def _read_part(path: Path, specs: Sequence[codec.TensorSpec], weights: _Weights) -> dict[str, Json] | None:
    """The record of a finished category; None where there is none, a damaged one, or one made from other weights."""
    [record] = weights.ranks.share([_record_of(path, specs)] if weights.ranks.number == 0 else None)
    return record if record is not None and weights.read_digests() == record["modules"] else None


def _record_of(path: Path, specs: Sequence[codec.TensorSpec]) -> dict[str, Json] | None:
    """What a finished category says of itself, if the file is whole."""
    try:
        header = codec.read_header(path)
        text = header.metadata["record"]
        record: dict[str, Json] = json.loads(text)
        whole = (
            header.metadata["digest"] == _text_digest(text)
            and {spec for spec, _ in header.tensors.values()} == set(specs)
            and _file_digests(path) == record["tensors"]
            and isinstance(record["modules"], dict)
        )
        return record if whole else None
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
    """The weights of a category, each read by one of its ranks from the source at each walk; digested at the first."""

    def __init__(
        self, source: Source, targets: tuple[Target, ...], kernels: Kernels, profile: Unprofiled, ranks: Ranks
    ) -> None:
        self.source = source
        self.targets = targets
        self.kernels = kernels
        self.profile = profile
        self.ranks = ranks
        self.own = ranks.own(len(targets))
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
        for _ in self.read(self.own):
            pass
        return self.all_digests()

    def all_digests(self) -> dict[str, str]:
        """Every rank's, once all were read."""
        return {module: digest for each in self.ranks.gather(self.digests) for module, digest in each.items()}

    def check_finite(self) -> None:
        """Raise `InvalidInput` that names the first weight that holds NaN or Inf."""
        found = next((text for text in self.ranks.gather(self._not_finite()) if text), "")
        if found:
            raise InvalidInput(found)

    def _not_finite(self) -> str:
        from frodctl.checkpoint.stream import check_finite

        for number, weight in zip(self.own, self.read(self.own), strict=True):
            tensor = self.targets[number].tensor
            try:
                check_finite(weight, tensor.name, self.source.where(tensor))
            except InvalidInput as error:
                return str(error)
        return ""

    def _reads(self, numbers: Sequence[int]) -> Iterator[Callable[[], HostArray]]:
        """What reads each of them, once there is something to read."""
        for number, buffer in zip(numbers, itertools.cycle(self._buffers()), strict=False):
            for part in self.targets[number].tensor.parts:
                self.source.wait(part)
            yield partial(self._read, self.targets[number], buffer)

    def _buffers(self) -> list[HostArray]:
        """Memory to read into: for the weight in use and those ahead of it."""
        if self.buffers is None:
            largest = max(target.nbytes for target in self.targets)
            self.buffers = [self.kernels.buffer(largest) for _ in range(AHEAD + 1)]
        return self.buffers

    def _read(self, target: Target, buffer: HostArray) -> HostArray:
        from frodctl.checkpoint import stream

        with self.profile.step("reading"):
            weight = stream.read_tensor(self.source, target.stored, buffer)
        if target.module not in self.digests:
            with self.profile.step("digests"):
                self.digests[target.module] = stream.digest(weight)
        return weight.T if target.transposed else weight


def _devices(results: Sequence[CategoryResult]) -> str:
    return " and ".join(dict.fromkeys(result.outcome.device for result in results))


def _job_key(plan: DecomposePlan, kernels: Sequence[Kernels]) -> str:
    """A digest of everything that the output's bytes depend on but the weights' values."""
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": [each.identity() for each in kernels],
        "weights": _weights_key(plan),
        "options": [plan.options.alpha, plan.options.precision, plan.options.dtype, plan.options.cache_size],
        "memory_limit": plan.options.memory_limit,
        "categories": [
            [c.name, len(c.ranks), [(t.module, t.tensor.file, t.tensor.offset, t.transposed) for t in c.targets]]
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

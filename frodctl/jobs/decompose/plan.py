"""The plan of a decomposition: what will be done, settled from headers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import frodctl
from frodctl import values
from frodctl.checkpoint import codec, names, siblings, sink, targets
from frodctl.checkpoint.experts import share_per_token
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import MODEL_DTYPES, Checkpoint
from frodctl.errors import OutOfResources, UsageError
from frodctl.formats import basis_file
from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.columns import Column
from frodctl.jobs.decompose.options import DecomposeOptions
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.ranks import RANK_BYTES
from frodctl.jobs.resources import PROCESS_BYTES, choose_device, measured_rates
from frodctl.method import budget, cost
from frodctl.method.ranks import divided, shares
from frodctl.pipeline import AHEAD
from frodctl.values import PathLike


@dataclass(frozen=True)
class Memory:
    """How the decomposition of a category uses memory."""

    cache_bytes: int  #: for Gram matrices that are kept
    parked: bool = False  #: whether R and its inverse wait on disk while they are not needed


@dataclass(frozen=True)
class CategoryPlan:
    """One category: the weights that will share a basis."""

    name: str
    targets: tuple[targets.Target, ...] = field(repr=False)
    sparsity: float | None  #: None until the spectra that it depends on are known
    share_per_token: float | None = 1.0  #: of the weights that take part in a token; None: unknown
    ranks: tuple[int, ...] = (0,)  #: the processes that divide its layers among them
    process_bytes: int = PROCESS_BYTES  #: what each takes before any weight

    @property
    def n(self) -> int:
        return self.targets[0].n

    def own(self, rank: int) -> range:
        """The numbers of the weights that one of its ranks reads."""
        return shares(len(self.targets), len(self.ranks))[self.ranks.index(rank)]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What the weights' layers are called in their blocks: several where they share their input."""
        return tuple(dict.fromkeys(names.role(target.module).rpartition(".")[2] for target in self.targets))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) = (out_features, in_features) of each weight."""
        return [(target.m, target.n) for target in self.targets]

    @property
    def trainable_parameters(self) -> int | None:
        return None if self.sparsity is None else len(self.targets) * budget.trainable(self.n, self.sparsity)

    @property
    def trainable_per_token(self) -> int | None:
        """Those of them that take part in a token."""
        trained, share = self.trainable_parameters, self.share_per_token
        return None if trained is None or share is None else round(trained * share)

    @property
    def flops(self) -> float:
        """Floating-point operations, about."""
        return cost.flops(self.shapes)

    @property
    def flops_of_ranks(self) -> float:
        """In whose time its ranks are done with it."""
        return cost.flops_of_ranks(self.shapes, len(self.ranks))

    def memory(self, options: DecomposeOptions) -> Memory:
        """What is kept: all that the cache has room for, as far as a limit allows it, then less, then R on disk."""
        limit = options.memory_limit
        if limit is None:
            return Memory(options.cache_size)
        bare = self.most_memory_bytes(Memory(0))
        ways = [
            Memory(options.cache_size),
            Memory(min(options.cache_size, max(0, limit - bare))),
            Memory(0),
        ]
        fitting = (way for way in ways if self.most_memory_bytes(way) <= limit)
        return next(fitting, Memory(0, parked=True))

    def memory_bytes(self, memory: Memory, work: str) -> int:
        """Peak memory of the process: the arithmetic's with products of this dtype, and the weights read ahead."""
        stored = max(target.nbytes for target in self.targets)
        arithmetic = cost.memory_bytes(
            self.shapes, memory.cache_bytes, work, parked=memory.parked, ranks=len(self.ranks)
        )
        return self.process_bytes + arithmetic + (AHEAD + 1) * stored

    def most_memory_bytes(self, memory: Memory) -> int:
        """The same whichever dtype turns out to be needed."""
        return max(self.memory_bytes(memory, work) for work in ("float32", "float64"))

    def row(self) -> dict[str, Json]:
        """The category as a line of a table."""
        return {
            "category": self.name,
            "layers": len(self.targets),
            "n": self.n,
            "m_min": min(m for m, _ in self.shapes),
            "m_max": max(m for m, _ in self.shapes),
            "parameters": sum(m * n for m, n in self.shapes),
            "sparsity": self.sparsity,
            "nnz": None if self.sparsity is None else budget.nnz(self.n, self.sparsity),
            "trainable_parameters": self.trainable_parameters,
            "flops": self.flops,
            "trainable_per_token": self.trainable_per_token,
            "ranks": list(self.ranks),
        }


#: Of a plan's categories and, with more, of a result's.
SHAPE_COLUMNS = (
    Column("category", "category", "text"),
    Column("layers", "layers"),
    Column("n", "n"),
    Column("m_min"),
    Column("m_max", "m", "heights"),
    Column("parameters"),
    Column("sparsity"),
    Column("nnz"),
    Column("trainable_parameters", "trainable", "count", absent="by spectrum"),
)


@dataclass(frozen=True)
class DecomposePlan:
    """Everything that will be done, known from headers alone."""

    columns: ClassVar[tuple[Column, ...]] = (
        *SHAPE_COLUMNS,
        Column("flops", "flop", "count"),
        Column("trainable_per_token"),
        Column("memory_bytes"),
        Column("ranks"),
    )

    checkpoint: Checkpoint = field(repr=False)
    output: Path
    options: DecomposeOptions
    categories: tuple[CategoryPlan, ...]
    left_out: tuple[targets.LeftOut, ...]
    peft_collisions: tuple[str, ...]
    ranks: int = 1  #: processes that share the work
    seconds_estimate: float | None = field(default=None, compare=False)  #: of a dry run, whose device was measured

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained; at most so many where the sparsities are not settled yet."""
        counts = [category.trainable_parameters for category in self.categories]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else int(_numbers(self.checkpoint, self.options))

    @property
    def trainable_per_token(self) -> int | None:
        """Numbers that are trained and take part in a token: of experts those that a router chooses, if it is known."""
        counts = [category.trainable_per_token for category in self.categories]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def settled(self, weights: Sequence[float]) -> DecomposePlan:
        """The plan with every sparsity: in proportion to ``weights``, one for each category, where they decide."""
        if self.options.allocate == "uniform":
            return self
        layers = [(category.n, len(category.targets)) for category in self.categories]
        found = budget.allocate(layers, weights, _numbers(self.checkpoint, self.options))
        categories = [replace(c, sparsity=s) for c, s in zip(self.categories, found, strict=True)]
        return replace(self, categories=tuple(categories))

    def check_output(self, key: str | None = None) -> None:
        """Raise `UsageError` where the output must not be written, by the job ``key`` or by any."""
        force = self.options.may_replace(self.output, key)
        sink.check_output_file(self.output, self.checkpoint.files(), force=force)

    @property
    def share_input(self) -> dict[str, tuple[str, ...]]:
        """By category whose layers read the same activations in groups, what these are called."""
        return {c.name: c.layer_names for c in self.categories if len(c.layer_names) > 1}

    @property
    def output_bytes(self) -> int:
        """Size of the shared-basis file."""
        specs = codec.layout(spec for category in self.categories for spec in self.specs(category))
        metadata = self.metadata(*self._blank_digests())
        return codec.file_bytes(specs, basis_file.file_metadata(metadata))

    def _blank_digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """For `metadata`, before there are digests: placeholders as long as they will be."""
        blank = "sha256:" + "0" * 64
        modules = [target.module for category in self.categories for target in category.targets]
        tensors = [spec.name for category in self.categories for spec in self.specs(category)]
        return dict.fromkeys(tensors, blank), dict.fromkeys(modules, blank)

    def category_memory_bytes(self, category: CategoryPlan) -> int:
        """Peak resident memory of each process that has part in it, where products are as shapes tell."""
        work = cost.working_dtype(category.shapes, self.options.precision)
        return category.memory_bytes(self.memory(category), work)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of a whole process, about, where products are of the precision that shapes tell."""
        return max(self.category_memory_bytes(c) for c in self.categories)

    @property
    def most_memory_bytes(self) -> int:
        """The same where float64 turns out to be needed."""
        return max(c.most_memory_bytes(self.memory(c)) for c in self.categories)

    def rows(self) -> list[dict[str, Json]]:
        """The categories as lines of a table."""
        return [c.row() | {"memory_bytes": self.category_memory_bytes(c)} for c in self.categories]

    @property
    def parked_bytes(self) -> int:
        """What waits on disk at a time at most."""
        return max(16 * c.n**2 if self.memory(c).parked else 0 for c in self.categories)

    def memory(self, category: CategoryPlan) -> Memory:
        """How the category is to use memory."""
        return category.memory(self.options)

    def check_memory(self) -> None:
        """Raise `OutOfResources` where a limit leaves no way."""
        limit, needed = self.options.memory_limit, self.most_memory_bytes
        if limit is not None and needed > limit:
            raise OutOfResources(
                f"`memory_limit` {limit / 1e6:.0f} MB: at least {math.ceil(needed / 1e6)} MB are needed; give that, "
                "or choose fewer or narrower target modules"
            )

    @property
    def flops(self) -> float:
        return sum(category.flops for category in self.categories)

    def specs(self, category: CategoryPlan) -> list[codec.TensorSpec]:
        """The tensors that the file holds of a category."""
        modules = [target.module for target in category.targets]
        return basis_file.specs_of(category.name, category.n, MODEL_DTYPES[self.options.dtype], modules)

    def metadata(self, digests: Mapping[str, str], modules: Mapping[str, str]) -> basis_file.BasisMetadata:
        """The file's metadata, given the digests of each of its tensors and of each module's weight."""
        V_digests = {category.name: digests[f"V.{category.name}"] for category in self.categories}
        others = {name: digest for name, digest in digests.items() if not name.startswith("V.")}
        return basis_file.BasisMetadata(
            tool=f"frodctl {frodctl.__version__}",
            model=self.checkpoint.model,
            revision=self.checkpoint.revision,
            alpha=self.options.alpha,
            seed=self.options.seed,
            sparsity={category.name: category.sparsity or 0.0 for category in self.categories},
            precision=self.options.precision,
            memory_limit=self.options.memory_limit,
            V_digests=V_digests,
            modules=[
                basis_file.ModuleRecord(
                    t.module, c.name, t.layer, t.shape, t.transposed, modules[t.module], t.tensor.dtype
                )
                for c in self.categories
                for t in c.targets
            ],
            digests=others,
            peft_collisions=self.peft_collisions,
            share_input=self.share_input,
        )

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan with its modules and what was left out."""
        total = None if self.checkpoint.absent else self.checkpoint.parameters()
        metadata = self.metadata(*self._blank_digests())
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.checkpoint.model,
            "revision": self.checkpoint.revision,
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "ranks": self.ranks,
            "seconds_estimate": self.seconds_estimate,
            "alpha": self.options.alpha,
            "allocate": self.options.allocate,
            "seed": self.options.seed,
            "precision": self.options.precision,
            "dtype": self.options.dtype,
            "parameters": total,
            "trainable_parameters": self.trainable_parameters,
            "trainable_share": self.trainable_parameters / total if total else None,
            "trainable_per_token": self.trainable_per_token,
            "share_input": self.share_input,
            "peft_loadable": metadata.peft_loadable,
            "categories": self.rows(),
            "modules": [
                {key: value for key, value in asdict(record).items() if key != "digest"}
                for record in metadata.modules
            ],
            "left_out": [asdict(item) for item in self.left_out],
        }  # fmt: skip


def plan_decompose(
    model: PathLike,
    output: PathLike | None,
    chosen: DecomposeOptions,
    *,
    progress: Callback = silent,
    dry_run: bool = False,
    ranks: int = 1,
) -> DecomposePlan:
    """Settle what `decompose` would do. Parameters and errors are those of `decompose`.

    With ``dry_run`` no weights are downloaded, and the output may exist. ``ranks`` processes share the work.
    """
    location = chosen.location(values.model(model, "model"))
    path = values.path(output, "output") if output is not None else Path(f"{location.short_name()}.frod.safetensors")
    if not dry_run:
        sink.check_output_file(path, force=chosen.may_replace(path))
        choose_device(chosen.device)  # before a download, not after it
    basis_file.check_name(path)
    if not dry_run:
        chosen.check_destination(path, beside=True)
    checkpoint = open_checkpoint(
        location,
        headers_only=dry_run,
        later=True,
        streamed=chosen.stream,
        progress=lambda text: progress(Progress(text)),
    )
    refuse_quantized(checkpoint)
    selection = targets.select(checkpoint, chosen.target_modules, chosen.exclude_modules, chosen.layers)
    categories, collisions = _categories(selection.targets, checkpoint, chosen)
    categories = _among(categories, ranks)
    plan = DecomposePlan(checkpoint, path, chosen, categories, selection.left_out, tuple(collisions), ranks)
    plan.check_memory()
    if dry_run:
        return replace(plan, seconds_estimate=_seconds_estimate(plan))
    plan.check_output()  # now that it is known what will be read
    if not checkpoint.absent:
        checkpoint.parameters()  # for which embeddings may have to be read: before the work, not after it
    return plan


def _seconds_estimate(plan: DecomposePlan) -> float | None:
    """The time that the plan would take on its device, about."""
    from frodctl.method.forecast import decompose_calls

    rates, options = measured_rates(plan.options.device), plan.options
    if rates is None:
        return None
    calls = [
        decompose_calls(
            category.shapes,
            alpha=options.alpha,
            precision=options.precision,
            dtype=options.dtype,
            cache_bytes=plan.memory(category).cache_bytes,
        )
        for category in plan.categories
    ]
    return rates.seconds(itertools.chain(*calls))


def _categories(
    selected: Sequence[targets.Target], checkpoint: Checkpoint, options: DecomposeOptions
) -> tuple[tuple[CategoryPlan, ...], list[str]]:
    widths = {target.module: target.n for target in selected}
    joined = _joined(widths) if options.share_input else {}
    labels, collisions = names.categories(widths, joined)
    groups: dict[str, list[targets.Target]] = {}
    for target in selected:
        groups.setdefault(labels[target.module], []).append(target)
    sparsity: float | None = options.sparsity
    if options.budget is not None:
        layers = [(group[0].n, len(group)) for group in groups.values()]
        try:
            sparsity = budget.allocate(layers, [1.0] * len(layers), _numbers(checkpoint, options))[0]
        except UsageError as error:
            least = sum(target.n for target in selected) / checkpoint.parameters()
            raise UsageError(f"{error}, {least:.4%} of the checkpoint's parameters") from None
    if options.allocate != "uniform":
        sparsity = None
    made = [
        CategoryPlan(name, tuple(group), sparsity, share_per_token(group, checkpoint))
        for name, group in sorted(groups.items())
    ]
    return tuple(made), collisions


def _among(categories: Sequence[CategoryPlan], ranks: int) -> tuple[CategoryPlan, ...]:
    """Each with the ranks that compute it: whole categories where that is as fast, else with the layers divided."""

    def seconds(category: CategoryPlan) -> Callable[[int], float]:
        return lambda count: cost.flops_of_ranks(category.shapes, min(count, len(category.targets)))

    division = divided([seconds(category) for category in categories], ranks)
    nbytes = PROCESS_BYTES + (RANK_BYTES if ranks > 1 else 0)
    return tuple(replace(c, ranks=r, process_bytes=nbytes) for c, r in zip(categories, division, strict=True))


def _joined(widths: Mapping[str, int]) -> dict[str, str]:
    found = siblings.joined(widths)
    if not found:
        raise UsageError(
            "`share_input`: no two of these modules are known to read the same input (q, k, v; gate, up); select more "
            "with `target_modules`, or leave it out"
        )
    return found


def _numbers(checkpoint: Checkpoint, options: DecomposeOptions) -> float:
    """Numbers that the budget allows to train."""
    assert options.budget is not None
    return options.budget * checkpoint.parameters()

"""The plan of a merge: what will be done to which tensor, settled from headers alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from frodctl import values
from frodctl.adapted import opening
from frodctl.adapted.matching import Match, Weight, match
from frodctl.adapted.opening import Source
from frodctl.checkpoint import codec, hub_urls, shards, sink
from frodctl.checkpoint.companions import copied_files
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import MODEL_DTYPES, Checkpoint, Location, TensorInfo, weights_name
from frodctl.checkpoint.targets import Target
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import is_adapter, open_adapter
from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.columns import Column
from frodctl.jobs.merge import base_as
from frodctl.jobs.merge import config as model_config
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.quantization import FLOAT8, Quantization, quantization
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.ranks import RANK_BYTES
from frodctl.jobs.resources import PROCESS_BYTES, choose_device, measured_rates
from frodctl.method import cost
from frodctl.pipeline import AHEAD
from frodctl.values import PathLike


@dataclass(frozen=True)
class MergePlan:
    """Everything that will be done, known from headers alone."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("adapter"),
        Column("category", "category", "text"),
        Column("layers", "layers"),
        Column("n", "n"),
        Column("m_min"),
        Column("m_max", "m", "heights"),
        Column("parameters", "parameters", "count"),
        Column("nnz", "nnz"),
        Column("form", "form"),
        Column("scale", "scale"),
        Column("basis", "basis"),
        Column("flops"),
    )

    checkpoint: Checkpoint = field(repr=False)
    output: Path
    options: MergeOptions
    sources: tuple[Source, ...]
    weights: tuple[Weight, ...] = field(repr=False)  #: those of one group stand together
    replaced: Mapping[str, tuple[Source, TensorInfo]] = field(repr=False)  #: trained whole, by name in the output
    names: Mapping[str, str] = field(repr=False)  #: the base's tensors and what the output calls them
    shards: tuple[shards.Shard, ...] = field(repr=False)
    config: Mapping[str, Json] | None = field(repr=False)  #: of the result; None where the base's is copied
    files: tuple[str, ...] = field(repr=False)  #: copied from the base's folder
    warnings: tuple[str, ...]
    quantization: Quantization | None = field(default=None, repr=False)  #: of a result in 8 bits
    base_as: base_as.BaseAs | None = field(default=None, repr=False)  #: how the base is held; None: as it is stored
    ranks: int = 1  #: processes that share the work
    seconds_estimate: float | None = field(default=None, compare=False)  #: of a dry run, whose device was measured

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor of the output, and of every slice that is written by itself."""
        return {spec.name: spec.dtype for shard in self.shards for spec, _ in shard.pieces()}

    @property
    def added(self) -> list[str]:
        """Tensors that the base does not have, but for scales."""
        known = {*self.names.values(), *self.scales.values()}
        return sorted({spec.name for shard in self.shards for spec in shard.specs} - known)

    @property
    def scales(self) -> Mapping[str, str]:
        """The weights that are written in 8 bits, and what their scales are called."""
        return self.quantization.scale_names if self.quantization else {}

    @cached_property
    def origins(self) -> dict[str, TensorInfo]:
        """What the output's tensors are made from: the base's, or their slices where those are written one by one."""
        sliced = {name for shard in self.shards for name in shard.sliced}
        found: dict[str, TensorInfo] = {}
        for old, new in self.names.items():
            info = self.checkpoint.tensors[old]
            if new in sliced:
                found |= {f"{new}[{index}]": info.slice(index) for index in range(info.shape[0])}
            else:
                found[new] = info
        return found | {scales: found[name] for name, scales in self.scales.items()}

    def name(self, weight: Weight) -> str:
        """What the output calls a merged weight: its tensor, or the slice of it."""
        target = weight.target
        name = self.names[target.tensor.name]
        return name if target.index is None else f"{name}[{target.index}]"

    @property
    def copied(self) -> dict[str, TensorInfo]:
        """Those of them that no adapter touches."""
        touched = {self.name(weight) for weight in self.weights} | set(self.replaced) | set(self.scales.values())
        return {name: info for name, info in self.origins.items() if name not in touched}

    def check_output(self, key: str | None = None) -> None:
        """Raise `UsageError` where the output must not be written, by the job ``key`` or by any."""
        reads = files_of(self.checkpoint, self.sources)
        sink.check_output_folder(self.output, reads, force=self.options.may_replace(self.output, key))

    @property
    def output_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of a whole process, about."""
        process = PROCESS_BYTES + (RANK_BYTES if self.ranks > 1 else 0)
        widest = max((codec.DTYPE_BITS[self.dtypes[self.name(weight)]] // 8 for weight in self.weights), default=0)
        others = self._quantizing_bytes() + self._requantizing_bytes()
        return process + update_memory_bytes(self.weights, widest) + others

    def _requantizing_bytes(self) -> int:
        """Of holding the base otherwise: the library, and a weight in its hands, merged and copied."""
        largest = max((info.parameters for info in self.checkpoint.tensors.values()), default=0)
        return base_as.LIBRARY_BYTES + 2 * 12 * largest if self.base_as else 0

    def _quantizing_bytes(self) -> int:
        """Of a result in 8 bits: ΔW in float32 with the codes, and a weight that is copied with its own."""
        merged = max((5 * weight.target.m * weight.target.n for weight in self.weights), default=0)
        copied = max(
            (info.nbytes + info.parameters for name, info in self.copied.items() if name in self.scales), default=0
        )
        return merged + copied if self.quantization else 0

    @property
    def flops(self) -> float:
        return sum(flops(weight) for weight in self.weights)

    def rows(self) -> list[dict[str, Json]]:
        """Each category of each adapter as a line of a table."""
        groups: dict[tuple[int, str], list[Target]] = {}
        for weight in self.weights:
            for part in weight.parts:
                key = self.sources.index(part.source), part.trained.category
                groups.setdefault(key, []).append(weight.target)
        return [self._row(self.sources[number], name, targets) for (number, name), targets in groups.items()]

    def _row(self, source: Source, category: str, targets: Sequence[Target]) -> dict[str, Json]:
        n = targets[0].n
        counts = [module.nnz for module in source.adapter.modules if module.category == category]
        return {
            "adapter": source.adapter.name,
            "category": category,
            "layers": len(targets),
            "n": n,
            "m_min": min(target.m for target in targets),
            "m_max": max(target.m for target in targets),
            "parameters": sum(target.m * n for target in targets),
            "nnz": max(counts, default=0),
            "form": source.form,
            "scale": source.scale,
            "basis": "recomputed" if source.recompute else "file" if source.basis else "adapter",
            "flops": sum(cost.update_flops(target.m, n) for target in targets),
        }

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan with what happens to the tensors."""
        return {
            "schema_version": SCHEMA_VERSION,
            "base": self.checkpoint.model,
            "revision": self.checkpoint.revision,
            "adapters": adapters_as_json(self.sources),
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "ranks": self.ranks,
            "seconds_estimate": self.seconds_estimate,
            "dtype": self.options.dtype,
            "quantization": self.quantization.as_dict() if self.quantization else None,
            "base_as": self.base_as.as_dict() if self.base_as else None,
            "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in self.shards],
            "merged_tensors": len(self.weights),
            "replaced_tensors": sorted(set(self.replaced) - set(self.added)),
            "added_tensors": self.added,
            "copied_tensors": len(self.copied),
            "files": list(self.files),
            "warnings": list(self.warnings),
            "categories": self.rows(),
        }


def flops(weight: Weight) -> float:
    """Floating-point operations of merging one weight, about."""
    return cost.update_flops(weight.target.m, weight.target.n) * len(weight.parts)


def plan_merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    chosen: MergeOptions,
    *,
    progress: Callback = silent,
    dry_run: bool = False,
    ranks: int = 1,
) -> MergePlan:
    """Settle what `merge` would do. Parameters and errors are those of `merge`.

    With ``dry_run`` no weights are downloaded, and the output may exist. ``ranks`` processes share the work.
    """
    output, found = opened(base, adapter, output, chosen, progress=progress, dry_run=dry_run)
    checkpoint, sources = found.checkpoint, found.sources
    replaced = found.replaced()
    changed = [weight.target.tensor.name for weight in found.weights] + list(replaced)
    with_head = not all(source.adapter.task in model_config.TASKS_WITHOUT_LM_HEAD for source in sources)
    checkpoint.ties.require_kept(changed, checkpoint.model, with_head=with_head)
    added = {name for name in replaced if name not in checkpoint.tensors}
    new_names = {name: found.prefix + name if added else name for name in checkpoint.tensors}
    replaced = {new_names.get(name, name): item for name, item in replaced.items()}
    specs = _specs(checkpoint, new_names, replaced, chosen)
    sliced = {new_names[w.target.tensor.name] for w in found.weights if w.target.index is not None}
    held = base_as.base_as(found, chosen.base_as, new_names)
    if held and chosen.base_as == base_as.AUTO:
        progress(Progress(f"{sources[0].adapter.name}: was trained over {held.kind}, and so is the base held"))
    narrow = None
    if chosen.dtype == FLOAT8:
        turned = {new_names[w.target.tensor.name] for w in found.weights if w.target.transposed}
        narrow = quantization(checkpoint, new_names, {*replaced, *turned}, specs, chosen.fp8_scales)
        specs = list(narrow.specs(specs))
    plan = MergePlan(
        checkpoint=checkpoint,
        output=output,
        options=chosen,
        sources=sources,
        weights=found.weights,
        replaced=replaced,
        names=new_names,
        shards=shards.plan_shards(specs, chosen.max_shard_size, weights_name(checkpoint.config), sliced),
        config=model_config.edited(
            checkpoint.config,
            specs,
            added,
            replaced,
            sources[0].adapter,
            chosen.dtype,
            narrow.config() if narrow else None,
        ),
        files=copied_files(checkpoint, as_sentences=not added),
        warnings=(
            *found.warnings,
            *warnings(sources, replaced),
            *base_as.notes(found, chosen.base_as, held),
            *(narrow.warnings() if narrow else ()),
        ),
        quantization=narrow,
        base_as=held,
        ranks=ranks,
    )
    if dry_run:
        return replace(plan, seconds_estimate=_seconds_estimate(plan))
    plan.check_output()  # now that it is known what will be read
    return plan


def opened(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    chosen: MergeOptions,
    *,
    progress: Callback,
    dry_run: bool,
) -> tuple[Path, Match]:
    """Where the output goes, and the base and the adapters, opened and matched; as for `plan_merge`."""
    base, adapter = values.model(base, "base"), values.model(adapter, "adapter")
    output = values.path(output, "output")
    output = output if output.name not in ("", "..") else output.resolve()
    if not dry_run:
        _check_output(output, base, adapter, chosen)
        choose_device(chosen.device)  # before a download, not after it
        chosen.check_destination(output)
    location = chosen.location(base)
    try:
        sources = _open_sources(adapter, chosen, headers_only=dry_run, progress=progress)
    except InvalidInput as error:
        if _exchanged(location, chosen.location_of_other(adapter)):
            raise InvalidInput(f"`base` {base} is an adapter, and `adapter` {adapter} is not: exchange them") from error
        raise
    return output, match(location, sources, headers_only=dry_run, progress=lambda text: progress(Progress(text)))


def files_of(checkpoint: Checkpoint, sources: Sequence[Source]) -> list[Path]:
    """The files and folders that are read, as far as they are here."""
    whole = checkpoint.path or checkpoint.root
    paths = [*([whole] if whole else []), *checkpoint.files()]
    for source in sources:
        paths += [*source.adapter.files(), *([source.basis.path] if source.basis else [])]
    return paths


def adapters_as_json(sources: Sequence[Source]) -> list[dict[str, Json]]:
    """What JSON says of the adapters."""
    return [
        {"adapter": s.adapter.name, "form": s.form, "scale": s.scale, "base": s.adapter.base_model} for s in sources
    ]


def update_calls(weights: Sequence[Weight]) -> list[cost.Call]:
    """What computing the updates takes: each category's basis is made ready once."""
    from frodctl.adapted.updates import case_of

    groups: dict[object, list[tuple[int, int]]] = {}
    cases: dict[object, cost.UpdateCase] = {}
    for weight in weights:
        for part in weight.parts:
            key = id(part.source), weight.group
            groups.setdefault(key, []).append((weight.target.m, weight.target.n))
            cases.setdefault(key, case_of(part, weight.target))
    return list(itertools.chain(*(cost.update_calls(shapes, cases[key]) for key, shapes in groups.items())))


def update_memory_bytes(weights: Sequence[Weight], output_itemsize: int = 0) -> int:
    """What computing them takes at most, with the weights that are read ahead and the one that is written."""
    work = max(map(_work_bytes, weights), default=0)
    read = max((weight.target.nbytes for weight in weights), default=0)
    written = max((weight.target.m * weight.target.n for weight in weights), default=0) * output_itemsize
    return work + (AHEAD + 1) * read + written


def _work_bytes(weight: Weight) -> int:
    from frodctl.adapted.updates import case_of

    m, n = weight.target.m, weight.target.n
    cases = [case_of(part, weight.target) for part in weight.parts]
    total = max(cost.ITEMSIZE[case.work] for case in cases) * (m if m <= n else min(m, cost.UPDATE_ROWS)) * n
    return sum(cost.update_memory_bytes(m, n, case) for case in cases) + total


def _seconds_estimate(plan: MergePlan) -> float | None:
    """The time that the plan would take on its device, about."""
    rates = measured_rates(plan.options.device)
    if rates is None:
        return None
    copied = cost.Call("move", "", (sum(info.nbytes for info in plan.copied.values()),), 4)
    return rates.seconds([copied, *update_calls(plan.weights)])


def _open_sources(adapter: str, options: MergeOptions, *, headers_only: bool, progress: Callback) -> tuple[Source, ...]:
    given = opening.opened(options.file_of(options.basis)) if options.basis is not None else None
    asked: list[tuple[str, float, str | None]] = [(adapter, options.scale, options.adapter_name)]
    asked += [(name, scale, None) for name, scale in options.also]
    sources = tuple(
        opening.open_source(
            open_adapter(options.location_of_other(name), chosen, headers_only=headers_only),
            given,
            trust=options.trust_basis,
            recompute=options.recompute_projection,
            projection_dtype=MODEL_DTYPES.get(options.projection_dtype),
            form=None if options.form == "auto" else options.form,
            scale=scale,
        )
        for name, scale, chosen in asked
    )
    for source in sources:
        if source.basis is not None and given is None:
            progress(Progress(opening.found_near(source.adapter, source.basis)))
    return sources


def _exchanged(base: Location, adapter: Location) -> bool:
    """Whether base and adapter are given in each other's place, as far as can be seen."""
    try:
        return base.model != "-" and is_adapter(base) and not is_adapter(adapter)
    except (FrodctlError, OSError):
        return False


def _check_output(output: Path, base: str, adapter: str, options: MergeOptions) -> None:
    given = [
        options.location_of_other(name).local_path() for name in (base, adapter, *(name for name, _ in options.also))
    ]
    inputs = [path for path in given if path is not None]
    inputs += [Path(options.basis)] if options.basis is not None and not hub_urls.is_url(options.basis) else []
    sink.check_output_folder(output, inputs, force=options.may_replace(output))


def _specs(
    checkpoint: Checkpoint,
    new_names: Mapping[str, str],
    replaced: Mapping[str, tuple[Source, TensorInfo]],
    options: MergeOptions,
) -> list[codec.TensorSpec]:
    """The output's tensors, in the base's order, then what is new.

    Weights that had scales get the dtype that most of the others have.
    """
    others = [codec.TensorSpec(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values() if i.scaled is None]
    of_values = model_config.usual_dtype(others)

    def dtype(info: TensorInfo) -> str:
        if options.dtype in MODEL_DTYPES and info.dtype in codec.FLOAT_DTYPES:
            return MODEL_DTYPES[options.dtype]
        return of_values if info.scaled else info.dtype

    # a pickle of the old kind has no places in its file
    order = sorted(checkpoint.tensors.values(), key=lambda i: (i.file, 0 if i.data is not None else i.offset, i.name))
    shapes = {name: info.shape for name, (_, info) in replaced.items()}
    specs = [codec.TensorSpec(new_names[i.name], dtype(i), shapes.get(new_names[i.name], i.shape)) for i in order]
    usual = model_config.usual_dtype(specs)
    known = set(new_names.values())
    specs += [codec.TensorSpec(n, usual, info.shape) for n, (_, info) in replaced.items() if n not in known]
    return specs


def warnings(sources: Sequence[Source], replaced: Mapping[str, tuple[Source, TensorInfo]]) -> list[str]:
    """What should be known of the adapters as they are applied here."""
    found = [doubt for source in sources for doubt in opening.doubts(source)]
    files = [part for source in sources for part in (source.adapter, source.basis)]
    found += [note] if (note := opening.without_digests(*files)) else []
    unscaled = sorted(name for name, (source, _) in replaced.items() if source.scale != 1)
    if unscaled:
        more = f" and {len(unscaled) - 1} more" if len(unscaled) > 1 else ""
        found.append(f"{unscaled[0]}{more} were trained as a whole and are taken over unscaled")
    return found

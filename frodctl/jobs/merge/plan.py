"""The plan of a merge: what will be done to which tensor, settled from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import relpath
from pathlib import Path
from typing import Any

from frodctl import values
from frodctl.adapted import opening
from frodctl.checkpoint import codec, names, shards, sink, ties
from frodctl.checkpoint.companions import (
    MODULES_FILE,
    companions,
    files_below,
    is_of_sentence_transformers,
    module_folders,
)
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, Location, TensorInfo
from frodctl.checkpoint.targets import Target, linear_layer
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule, open_adapter
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs.merge import config as model_config
from frodctl.jobs.merge.options import DTYPES, MergeOptions
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.resources import choose_device
from frodctl.method import cost
from frodctl.values import PathLike

SCHEMA_VERSION = 1
MEGABYTE = 1_000_000
_PROCESS_BYTES = 320 * MEGABYTE


@dataclass(frozen=True, eq=False)
class Source:
    """One adapter of the merge."""

    adapter: Adapter = field(repr=False)
    scale: float
    form: str  #: delta or reconstruct
    basis: BasisFile | None = field(repr=False)  #: where V is, for an adapter without
    recompute: bool  #: whether V comes from PEFT's routine
    projection_dtype: str | None = None  #: of V (the format's name) for PEFT's adapters without; None: the base's


@dataclass(frozen=True, eq=False)
class Part:
    """What one adapter does to one weight."""

    source: Source
    trained: TrainedModule


@dataclass(frozen=True)
class Weight:
    """A weight that is merged."""

    target: Target
    parts: tuple[Part, ...]

    @property
    def group(self) -> tuple[tuple[int, str], ...]:
        """Equal for weights that are updated with the same bases."""
        return tuple((id(part.source), part.trained.category) for part in self.parts)


@dataclass(frozen=True)
class MergePlan:
    """Everything that will be done, known from headers alone."""

    checkpoint: Checkpoint = field(repr=False)
    output: Path
    options: MergeOptions
    sources: tuple[Source, ...]
    weights: tuple[Weight, ...] = field(repr=False)  #: those of one group stand together
    replaced: Mapping[str, tuple[Source, TensorInfo]] = field(repr=False)  #: trained whole, by name in the output
    names: Mapping[str, str] = field(repr=False)  #: the base's tensors and what the output calls them
    shards: tuple[shards.Shard, ...] = field(repr=False)
    config: Mapping[str, Any] | None = field(repr=False)  #: of the result; None where the base's is copied
    files: tuple[str, ...] = field(repr=False)  #: copied from the base's folder
    warnings: tuple[str, ...]

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor of the output."""
        return {spec.name: spec.dtype for shard in self.shards for spec in shard.specs}

    @property
    def added(self) -> list[str]:
        """Tensors that the base does not have."""
        return sorted(set(self.dtypes) - set(self.names.values()))

    @cached_property
    def origins(self) -> dict[str, TensorInfo]:
        """The base's tensors by name in the output."""
        return {new: self.checkpoint.tensors[old] for old, new in self.names.items()}

    @property
    def copied(self) -> dict[str, TensorInfo]:
        """Those of them that no adapter touches."""
        touched = {self.names[weight.target.tensor.name] for weight in self.weights} | set(self.replaced)
        return {name: info for name, info in self.origins.items() if name not in touched}

    def check_output(self) -> None:
        """Raise `UsageError` where the output must not be written."""
        whole = self.checkpoint.path or self.checkpoint.root
        reads = [*([whole] if whole else []), *self.checkpoint.files()]
        for source in self.sources:
            reads += source.adapter.files()
            reads += [source.basis.path] if source.basis else []
        sink.check_output_folder(self.output, reads, force=self.options.force)

    @property
    def output_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the whole process, about."""
        work = max((cost.update_memory_bytes(w.target.m, w.target.n) * len(w.parts) for w in self.weights), default=0)
        buffered = max((w.target.nbytes for w in self.weights), default=0)
        return _PROCESS_BYTES + work + 4 * buffered

    @property
    def flops(self) -> float:
        return sum(flops(weight) for weight in self.weights)

    def rows(self) -> list[dict[str, Any]]:
        """Each category of each adapter as a line of a table."""
        groups: dict[tuple[int, str], list[Target]] = {}
        for weight in self.weights:
            for part in weight.parts:
                key = self.sources.index(part.source), part.trained.category
                groups.setdefault(key, []).append(weight.target)
        return [self._row(self.sources[number], name, targets) for (number, name), targets in groups.items()]

    def _row(self, source: Source, category: str, targets: Sequence[Target]) -> dict[str, Any]:
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the plan with what happens to the tensors."""
        return {
            "schema_version": SCHEMA_VERSION,
            "base": self.checkpoint.model,
            "revision": self.checkpoint.revision,
            "adapters": [
                {"adapter": s.adapter.name, "form": s.form, "scale": s.scale, "base": s.adapter.base}
                for s in self.sources
            ],
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "dtype": self.options.dtype,
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
) -> MergePlan:
    """Settle what `merge` would do. Parameters and errors are those of `merge`.

    With ``dry_run`` no weights are downloaded, and the output may exist.
    """
    base, adapter = values.model(base, "base"), values.model(adapter, "adapter")
    output = values.path(output, "output")
    output = output if output.name not in ("", "..") else output.resolve()
    if not dry_run:
        _check_output(output, base, adapter, chosen)
        choose_device(chosen.device)  # before a download, not after it
    found = match(base, adapter, chosen, headers_only=dry_run, progress=progress)
    checkpoint, sources = found.checkpoint, found.sources
    replaced = _replaced(checkpoint, sources)
    _check_ties(checkpoint, found.weights, replaced, sources)
    added = {name for name in replaced if name not in checkpoint.tensors}
    new_names = {name: found.prefix + name if added else name for name in checkpoint.tensors}
    replaced = {new_names.get(name, name): item for name, item in replaced.items()}
    specs = _specs(checkpoint, new_names, replaced, chosen)
    plan = MergePlan(
        checkpoint=checkpoint,
        output=output,
        options=chosen,
        sources=sources,
        weights=found.weights,
        replaced=replaced,
        names=new_names,
        shards=shards.plan_shards(specs, chosen.max_shard_size),
        config=model_config.edited(checkpoint.config, specs, added, replaced, sources[0].adapter, chosen.dtype),
        files=_files(checkpoint, as_sentences=not added),
        warnings=(*found.warnings, *_warnings(sources, replaced)),
    )
    if not dry_run:
        plan.check_output()  # now that it is known what will be read
    return plan


@dataclass(frozen=True)
class Match:
    """A base, adapters over it, and which of its weights they change."""

    checkpoint: Checkpoint
    sources: tuple[Source, ...]
    weights: tuple[Weight, ...]  #: those of one group stand together
    prefix: str  #: that the adapters' names have over the checkpoint's
    warnings: tuple[str, ...]


def match(
    base: str, adapter: str | Adapter, options: MergeOptions, *, headers_only: bool = False, progress: Callback = silent
) -> Match:
    """Open a base and adapters, fetching what is on the Hub, and find the weights that they change.

    Errors are those of `merge` but for the output's.
    """
    sources = _open_sources(adapter, options, headers_only=headers_only)
    for source in sources:
        if source.basis is not None and options.basis is None:
            progress(
                Progress(f"{source.adapter.name}: takes its basis, by its digests, from {relpath(source.basis.path)}")
            )
    location, warnings = _base_location(base, sources[0].adapter, options)
    checkpoint = open_checkpoint(
        location, headers_only=headers_only, everything=True, progress=lambda text: progress(Progress(text))
    )
    refuse_quantized(checkpoint)
    weights, prefix = _weights(checkpoint, sources)
    return Match(checkpoint, sources, weights, prefix, tuple(warnings))


def _check_output(output: Path, base: str, adapter: str, options: MergeOptions) -> None:
    given = [options.location(name).local_path() for name in (base, adapter, *(name for name, _ in options.also))]
    inputs = [path for path in given if path is not None]
    inputs += [Path(options.basis)] if options.basis is not None else []
    sink.check_output_folder(output, inputs, force=options.force)


def _open_sources(adapter: str | Adapter, options: MergeOptions, *, headers_only: bool) -> tuple[Source, ...]:
    given = opening.opened(options.basis) if options.basis is not None else None
    asked: list[tuple[str | Adapter, float, str | None]] = [(adapter, options.scale, options.adapter_name)]
    asked += [(name, scale, None) for name, scale in options.also]
    sources = []
    for one, scale, chosen in asked:
        opened = (
            one if isinstance(one, Adapter) else open_adapter(options.location(one), chosen, headers_only=headers_only)
        )
        form = options.form
        if form == "auto":
            form = opened.provenance.form if opened.provenance else "reconstruct"
        basis = opening.basis_of(opened, given, trust=options.trust_basis) if opened.lacking else None
        recompute = bool(opened.lacking) and basis is None
        if recompute:
            _check_recomputing(opened, options)
        sources.append(Source(opened, scale, form, basis, recompute, _projection_dtype(opened, options)))
    return tuple(sources)


def _check_recomputing(adapter: Adapter, options: MergeOptions) -> None:
    """`InvalidInput` unless V may come from PEFT's routine."""
    error = opening.no_basis(adapter)
    if adapter.provenance is not None and options.recompute_projection:
        raise InvalidInput(
            f"{error}; `recompute_projection` gives another V than the one whose digest the adapter records"
        )
    if not options.recompute_projection:
        hint = ", or `recompute_projection=True` for what PEFT computes on this machine"
        raise error if adapter.provenance is not None else InvalidInput(f"{error}{hint}")


def _projection_dtype(adapter: Adapter, options: MergeOptions) -> str | None:
    """The dtype of the base in the training of a PEFT adapter without V; None where nothing tells.

    PEFT keeps λ in float32 over a 16-bit base too, unless it is told not to; what was trained as a whole keeps the
    model's dtype.
    """
    if options.projection_dtype != "auto":
        return DTYPES[options.projection_dtype]
    if adapter.provenance is not None or not adapter.lacking:
        return None
    scales = {module.scales.dtype for module in adapter.modules} - {"F32"}
    found = scales or {info.dtype for info in adapter.replaced.values()} & set(DTYPES.values())
    return found.pop() if len(found) == 1 else None


def _base_location(base: str, adapter: Adapter, options: MergeOptions) -> tuple[Location, list[str]]:
    recorded = adapter.base
    revision = options.revision
    if base == "-":
        if recorded is None:
            raise InvalidInput(f"{adapter.name}: does not name its base model; name it in place of -")
        own = adapter.config.get("revision")
        location = options.location(
            recorded, revision=revision or (own if isinstance(own, str) else None), subfolder=options.subfolder
        )
        return location, []
    location = options.location(base, revision=revision, subfolder=options.subfolder)
    if recorded is not None and Path(recorded.partition("@")[0]).name != location.short_name():
        return location, [f"the adapter was trained on {recorded}, not on {base}"]
    return location, []


def _weights(checkpoint: Checkpoint, sources: Sequence[Source]) -> tuple[tuple[Weight, ...], str]:
    """The weights to merge, and the prefix that their live names have over the checkpoint's."""
    matrices = {name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")}
    parts: dict[str, list[Part]] = {}
    prefixes = set()
    for source in sources:
        matched = names.match([module.module for module in source.adapter.modules], matrices)
        prefixes.add(names.live_prefix(matched))
        found: dict[str, str] = {}
        for module in source.adapter.modules:
            name = matched[module.module]
            if name is None:
                raise _unmatched(module.scales.name, module.module, checkpoint, source.adapter)
            if name in found:
                raise InvalidInput(f"{source.adapter.name}: {found[name]} and {module.module} are both {name} here")
            found[name] = module.module
            parts.setdefault(name, []).append(Part(source, module))
    weights = []
    for name, items in parts.items():
        target = linear_layer(checkpoint.tensors[f"{name}.weight"], checkpoint)
        if any(part.source.adapter.config.get("fan_in_fan_out") is True for part in items) and target.named_conv1d:
            target = replace(target, transposed=True)  # PEFT saw the module; the config may not tell
        for part in items:
            if part.trained.n != target.n:
                raise InvalidInput(
                    f"{part.source.adapter.name}: {part.trained.scales.name} has {part.trained.n} scales, but "
                    f"{name}.weight of {checkpoint.model} has {target.n} columns: another base?"
                )
        weights.append(Weight(target, tuple(items)))
    order = {id(source): number for number, source in enumerate(sources)}
    weights.sort(
        key=lambda w: (
            [(order[id(p.source)], p.trained.category) for p in w.parts],
            names.natural_key(w.target.module),
        )
    )
    return tuple(weights), prefixes.pop() if len(prefixes) == 1 else ""


def _unmatched(tensor: str, module: str, checkpoint: Checkpoint, adapter: Adapter) -> InvalidInput:
    if ties.is_head(f"{module}.weight"):
        return InvalidInput(
            f"{adapter.name}: {tensor}: {checkpoint.model} stores no {module}.weight, it is tied to the input "
            "embedding; merging it would change both"
        )
    return InvalidInput(
        f"{adapter.name}: tensor {tensor} matches nothing, or several things, in {checkpoint.model}: another base?"
    )


def _replaced(checkpoint: Checkpoint, sources: Sequence[Source]) -> dict[str, tuple[Source, TensorInfo]]:
    """The tensors that were trained as a whole, by their names in the checkpoint or, if new, in the live model."""
    replaced: dict[str, tuple[Source, TensorInfo]] = {}
    for source in sources:
        adapter = source.adapter
        matched = names.match(adapter.replaced, checkpoint.tensors)
        for live, info in adapter.replaced.items():
            name = matched[live] or (live if adapter.is_saved_module(live) else None)
            if name is None:
                raise _unmatched(info.name, live.removesuffix(".weight"), checkpoint, adapter)
            if name in replaced:
                other = replaced[name][0].adapter.name
                raise InvalidInput(f"{adapter.name}: {name} was trained as a whole in {other} too; merge one of them")
            base = checkpoint.tensors.get(name)
            is_head = adapter.is_saved_module(live) and adapter.task in model_config.LABELLING_TASKS
            same = base is None or base.shape == info.shape or (is_head and base.shape[1:] == info.shape[1:])
            if base is not None and not same:
                raise InvalidInput(
                    f"{adapter.name}: tensor {info.name} is {list(info.shape)}, but {name} of {checkpoint.model} is "
                    f"{list(base.shape)}"
                )
            if info.dtype not in codec.FLOAT_DTYPES:
                raise InvalidInput(f"{adapter.name}: tensor {info.name} is {info.dtype}, not floating point")
            replaced[name] = source, info
    return replaced


def _check_ties(
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    replaced: Mapping[str, tuple[Source, TensorInfo]],
    sources: Sequence[Source],
) -> None:
    tasks = [source.adapter.task for source in sources]
    with_head = not all(task in model_config.TASKS_WITHOUT_LM_HEAD for task in tasks)
    changed = [weight.target.tensor.name for weight in weights] + list(replaced)
    broken = checkpoint.ties.broken_by(changed, with_head=with_head)
    if broken:
        raise InvalidInput(
            f"{sources[0].adapter.name}: {broken[0]} is tied to another tensor in {checkpoint.model}, and merging "
            "would break the tie or change both; untie them in the base first (tie_word_embeddings)"
        )


def _specs(
    checkpoint: Checkpoint,
    new_names: Mapping[str, str],
    replaced: Mapping[str, tuple[Source, TensorInfo]],
    options: MergeOptions,
) -> list[codec.TensorSpec]:
    """The output's tensors, in the base's order, then what is new."""

    def dtype(stored: str) -> str:
        return DTYPES[options.dtype] if options.dtype != "auto" and stored in codec.FLOAT_DTYPES else stored

    # a pickle of the old kind has no places in its file
    order = sorted(checkpoint.tensors.values(), key=lambda i: (i.file, 0 if i.data is not None else i.offset, i.name))
    shapes = {name: info.shape for name, (_, info) in replaced.items()}
    specs = [codec.TensorSpec(new_names[i.name], dtype(i.dtype), shapes.get(new_names[i.name], i.shape)) for i in order]
    usual = model_config.usual_dtype(specs)
    known = set(new_names.values())
    specs += [codec.TensorSpec(n, usual, info.shape) for n, (_, info) in replaced.items() if n not in known]
    return specs


def _files(checkpoint: Checkpoint, *, as_sentences: bool) -> tuple[str, ...]:
    """What is copied beside the weights; nothing is known of it where only headers were fetched.

    What makes a sentence-transformers model of the base is left out where that is not wanted.
    """
    if checkpoint.root is None or not checkpoint.config:
        return ()
    path = checkpoint.path
    # a single file's folder may be anybody's: no sub-folders
    found = files_below(checkpoint.root, sub_folders=path is None or not path.is_file())
    folders = module_folders(checkpoint.root / MODULES_FILE)
    chosen = [name for name in companions(found, folders) if name != "config.json"]
    if not as_sentences:
        chosen = [name for name in chosen if not is_of_sentence_transformers(name, folders)]
    return tuple(chosen)


def _warnings(sources: Sequence[Source], replaced: Mapping[str, tuple[Source, TensorInfo]]) -> list[str]:
    warnings = []
    for source in sources:
        name = source.adapter.name
        if source.recompute:
            warnings.append(
                f"{name} does not hold its basis; PEFT's routine recomputes it here, and where this machine differs "
                "from the one it was trained on the result is wrong and nothing can tell"
            )
        if source.adapter.lacking and source.adapter.provenance is None:
            dtype = next(
                (d for d, label in DTYPES.items() if label == source.projection_dtype), "the dtype of the base"
            )
            warnings.append(
                f"{name}: V is taken in {dtype}; if the base was loaded in another dtype for training, say which "
                "(`projection_dtype`), or the result is wrong"
            )
    files = [part for source in sources for part in (source.adapter, source.basis)]
    warnings += [note] if (note := opening.without_digests(*files)) else []
    unscaled = sorted(name for name, (source, _) in replaced.items() if source.scale != 1)
    if unscaled:
        more = f" and {len(unscaled) - 1} more" if len(unscaled) > 1 else ""
        warnings.append(f"{unscaled[0]}{more} were trained as a whole and are taken over unscaled")
    return warnings

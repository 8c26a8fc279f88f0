"""Inspecting targets, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from frodctl.checkpoint import names
from frodctl.checkpoint import targets as linear_layers
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.errors import UsageError
from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.inspect import columns, headers
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row, arranged
from frodctl.jobs.inspect.target import Target, open_target
from frodctl.jobs.profile import UNPROFILED, Profiled, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.resources import choose_device, memory_errors, take_device

_FEW = 4  #: names in a message


@dataclass(frozen=True)
class TargetResult:
    """One inspected target."""

    target: str
    kind: str
    rows: tuple[Row, ...]
    summary: dict[str, Json]


@dataclass(frozen=True)
class InspectResult(Profiled):
    """A finished inspection."""

    targets: tuple[TargetResult, ...]

    def as_dict(self) -> dict[str, Json]:
        """For JSON."""
        return self.profile_dict() | {
            "schema_version": SCHEMA_VERSION,
            "targets": [
                {"target": t.target, "kind": t.kind, "tensors": [row.values for row in t.rows], "summary": t.summary}
                for t in self.targets
            ],
        }


def run_inspect(
    targets: Sequence[str],
    options: InspectOptions,
    progress: Callback = silent,
    profile: Unprofiled = UNPROFILED,
) -> InspectResult:
    """Inspect all the targets and keep every row. Errors are those of `inspect`."""
    finished = []
    for report in list(reports(targets, options, progress, profile)):
        rows = tuple(report.rows)
        finished.append(TargetResult(report.target, report.kind, rows, report.summary()))
    return InspectResult(tuple(finished)).with_profile(profile)


def reports(
    targets: Sequence[str],
    options: InspectOptions,
    progress: Callback = silent,
    profile: Unprofiled = UNPROFILED,
) -> Iterator[Report]:
    """The targets' reports, whose rows come as they are computed. Errors are those of `inspect`.

    Only after the last report is it known whether every pattern to include or exclude matches something.
    """
    with profile.step("start and imports"):
        kernels = take_device(options.device, progress) if not options.headers_only else None
    there: list[str] = []
    for name in targets:
        with profile.step("planning"):
            report = _report(open_target(name, options, progress), options, progress, profile)
        there += report.names
        rows = _counted(report, kernels.name, progress) if kernels is not None else report.rows
        rows = profile.waiting("other arithmetic" if kernels is not None else "headers", rows)
        yield replace(report, rows=arranged(rows, options.sort, options.top))
    for parameter, globs in (("include", options.include), ("exclude", options.exclude)):
        unmatched = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in there)]
        if unmatched:
            few = [*there[:_FEW], "…"] if len(there) > _FEW else there
            raise UsageError(
                f"`{parameter}` {', '.join(unmatched)}: matches no name in {', '.join(targets)}; names there are "
                f"{', '.join(few)}"
            )


def _counted(report: Report, device: str, progress: Callback) -> Iterator[Row]:
    progress(Progress(report.target, 0, report.count))
    with memory_errors(device):
        for number, row in enumerate(report.rows, 1):
            progress(Progress(report.target, number, report.count))
            yield row


def _report(target: Target, options: InspectOptions, progress: Callback, profile: Unprofiled) -> Report:
    if target.checkpoint is not None:
        if options.base is not None:
            raise UsageError(
                f"{target.name}: `base` goes with a basis or an adapter; for two checkpoints give `against`"
            )
        if options.against is not None:
            from frodctl.jobs.inspect.against import comparison

            return comparison(target.name, target.checkpoint, options, progress, profile)
        return _checkpoint_report(target.name, target.checkpoint, options, profile)
    if options.against is not None:
        raise UsageError(f"{target.name}: `against` compares checkpoints, and this is none")
    if options.estimate:
        raise UsageError(f"{target.name}: `estimate` goes with checkpoints; give `spectrum`")
    if options.merged is not None and target.adapter is None:
        raise UsageError(f"{target.name}: `merged` goes with an adapter, and this is none")
    if target.basis is not None:
        if options.headers_only:
            basis = target.basis
            return _of_headers(
                target, "basis", headers.basis_rows(basis), lambda: headers.basis_summary(basis, None), options
            )
        from frodctl.jobs.inspect.basis import basis_report

        return basis_report(target.name, target.basis, options, progress, profile)
    assert target.adapter is not None
    if options.headers_only:
        adapter = target.adapter
        return _of_headers(
            target, "adapter", headers.adapter_rows(adapter), lambda: headers.adapter_summary(adapter), options
        )
    from frodctl.jobs.inspect.adapter import adapter_report

    return adapter_report(target.name, target.adapter, options, progress, profile)


def _of_headers(
    target: Target,
    kind: str,
    found: Sequence[dict[str, Json]],
    summary: Callable[[], dict[str, Json]],
    options: InspectOptions,
) -> Report:
    rows = [row for row in found if options.selects(row["name"])]
    shown = columns.of_basis(options) if kind == "basis" else columns.of_adapter(options)
    return Report(target.name, kind, shown, map(Row, rows), summary, len(rows), [row["name"] for row in found])


def _checkpoint_report(name: str, checkpoint: Checkpoint, options: InspectOptions, profile: Unprofiled) -> Report:
    def summary() -> dict[str, Json]:
        return headers.checkpoint_summary(checkpoint)

    shown = columns.of_checkpoint(options)
    infos = sorted(checkpoint.tensors.values(), key=lambda info: names.natural_key(info.name))
    there = [info.name for info in infos]
    if options.headers_only:
        infos = [info for info in infos if options.selects(info.name)]
        listed = (Row(headers.tensor_values(info) | headers.place_values(info)) for info in infos)
        return Report(name, "checkpoint", shown, listed, summary, len(infos), there)
    parts = {part.name: part for info in infos for part in matrices(info)}
    there += [part for part in parts if part not in checkpoint.tensors]  # experts in one tensor
    wanted = [part for part_name, part in parts.items() if options.selects(part_name)]
    return Report(
        name, "checkpoint", shown, _spectra(checkpoint, wanted, options, profile), summary, len(wanted), there
    )


def matrices(info: TensorInfo) -> list[TensorInfo]:
    """The matrices in a tensor: itself, or the experts that it stacks; none of anything else (convolutions)."""
    if info.dtype not in FLOAT_DTYPES or 0 in info.shape:
        return []
    if len(info.shape) == 2:
        return [info]
    return [info.slice(index) for index in range(info.shape[0])] if linear_layers.is_fused_experts(info) else []


def _spectra(
    checkpoint: Checkpoint,
    infos: Sequence[TensorInfo],
    options: InspectOptions,
    profile: Unprofiled,
) -> Iterator[Row]:
    with profile.step("start and imports"):
        from frodctl.jobs.inspect.matrices import Spectra, reading

    assert checkpoint.root is not None
    spectra = Spectra(choose_device(options.device), profile, estimated=options.estimate, seed=options.seed)
    with closing(spectra.of_all([reading(checkpoint.root, info) for info in infos])) as found:
        for info, figures in zip(infos, found, strict=True):
            first = headers.tensor_values(info)
            yield Row(first | figures.values | headers.place_values(info), figures.singular_values)

"""``frodctl inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import click

from frodctl.checkpoint.inputs import Json
from frodctl.cli.options import device_option, output_options, source_options
from frodctl.cli.output import Column, Output, human_bytes, human_count
from frodctl.cli.progress import Reporter
from frodctl.jobs import inspect as job

#: `inspect --against --check` found differences.
EXIT_DIFFERENT = 5

_FIRST = ("name", "shape", "dtype", "parameters")
_ESTIMATED = (
    "spectral_norm", "nuclear_norm", "stable_rank", "effective_rank", "energy_rank_90", "energy_rank_95",
    "energy_rank_99",
)  # fmt: skip
_CHANGES = (
    "scales_norm", "scales_change_norm", "scales_change_relative", "scales_change_median", "scales_change_p95",
    "sparse_norm", "sparse_median", "sparse_p95", "sparse_occupancy", "off_diagonal_energy",
)  # fmt: skip


def _number(key: str, digits: int = 3) -> Callable[[Mapping[str, Json]], str]:
    def show(row: Mapping[str, Json]) -> str:
        value = row.get(key)
        if value is None:
            return "–"
        error = (row.get("errors") or {}).get(key)
        return f"{value:.{digits}g}" + (f" ±{error:.1g}" if error is not None else "")

    return show


def _count(key: str) -> Callable[[Mapping[str, Json]], str]:
    return lambda row: human_count(row[key]) if row.get(key) is not None else "–"


def _sparkline(row: Mapping[str, Json]) -> str:
    """The profile of the singular values, the largest first."""
    profile = row.get("profile")
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value))] for value in profile) if profile else ""


_SHAPE = Column("shape", "shape")
_NAME = Column("name", "name", left=True)
_CATEGORY = Column("category", "category", left=True)
_ROLES = (
    Column("role", "role", left=True),
    Column("tensors", "tensors"),
    Column("shapes", "shape", lambda r: ", ".join("×".join(map(str, shape)) for shape in r["shapes"][:3])),
    Column("dtypes", "dtype", lambda r: ", ".join(r["dtypes"])),
    Column("parameters", "parameters", _count("parameters")),
    Column("bytes", "bytes", lambda r: human_bytes(r["bytes"])),
)
_TENSORS = (
    _NAME,
    _SHAPE,
    Column("dtype", "dtype"),
    Column("parameters", "parameters", _count("parameters")),
    Column("bytes", "bytes", lambda r: human_bytes(r["bytes"]) if "bytes" in r else ""),
)


def _spectrum_columns(prefix: str = "") -> tuple[Column, ...]:
    return (
        Column("profile", "spectrum", _sparkline),
        Column(f"{prefix}spectral_norm", "‖·‖₂", _number(f"{prefix}spectral_norm")),
        Column(f"{prefix}stable_rank", "stable", _number(f"{prefix}stable_rank")),
        Column(f"{prefix}effective_rank", "effective", _number(f"{prefix}effective_rank")),
        Column(f"{prefix}numerical_rank", "rank", _number(f"{prefix}numerical_rank", 9)),
        Column(f"{prefix}condition_number", "cond", _number(f"{prefix}condition_number")),
        Column(f"{prefix}power_law_alpha", "α", _number(f"{prefix}power_law_alpha")),
    )


_BASIS_CATEGORIES = (
    _CATEGORY,
    Column("layers", "layers"),
    Column("n", "n"),
    Column("trainable_parameters", "trainable", _count("trainable_parameters")),
    Column("condition_number", "cond(V)", _number("condition_number")),
    Column("tau_min", "τ", lambda r: f"{r['tau_min']:.3g}–{r['tau_max']:.3g}" if "tau_min" in r else ""),
    Column("sharing_quantiles", "layers sharing, 5–95 %", lambda r: _sharing(r)),
)
_SCALES = (
    _NAME,
    Column("minimum", "λ min", _number("minimum")),
    Column("median", "median", _number("median")),
    Column("maximum", "max", _number("maximum")),
    Column("reconstruction_error", "error", _number("reconstruction_error")),
    Column("base_digest", "digest"),
)
_ADAPTER_CATEGORIES = (_CATEGORY, Column("layers", "layers"), Column("n", "n"), Column("nnz", "nnz"))
_MODULES = (
    _NAME,
    Column("scales_change_relative", "‖Δλ‖/‖λ‖", _number("scales_change_relative")),
    Column("sparse_norm", "‖S‖", _number("sparse_norm")),
    Column("off_diagonal_energy", "off-diag.", _number("off_diagonal_energy")),
)
_DELTAS = (
    _NAME,
    Column("relative_change", "‖ΔW‖/‖W‖", _number("relative_change")),
    *_spectrum_columns("delta_"),
    *_MODULES[1:],
)
_COMPARED = (
    _NAME,
    Column("status", "status", left=True),
    Column("relative_difference", "‖B−A‖/‖A‖", _number("relative_difference")),
    Column("cosine", "cosine", _number("cosine", 9)),
    Column("max_difference", "max |B−A|", _number("max_difference")),
    *_spectrum_columns("difference_"),
)


def _sharing(row: Mapping[str, Json]) -> str:
    found = row.get("sharing_quantiles")
    return f"{found['p05']:.1f}–{found['p95']:.1f}" if found and found["p05"] is not None else ""


@click.command("inspect")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--spectrum", is_flag=True, help="Exact norms, ranks and spectra of every matrix.")
@click.option("--estimate", is_flag=True, help="The same by randomised methods, with error bars, for huge matrices.")
@click.option("--against", metavar="OTHER", help="Compare with another checkpoint, tensor by tensor.")
@click.option("--check", is_flag=True, help="With --against: exit with 5 if anything differs.")
@click.option(
    "--base", metavar="BASE", help="The checkpoint of a basis or an adapter: figures of what they make of it."
)
@click.option("--basis", metavar="FILE", help="Shared-basis file, for an adapter that does not hold V.")
@click.option("--trust-basis", is_flag=True, help="Take it although the adapter does not say that it is the one.")
@click.option("--adapter-name", metavar="NAME", help="Which of several adapters in a folder.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors with such names; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors with such names; may be repeated.")
@click.option("--sort", metavar="KEY", help="By a column of --format tsv, largest first; -KEY smallest first.")
@click.option("--top", metavar="N", help="The first N rows.")
@click.option(
    "--plot",
    metavar="FILE",
    help="Draw the spectra (--spectrum): .png, .svg, or .html, one page that needs nothing else.",
)
@click.option("--force", is_flag=True, help="Replace a picture that exists.")
@click.option("--seed", default="0", show_default=True, metavar="N", help="Of --estimate.")
@device_option
@source_options
@output_options
def command(
    targets: tuple[str, ...],
    check: bool,
    plot: str | None,
    force: bool,
    format_: str | None,
    json_: bool,
    quiet: bool,
    **options: object,
) -> int:
    """Say what each TARGET is: a checkpoint, a shared-basis file or an adapter; and what is in it.

    \b
    Examples:
      frodctl inspect meta-llama/Llama-3.2-1B
      frodctl inspect ./my-model --spectrum --include '*down_proj*' --sort stable_rank --top 10
      frodctl inspect my-model.frod.safetensors --base ./my-model
      frodctl inspect ./my-adapter --base ./my-model --plot update.html
      frodctl inspect ./merged --against ./my-model --check
      frodctl inspect ./my-model --spectrum --json | jq '.targets[0].tensors[].effective_rank'

    By default only headers are read; of a model on the Hub no weights are fetched.
    """
    if check and options["against"] is None:
        raise click.UsageError("--check goes with --against.")
    out = Output(format_, json_, goes_on=check or plot is not None)
    if plot is not None:
        from frodctl.cli import plot as pictures

        pictures.check_request(plot, estimate=bool(options["estimate"]), force=force)
        options["spectrum"] = True
    chosen = job.InspectOptions.of(**options)
    with Reporter(quiet) as report:
        found = list(job.reports(targets, chosen, report))
        shown: list[list[job.Row]] = [[] for _ in found]
        if out.format in ("tsv", "csv", "jsonl"):
            rows = _kept(found, shown)
            # sorted rows come all at once, and a key that no row has is said before anything is printed
            out.stream(list(rows) if chosen.sort else rows, _keys(found, chosen))
            summaries = [item.summary() for item in found] if plot or check else []
        else:
            summaries = _emit(out, found, chosen, shown, report)
        if plot is not None:
            parts = zip(found, shown, summaries, strict=True)
            results = [job.TargetResult(item.target, item.kind, tuple(rows), said) for item, rows, said in parts]
            pictures.draw(plot, results, force=force)
            report.note(f"Drew {plot}")
    different = check and any(summary["different"] for summary in summaries)
    return EXIT_DIFFERENT if different else 0


def _kept(found: Sequence[job.Report], shown: Sequence[list[job.Row]]) -> Iterator[dict[str, Json]]:
    """Every report's rows with the target they are of, and the errors of estimates as columns."""
    for item, kept in zip(found, shown, strict=True):
        for row in item.rows:
            kept.append(row)
            errors = {f"{key}_error": value for key, value in (row.values.get("errors") or {}).items()}
            yield row.values | errors | {"target": item.target}


def _emit(
    out: Output,
    found: Sequence[job.Report],
    options: job.InspectOptions,
    shown: Sequence[list[job.Row]],
    report: Reporter,
) -> list[dict[str, Json]]:
    """Print the reports as JSON or as tables."""
    summaries = []
    entries = []
    for item, rows in zip(found, shown, strict=True):
        rows += item.rows
        summaries.append(item.summary())
        values = [row.values for row in rows]
        entries.append({"target": item.target, "kind": item.kind, "tensors": values, "summary": summaries[-1]})
        if out.format == "human":
            _print_tables(out, entries[-1], options, report)
    if out.format == "json":
        out.emit({"schema_version": job.SCHEMA_VERSION, "targets": entries}, (), ())
    return summaries


def _keys(found: Sequence[job.Report], options: job.InspectOptions) -> list[str]:
    """The columns of separated values."""
    figures = job.FIGURES if options.spectrum or options.estimate else ()
    keys = list(_FIRST)
    for item in found:
        if item.kind == "checkpoint":
            keys += [*figures, "role", "layer", "file", "bytes"]
        elif item.kind == "basis":
            keys += [
                *figures,
                "category",
                "layer",
                "minimum",
                "median",
                "maximum",
                "reconstruction_error",
                "base_digest",
            ]
        elif item.kind == "adapter":
            changes = (
                () if options.headers_only else (*_CHANGES, "relative_change", *(f"delta_{k}" for k in job.FIGURES))
            )
            keys += ["category", "layer", "nnz", *changes]
        else:
            keys += ["other_name", "other_dtype", "status", "relative_difference", "cosine", "max_difference"]
            keys += [f"difference_{key}" for key in figures]
    if options.estimate:
        keys += ["estimated", *(f"{key}_error" for key in _ESTIMATED)]
    return [*dict.fromkeys(keys), "target"]


def _print_tables(out: Output, entry: Mapping[str, Json], options: job.InspectOptions, report: Reporter) -> None:
    rows, summary = entry["tensors"], entry["summary"]
    out.line(f"{entry['target']}: {_describe(entry['kind'], summary)}")
    selected = options.include or options.exclude or options.sort or options.top
    tables: list[tuple[Sequence[Mapping[str, Json]], Sequence[Column]]] = []
    if entry["kind"] == "checkpoint":
        if options.headers_only:
            tables = [(rows, _TENSORS)] if selected else [(summary["roles"], _ROLES)]
        else:
            figures = _spectrum_columns()
            tables = [(rows, (_NAME, _SHAPE, *(figures[1:4] if options.estimate else figures)))]
    elif entry["kind"] == "basis":
        tables = [(summary["categories"], _BASIS_CATEGORIES[: 4 if options.headers_only else None])]
        if not options.headers_only:
            tables.append(([row for row in rows if row["name"].startswith("lambda.")], _SCALES))
    elif entry["kind"] == "adapter":
        moved = _DELTAS if options.base else _MODULES
        tables = [(summary["categories"], _ADAPTER_CATEGORIES)] if options.headers_only else [(rows, moved)]
    else:
        wanted = rows if selected else [row for row in rows if row["status"] != "equal"]
        tables = [(wanted, _COMPARED[: None if options.spectrum else 5])]
    for table, columns in tables:
        hidden = out.table(table, columns) if table else []
        if hidden:
            report.note(f"No room for: {', '.join(hidden)} (a wider terminal or --format tsv has them)")


def _describe(kind: str, summary: Mapping[str, Json]) -> str:
    """One line on what a target is."""
    if kind == "checkpoint":
        dtypes = ", ".join(summary["bytes_by_dtype"])
        files = f"{summary['shards']} {'file' if summary['shards'] == 1 else 'files'}"
        return (
            f"checkpoint, {summary['architecture'] or 'architecture unknown'}, {summary['tensors']} tensors, "
            f"{human_count(summary['parameters'])} parameters, {human_bytes(summary['bytes'])} ({dtypes}) in {files}; "
            + _decomposable(summary["decompose"])
        )
    if kind == "basis":
        share = summary["trainable_share"]
        of_all = f", {share:.2%} of the base" if share is not None else ""
        return (
            f"shared basis of {summary['model']}, {summary['modules']} weights in {len(summary['categories'])} "
            f"categories, {human_count(summary['trainable_parameters'])} trainable numbers "
            f"({summary['trainable_share_of_targets']:.2%} of them{of_all})"
        )
    if kind == "adapter":
        return (
            f"adapter of {summary['base'] or 'an unnamed base'}, written by {summary['written_by']}, form "
            f"{summary['form']}, {summary['modules']} modules, {human_count(summary['trainable_parameters'])} "
            f"trainable numbers, basis {summary['basis']}"
        )
    return f"against {summary['against']}: {summary['equal']} tensors equal, {summary['different']} different"


def _decomposable(found: Mapping[str, Json]) -> str:
    if not found["categories"]:
        return f"nothing to decompose ({found['reason']})"
    weights = sum(category["layers"] for category in found["categories"])
    return f"decompose --target-modules {found['target_modules']} would take {weights} weights"

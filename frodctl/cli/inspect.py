"""``frodctl inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import click

from frodctl import values
from frodctl.checkpoint.inputs import Json
from frodctl.cli import completion, profiling
from frodctl.cli.options import device_option, output_options, profile_option, source_options
from frodctl.cli.output import Output, human_bytes, human_count
from frodctl.cli.progress import Reporter
from frodctl.jobs import inspect as job
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.profile import rows as rows_of

#: `inspect --against --check` found differences, or `--min-survival` less than that.
EXIT_DIFFERENT = 5


@click.command("inspect")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...", shell_complete=completion.models)
@click.option("--spectrum", is_flag=True, help="Exact norms, ranks and spectra of every matrix.")
@click.option("--estimate", is_flag=True, help="The same by randomised methods, with error bars, for huge matrices.")
@click.option(
    "--against",
    metavar="OTHER",
    shell_complete=completion.models,
    help="Compare with another checkpoint, tensor by tensor.",
)
@click.option("--check", is_flag=True, help="With --against: exit with 5 if anything differs.")
@click.option(
    "--base",
    metavar="BASE",
    shell_complete=completion.models,
    help="The checkpoint of a basis or an adapter: figures of what they make of it.",
)
@click.option(
    "--merged",
    metavar="OUT",
    shell_complete=completion.models,
    help="With an adapter's --base: how much of the update is in this checkpoint, by layer.",
)
@click.option(
    "--min-survival", metavar="SHARE", help="With --merged: exit with 5 if less of any layer's update is there: 90%."
)
@click.option(
    "--basis",
    metavar="FILE",
    shell_complete=completion.files,
    help="Shared-basis file, for an adapter that does not hold V.",
)
@click.option("--trust-basis", is_flag=True, help="Take it although the adapter does not say that it is the one.")
@click.option("--adapter-name", metavar="NAME", help="Which of several adapters in a folder.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors with such names; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors with such names; may be repeated.")
@click.option("--sort", metavar="KEY", help="By a column of --format tsv, largest first; -KEY smallest first.")
@click.option("--top", metavar="N", help="The first N rows.")
@click.option(
    "--plot",
    metavar="FILE",
    shell_complete=completion.files,
    help="Draw the spectra (--spectrum): .png, .svg, or .html, one page that needs nothing else.",
)
@click.option("--force", is_flag=True, help="Replace a picture that exists.")
@click.option("--seed", default="0", show_default=True, metavar="N", help="Of --estimate.")
@device_option
@source_options
@profile_option
@output_options
def command(
    targets: tuple[str, ...],
    check: bool,
    min_survival: str | None,
    plot: str | None,
    force: bool,
    profile: bool,
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
      frodctl inspect ./my-adapter --base ./my-model --merged ./merged --min-survival 90%
      frodctl inspect ./my-model --spectrum --json | jq '.targets[0].tensors[].effective_rank'

    By default only headers are read: of a model on the Hub no weights are fetched, and no digests are compared.
    """
    if check and options["against"] is None:
        raise click.UsageError("--check goes with --against.")
    bar = values.optional(values.share)(min_survival, "min_survival")
    if bar is not None and options["merged"] is None:
        raise click.UsageError("--min-survival goes with --merged.")
    if plot is not None:
        from frodctl.cli import plot as pictures

        pictures.check_request(plot, estimate=bool(options["estimate"]), force=force)
        options["spectrum"] = True
    chosen = job.InspectOptions.of(**options)
    measured = profiling.begin(profile)
    with Reporter(quiet, format_) as report:
        out = Output(format_, json_, report.note, goes_on=check or bar is not None or plot is not None)
        found = list(job.reports(targets, chosen, report, measured))
        shown: list[list[job.Row]] = [[] for _ in found]
        if out.format in ("tsv", "csv", "jsonl"):
            rows = _kept(found, shown)
            # sorted rows come all at once, and a key that no row has is said before anything is printed
            out.stream(list(rows) if chosen.sort else rows, _keys(found))
            summaries = [_summary(item, measured) for item in found] if plot or check or bar is not None else []
        else:
            summaries = _emit(out, found, shown, measured)
        if plot is not None:
            parts = zip(found, shown, summaries, strict=True)
            results = [job.TargetResult(item.target, item.kind, tuple(rows), said) for item, rows, said in parts]
            pictures.draw(plot, results, force=force)
            report.note(f"Drew {plot}")
        profiling.show(measured.finish(), report)
        lost = bar is not None and any([_is_lost(summary, bar, report) for summary in summaries])
    different = check and any(summary["different"] for summary in summaries)
    return EXIT_DIFFERENT if different or lost else 0


def _is_lost(summary: Mapping[str, Json], bar: float, report: Reporter) -> bool:
    """Whether less than ``bar`` of a layer's update is in the merged checkpoint; then it is said."""
    least = summary["least_survival"]
    if least is None or least >= bar:
        return False
    report.note(f"{summary['merged']}: {least:.1%} of the update of {summary['least_survival_module']} survives")
    return True


def _kept(found: Sequence[job.Report], shown: Sequence[list[job.Row]]) -> Iterator[dict[str, Json]]:
    """Every report's rows with the target they are of, and the errors of estimates as columns."""
    for item, kept in zip(found, shown, strict=True):
        for row in item.rows:
            kept.append(row)
            errors = {f"{key}_error": value for key, value in (row.values.get("errors") or {}).items()}
            yield row.values | errors | {"target": item.target}


def _summary(item: job.Report, measured: Unprofiled) -> dict[str, Json]:
    with measured.step("summary"):
        return item.summary()


def _emit(
    out: Output, found: Sequence[job.Report], shown: Sequence[list[job.Row]], measured: Unprofiled
) -> list[dict[str, Json]]:
    """Print the reports as JSON or as tables."""
    summaries = []
    entries = []
    for item, rows in zip(found, shown, strict=True):
        rows += item.rows
        summaries.append(_summary(item, measured))
        lines = [row.values for row in rows]
        entries.append({"target": item.target, "kind": item.kind, "tensors": lines, "summary": summaries[-1]})
        if out.format == "human":
            _print_tables(out, item, lines, summaries[-1])
    if out.format == "json":
        steps = measured.finish()
        profile = {} if steps is None else {"profile": rows_of(steps)}
        out.emit({"schema_version": job.SCHEMA_VERSION, "targets": entries} | profile, (), ())
    return summaries


def _keys(found: Sequence[job.Report]) -> list[str]:
    """The columns of separated values."""
    return [*dict.fromkeys(key for item in found for key in item.columns.keys), "target"]


def _print_tables(
    out: Output, item: job.Report, rows: Sequence[Mapping[str, Json]], summary: Mapping[str, Json]
) -> None:
    out.line(f"{item.target}: {_describe(item.kind, summary)}")
    for table in item.columns.tables:
        if lines := table.lines(rows, summary):
            out.table(lines, table.columns)


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
            f"trainable numbers, basis {summary['basis']}{_survival(summary)}"
        )
    return f"against {summary['against']}: {summary['equal']} tensors equal, {summary['different']} different"


def _survival(summary: Mapping[str, Json]) -> str:
    found = summary.get("survival")
    return f"; {found:.2%} of the update is in {summary['merged']}" if found is not None else ""


def _decomposable(found: Mapping[str, Json]) -> str:
    if not found["categories"]:
        return f"nothing to decompose ({found['reason']})"
    weights = sum(category["layers"] for category in found["categories"])
    return f"decompose --target-modules {found['target_modules']} would take {weights} weights"

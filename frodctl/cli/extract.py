"""``frodctl extract``."""

from __future__ import annotations

import click

from frodctl.cli import adapters, completion, profiling
from frodctl.cli.options import (
    device_option,
    lora_options,
    output_options,
    profile_option,
    push_options,
    run_options,
    source_options,
    verify_option,
)
from frodctl.cli.output import Output
from frodctl.cli.progress import Reporter
from frodctl.jobs import extract as job


@click.command("extract")
@click.argument("base", shell_complete=completion.models)
@click.argument("tuned", shell_complete=completion.models)
@click.argument("output", metavar="OUT", shell_complete=completion.files)
@click.option(
    "--as", "as_", type=click.Choice(job.RESULTS), default="lora", show_default=True, help="What adapter is written."
)
@lora_options
@click.option(
    "--target-modules",
    default="all-linear",
    show_default=True,
    metavar="default|all-linear|NAMES|REGEX",
    shell_complete=completion.modules,
    help="Which layers of a LoRA adapter, as for decompose.",
)
@click.option("--exclude-modules", metavar="NAMES|REGEX", help="Modules to leave out.")
@click.option("--layers", metavar="0-11", help="Blocks to take, such as 0-11 or 0,2,8-11.")
@click.option(
    "--basis",
    metavar="FILE",
    shell_complete=completion.files,
    help="Shared-basis file of BASE, for a FRoD adapter, which has its layers.",
)
@click.option("--sparsity", metavar="S", help="Share of n² positions of each of its layers.  [default: the basis's]")
@click.option("--budget", metavar="SHARE", help="Its share of the checkpoint's parameters, such as 1.72%; sets S.")
@click.option(
    "--positions",
    type=click.Choice(job.POSITIONS),
    default="best",
    show_default=True,
    help="Where a category's layers change most, or those of the basis file.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of a LoRA adapter; auto is float32.",
)
@device_option
@source_options
@run_options
@push_options
@verify_option
@profile_option
@output_options
def command(
    base: str,
    tuned: str,
    output: str,
    dry_run: bool,
    profile: bool,
    format_: str | None,
    json_: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Compress what a fine-tuning made of BASE, the checkpoint TUNED, to an adapter, the folder OUT.

    \b
    Examples:
      frodctl extract meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct ./my-lora --rank 64
      frodctl extract ./base ./tuned ./my-lora --energy 90% --max-rank 128
      frodctl extract ./base ./tuned ./my-adapter --as frod --basis base.frod.safetensors --budget 1.72%

    BASE and TUNED are local folders or files, Hub ids (name, org/name, org/name@revision) or the Hub's URLs
    (hf://org/name@revision/folder). --revision and --subfolder are BASE's.
    """
    measured = profiling.begin(profile, dry_run=dry_run)
    with Reporter(quiet, format_) as report:
        out = Output(format_, json_, report.note)
        chosen = job.ExtractOptions.of(**options)
        if chosen.as_ == "frod":
            with measured.step("planning"):
                frod = job.plan_frod(base, tuned, output, chosen, dry_run=dry_run, progress=report)
            adapters.emit(frod, lambda: job.run_frod(frod, report, measured), out, report, measured, dry_run=dry_run)
            return
        with measured.step("planning"):
            lora = job.plan_lora(base, tuned, output, chosen, dry_run=dry_run, progress=report)
        adapters.emit(lora, lambda: job.run_lora(lora, report, measured), out, report, measured, dry_run=dry_run)

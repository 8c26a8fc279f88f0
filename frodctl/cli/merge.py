"""``frodctl merge``."""

from __future__ import annotations

from collections.abc import Mapping

import click

from frodctl.checkpoint.inputs import Json
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
from frodctl.cli.output import Output, about_time, devices, human_bytes, human_count
from frodctl.cli.progress import Reporter
from frodctl.cli.started import started
from frodctl.errors import UsageError
from frodctl.jobs import merge as job


@click.command("merge")
@click.argument("base", shell_complete=completion.models)
@click.argument("adapter", shell_complete=completion.models)
@click.argument("output", metavar="OUT", shell_complete=completion.files)
@click.option(
    "--as",
    "as_",
    type=click.Choice(["model", "lora"]),
    default="model",
    show_default=True,
    help="A dense checkpoint, or the nearest LoRA adapter over BASE.",
)
@lora_options
@click.option(
    "--basis",
    metavar="FILE",
    shell_complete=completion.files,
    help="Shared-basis file, for an adapter that does not hold V.",
)
@click.option("--trust-basis", is_flag=True, help="Take it although the adapter does not say that it is the one.")
@click.option("--recompute-projection", is_flag=True, help="Run PEFT's routine for the V of an adapter without one.")
@click.option(
    "--projection-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the base as a PEFT adapter without V was trained over it.",
)
@click.option(
    "--base-as",
    type=click.Choice(["stored", "auto", "nf4", "nf4-double", "fp4", "fp4-double", "int8", "llm-int8"]),
    default="stored",
    show_default=True,
    help="BASE's weights as stored, or as the quantized model had them; auto: as the adapter says that it was trained.",
)
@click.option(
    "--form",
    type=click.Choice(["auto", "delta", "reconstruct"]),
    default="auto",
    show_default=True,
    help="W + ΔW, or U (diag(λ') + S) Vᵀ as PEFT trains it. auto: as it was trained.",
)
@click.option("--scale", default="1", show_default=True, metavar="S", help="W + S (W' − W).")
@click.option(
    "--also",
    multiple=True,
    metavar="ADAPTER[:S]",
    shell_complete=completion.models,
    help="A further adapter; may be repeated.",
)
@click.option("--adapter-name", metavar="NAME", help="Which of several adapters in the folder.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "float8_e4m3"]),
    default="auto",
    show_default=True,
    help="Of the result; auto keeps each tensor's, and has a LoRA adapter in float32.",
)
@click.option(
    "--fp8-scales",
    type=click.Choice(["channel", "block"]),
    default="channel",
    show_default=True,
    help="With --dtype float8_e4m3: a scale for each row, or for each block of 128 × 128.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Tensors in one file.")
@device_option
@source_options
@run_options
@push_options
@verify_option
@profile_option
@output_options
def command(
    base: str,
    adapter: str,
    output: str,
    dry_run: bool,
    profile: bool,
    format_: str | None,
    json_: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Fold ADAPTER into BASE and write an ordinary dense checkpoint, or a LoRA adapter, the folder OUT.

    \b
    Examples:
      frodctl merge meta-llama/Llama-3.2-1B ./my-adapter ./merged
      frodctl merge - ./my-adapter ./merged --max-shard-size 2GB
      frodctl merge ./base ./my-adapter ./merged --basis base.frod.safetensors
      frodctl merge ./base ./math ./both --scale 0.6 --also ./code:0.4
      frodctl merge ./base ./my-adapter ./my-lora --as lora --rank 64
      frodctl merge ./base ./my-adapter ./served --dtype float8_e4m3

    BASE and ADAPTER are local folders or files, Hub ids (name, org/name, org/name@revision) or the Hub's URLs
    (hf://org/name@revision/folder). BASE - is the model that the adapter names. --revision and --subfolder are BASE's.
    """
    measured = profiling.begin(profile, dry_run=dry_run)
    launch = started().launch
    with Reporter(quiet or launch.number > 0, format_) as report:
        out = Output(format_, json_, report.note)
        chosen = job.MergeOptions.of(**options)
        if chosen.as_ == "lora" and launch.count > 1:
            raise UsageError("`as_` lora runs in one process, and this is one of torchrun's; start it without")
        if chosen.as_ == "lora":
            with measured.step("planning"):
                lora = job.plan_lora(base, adapter, output, chosen, dry_run=dry_run, progress=report)
            adapters.emit(lora, lambda: job.run_lora(lora, report, measured), out, report, measured, dry_run=dry_run)
            return
        with measured.step("planning"):
            plan = job.plan_merge(base, adapter, output, chosen, dry_run=dry_run, progress=report, ranks=launch.count)
        for warning in plan.warnings:
            report.note(f"Warning: {warning}.")
        if dry_run:
            _describe(plan, report)
            document = plan.as_dict() | {"dry_run": True}
            out.emit(document, document["categories"], plan.columns)
            return
        result = job.run_merge(plan, report, measured, launch).with_profile(measured)
    document = result.as_dict()
    files = len(document["shards"])
    report.note(
        f"Wrote {result.output} ({human_bytes(result.output_bytes)} in {files} {'file' if files == 1 else 'files'}): "
        f"{_summary(document)}, in {result.seconds:.1f} s on {devices(result.device, plan.ranks)}"
    )
    for warning in result.warnings():
        report.note(f"Warning: {warning}.")
    out.emit(document, document["categories"], result.columns)
    profiling.show(result.profile, report)


def _describe(plan: job.MergePlan, report: Reporter) -> None:
    """What a dry run says on stderr beside the table of categories."""
    document = plan.as_dict()
    report.note(f"Would write {plan.output} ({human_bytes(plan.output_bytes)}): {_summary(document)}")
    report.note(
        f"Peak memory about {human_bytes(plan.peak_memory_bytes)}, about {human_count(plan.flops)} floating-point "
        f"operations{about_time(plan.seconds_estimate)}"
    )
    report.refusal(plan.check_output)


def _summary(document: Mapping[str, Json]) -> str:
    unchanged = len(document.get("unchanged_tensors", ()))
    counts = {
        "merged": document["merged_tensors"] - unchanged,
        "targeted but untrained": unchanged,
        "replaced": len(document["replaced_tensors"]),
        "added": len(document["added_tensors"]),
        "copied": document["copied_tensors"],
    }
    shown = "tensors: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    held, in_8_bits = document["base_as"], document["quantization"]
    shown += f", {held['tensors']} from {held['kind']}" if held else ""
    return shown + (f", {in_8_bits['tensors']} in 8 bits" if in_8_bits else "")

"""``frodctl decompose``."""

from __future__ import annotations

from collections import Counter

import click

from frodctl.checkpoint import names
from frodctl.checkpoint.inputs import Json
from frodctl.cli import completion, profiling
from frodctl.cli.options import (
    device_option,
    output_options,
    profile_option,
    push_options,
    run_options,
    source_options,
)
from frodctl.cli.output import Output, about_time, devices, human_bytes, human_count
from frodctl.cli.progress import Reporter
from frodctl.cli.started import started
from frodctl.jobs import decompose as job


@click.command("decompose")
@click.argument("model", shell_complete=completion.models)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    shell_complete=completion.files,
    help="Default: ./<model name>.frod.safetensors",
)
@click.option(
    "--target-modules",
    default="default",
    show_default=True,
    metavar="default|all-linear|NAMES|REGEX",
    shell_complete=completion.modules,
    help="PEFT's default for the model, every linear layer of the blocks, names separated by commas, or a "
    "regular expression for the whole path.",
)
@click.option("--exclude-modules", metavar="NAMES|REGEX", help="Modules to leave out.")
@click.option("--layers", metavar="0-11", help="Blocks to take, such as 0-11 or 0,2,8-11.")
@click.option(
    "--share-input",
    is_flag=True,
    help="One basis for layers that read the same activations: q, k and v; gate and up. PEFT cannot load it then.",
)
@click.option("--sparsity", metavar="S", help="Share of n² positions trained per layer.  [default: 0.01]")
@click.option(
    "--budget",
    metavar="SHARE",
    help="Trainable share of the checkpoint, such as 1.72%; sets S.",
)
@click.option(
    "--allocate",
    type=click.Choice(job.ALLOCATIONS),
    default="uniform",
    show_default=True,
    help="How --budget is spread: one S for all, or S in proportion to the RMS singular value of each category.",
)
@click.option("--alpha", default="0.001", show_default=True, metavar="A", help="Regularisation of the decomposition.")
@click.option("--seed", default="0", show_default=True, metavar="N", help="Seed of the sparse pattern.")
@device_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "float64"]),
    default="auto",
    show_default=True,
    help="Of the products with weights.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="In which V is stored.",
)
@click.option("--cache-size", default="1GB", show_default=True, metavar="SIZE", help="Memory for reused Gram matrices.")
@click.option(
    "--memory-limit", metavar="SIZE", help="Of the whole process: compute again, or keep on disk, what does not fit."
)
@click.option(
    "--stream", is_flag=True, help="Read the Hub's weights by ranges at each pass, and keep none of them on disk."
)
@source_options
@run_options
@push_options
@profile_option
@output_options
def command(
    model: str,
    output: str | None,
    dry_run: bool,
    profile: bool,
    format_: str | None,
    json_: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Compute the joint decomposition of MODEL's layers and write it to one shared-basis file.

    \b
    Examples:
      frodctl decompose meta-llama/Llama-3.2-1B
      frodctl decompose ./my-model --target-modules all-linear --budget 1.72%
      frodctl decompose org/name@main --layers 0-11 --dry-run
      frodctl decompose ./my-model -o basis.safetensors --json | jq .trainable_share

    MODEL is a local folder or file, a Hub id (name, org/name, org/name@revision) or one of the Hub's URLs
    (hf://org/name@revision/folder).
    """
    measured = profiling.begin(profile, dry_run=dry_run)
    launch = started().launch
    with Reporter(quiet or launch.number > 0, format_) as report:
        out = Output(format_, json_, report.note)
        chosen = job.DecomposeOptions.of(**options)
        with measured.step("planning"):
            plan = job.plan_decompose(model, output, chosen, dry_run=dry_run, progress=report, ranks=launch.count)
        _warn(plan, report)
        if dry_run:
            _describe(plan, report)
            document = plan.as_dict() | {"dry_run": True}
            out.emit(document, document["categories"], plan.columns)
            return
        result = job.run_decompose(plan, report, measured, launch).with_profile(measured)
    document = result.as_dict()
    report.note(
        f"Wrote {result.output} ({human_bytes(result.output_bytes)}): {_summary(document)}, "
        f"in {result.seconds:.1f} s on {devices(result.device, plan.ranks)}"
    )
    out.emit(document, document["categories"], result.columns)
    profiling.show(result.profile, report)


def _warn(plan: job.DecomposePlan, report: Reporter) -> None:
    if plan.peft_collisions:
        report.note(
            f"Warning: PEFT gives one name to several categories here ({', '.join(plan.peft_collisions)}), "
            "so it cannot load this basis; frodctl can."
        )
    if plan.share_input:
        shared = ", ".join(plan.share_input)
        report.note(
            f"Warning: layers that read the same input share a basis ({shared}), which PEFT cannot load; frodctl can."
        )


def _describe(plan: job.DecomposePlan, report: Reporter) -> None:
    """What a dry run says on stderr beside the table of categories."""
    document = plan.as_dict()
    report.note(f"Would write {plan.output} ({human_bytes(plan.output_bytes)}): {_summary(document)}")
    each = " for each rank" if plan.ranks > 1 else ""
    report.note(
        f"Peak memory about {human_bytes(plan.peak_memory_bytes)}{each}, about {human_count(plan.flops)} "
        f"floating-point operations{about_time(plan.seconds_estimate)}"
    )
    if any(category.share_per_token != 1 for category in plan.categories):
        report.note(_per_token(plan))
    report.refusal(plan.check_output)
    left_out = Counter((names.role(item.name), item.reason) for item in plan.left_out)
    if left_out:
        report.note("Left out:")
    for (role, reason), count in left_out.items():
        report.note(f"  {role} ×{count}: {reason}")


def _per_token(plan: job.DecomposePlan) -> str:
    """How many of the trained numbers take part in a token, where there are experts."""
    if plan.trainable_per_token is None:
        return "Experts: config.json does not say how many a token has, or the spectra decide how much they are trained"
    trained, active = human_count(plan.trainable_parameters), human_count(plan.trainable_per_token)
    return f"Experts: {active} of the {trained} trainable parameters take part in a token"


def _summary(document: dict[str, Json]) -> str:
    categories = len(document["categories"])
    share, total = document["trainable_share"], document["parameters"]
    of_all = f" of {human_count(total)}" if total is not None else ""
    return (
        f"{len(document['modules'])} weights in {categories} {'category' if categories == 1 else 'categories'}, "
        f"{human_count(document['trainable_parameters'])}{of_all} parameters "
        f"trainable{f' ({share:.2%})' if share is not None else ''}"
    )

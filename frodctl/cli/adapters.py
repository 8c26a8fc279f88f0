"""What commands that write an adapter print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from frodctl.cli import profiling
from frodctl.cli.output import Output, about_time, human_bytes, human_count
from frodctl.cli.progress import Reporter
from frodctl.jobs.profile import Unprofiled

if TYPE_CHECKING:
    from frodctl.checkpoint.inputs import Json
    from frodctl.jobs.extract.frod import FrodPlan, FrodResult
    from frodctl.jobs.lora.plan import LoraPlan
    from frodctl.jobs.lora.run import LoraResult


def emit(
    plan: LoraPlan | FrodPlan,
    run: Callable[[], LoraResult | FrodResult],
    out: Output,
    report: Reporter,
    measured: Unprofiled,
    *,
    dry_run: bool,
) -> None:
    """Run a plan, unless it is a dry run, and print what is or would be written."""
    for warning in plan.warnings:
        report.note(f"Warning: {warning}.")
    if dry_run:
        document = plan.as_dict() | {"dry_run": True}
        report.note(f"Would write {plan.output} ({human_bytes(plan.output_bytes)}): {_contents(document)}")
        report.note(
            f"Peak memory about {human_bytes(plan.peak_memory_bytes)}, about {human_count(plan.flops)} floating-point "
            f"operations{about_time(plan.seconds_estimate)}"
        )
        report.refusal(plan.check_output)
        out.emit(document, document["layers"], plan.columns)
        return
    result = run().with_profile(measured)
    document = result.as_dict()
    kept = f"{document['kept']:.2%} of ‖ΔW‖² kept" if document["kept"] is not None else "ΔW is 0"
    report.note(
        f"Wrote {result.output} ({human_bytes(result.output_bytes)}): {_contents(document)}, {kept}, "
        f"in {result.seconds:.1f} s on {result.device}"
    )
    out.emit(document, document["layers"], plan.columns)
    profiling.show(result.profile, report)


def _contents(document: Mapping[str, Json]) -> str:
    layers, wholes = document["layers"], document.get("whole_tensors")
    counts = [row["parameters"] for row in layers]
    numbers = f", {human_count(sum(counts))} numbers" if None not in counts else ""
    return f"{len(layers)} layers{numbers}{f', {len(wholes)} tensors as they were trained' if wholes else ''}"

"""The model card that a merged checkpoint gets."""

from __future__ import annotations

import frodctl
from frodctl.checkpoint.manifest import MERGED_BY
from frodctl.jobs.cards import front_matter, is_hub_id, kept_fields, public_name
from frodctl.jobs.merge import config as model_config
from frodctl.jobs.merge.plan import MergePlan


def model_card(plan: MergePlan) -> str:
    """README.md of the result: base, revision, adapters, form and tool, without any path of this machine."""
    base = plan.checkpoint.model if plan.checkpoint.revision else plan.sources[0].adapter.base_model
    base = base if base and is_hub_id(base) else None
    kept = kept_fields(plan.checkpoint.root / "README.md") if plan.checkpoint.root else {}
    adapter = model_config.headed(plan.sources[0].adapter, plan.added, plan.replaced)
    tag = model_config.pipeline_tag(adapter, plan.added, kept.get("pipeline_tag"))
    revision = f" at revision `{plan.checkpoint.revision}`" if plan.checkpoint.revision else ""
    origin = {
        "base_revision": plan.checkpoint.revision,
        "adapters": [public_name(source.adapter.name) for source in plan.sources],
    }
    lines = [
        *front_matter(kept | {"pipeline_tag": tag}, base, origin=origin),
        "",
        f"# {plan.output.resolve().name}",
        "",
        f"`{base or public_name(plan.checkpoint.model)}`{revision}, with FRoD adapters merged into its weights:",
        "",
        *(f"- `{public_name(s.adapter.name)}` (form {s.form}, scale {s.scale:g})" for s in plan.sources),
        "",
        *_quantization(plan),
        *_base_as(plan),
        f"{MERGED_BY} {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _quantization(plan: MergePlan) -> list[str]:
    if plan.quantization is None:
        return []
    each = "row" if plan.quantization.scales == "channel" else "block of 128 × 128"
    return [f"{len(plan.quantization.weights)} weights are in FP8 (e4m3) with a scale for each {each}.", ""]


def _base_as(plan: MergePlan) -> list[str]:
    if plan.base_as is None:
        return []
    return [f"The base's weights are those that {plan.base_as.kind} makes of them ({plan.base_as.library}).", ""]

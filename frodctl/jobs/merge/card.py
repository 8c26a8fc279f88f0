"""The model card that a merged checkpoint gets."""

from __future__ import annotations

import re
from pathlib import Path

import frodctl
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.manifest import MERGED_BY
from frodctl.jobs.merge import config as model_config
from frodctl.jobs.merge.plan import MergePlan

#: What is taken over from the base's card.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(plan: MergePlan) -> str:
    """README.md of the result: base, revision, adapters, form and tool, without any path of this machine."""
    base = plan.checkpoint.model if plan.checkpoint.revision else plan.sources[0].adapter.base_model
    base = base if base and _is_hub_id(base) else None
    kept = kept_fields(plan.checkpoint.root / "README.md") if plan.checkpoint.root else {}
    adapter = model_config.headed(plan.sources[0].adapter, plan.added, plan.replaced)
    tag = model_config.pipeline_tag(adapter, plan.added, kept.get("pipeline_tag"))
    revision = f" at revision `{plan.checkpoint.revision}`" if plan.checkpoint.revision else ""
    lines = [
        *front_matter(kept | {"pipeline_tag": tag}, base),
        "",
        f"# {plan.output.resolve().name}",
        "",
        f"`{base or _public_name(plan.checkpoint.model)}`{revision}, with FRoD adapters merged into its weights:",
        "",
        *(f"- `{_public_name(s.adapter.name)}` (form {s.form}, scale {s.scale:g})" for s in plan.sources),
        "",
        f"{MERGED_BY} {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def front_matter(fields: dict[str, Json], base: str | None) -> list[str]:
    """The lines that the Hub reads: ``fields`` as they are, and what the result is."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", tags=["frod"], base_model=base, **fields)
    if base:
        data["base_model_relation"] = "finetune"
    return ["---", data.to_yaml(), "---"]


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _public_name(name: str) -> str:
    """A Hub id as it is; of a local path only the last part."""
    return name if _is_hub_id(name) else Path(name).resolve().name


def kept_fields(readme: Path) -> dict[str, Json]:
    """What is taken over from the card of a base: the fields that are text, or lists of it, as the Hub has them."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(readme) if readme.is_file() else None
    except Exception:  # of whatever kind: the card is a stranger's, and an extra
        return {}
    return {key: value for key, value in (found or {}).items() if key in _KEPT and _is_text(value)}


def _is_text(value: object) -> bool:
    """Whether it is text, or a list of it, that YAML writes as it reads it."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and item.replace("\n", "").isprintable() for item in items)

"""The model card that a merged checkpoint gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import frodctl
from frodctl.jobs.merge.plan import MergePlan

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(plan: MergePlan) -> str:
    """README.md of the result: base, revision, adapters, form and tool, without any path of this machine."""
    from huggingface_hub import ModelCard, ModelCardData

    base = _public_name(plan.checkpoint.model) if plan.checkpoint.revision else plan.sources[0].adapter.base
    base = base if base and _HUB_ID.fullmatch(base) and not Path(base).exists() else None
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        tags=["frod"],
        **_kept(plan),
    )
    revision = f" at revision `{plan.checkpoint.revision}`" if plan.checkpoint.revision else ""
    lines = [
        f"# {plan.output.resolve().name}",
        "",
        f"`{base or _public_name(plan.checkpoint.model)}`{revision}, with FRoD adapters merged into its weights:",
        "",
        *(f"- `{_public_name(s.adapter.name)}` (form {s.form}, scale {s.scale:g})" for s in plan.sources),
        "",
        f"Merged by frodctl {frodctl.__version__}.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _public_name(name: str) -> str:
    """A Hub id as it is; of a local path only the last part."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).resolve().name


def _kept(plan: MergePlan) -> dict[str, Any]:
    """What the base's card says of licence and language."""
    from huggingface_hub import ModelCard

    path = plan.checkpoint.root / "README.md" if plan.checkpoint.root else None
    if path is None or not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except Exception:  # whatever a stranger's YAML leads the parser to; the card is an extra
        return {}
    return {key: data[key] for key in _KEPT if data.get(key) is not None}
